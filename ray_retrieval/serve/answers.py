"""The JSON bodies of the server's answers."""

from pydantic import BaseModel, Field

from ray_retrieval.descriptors import DescriptorKind

METRICS = {DescriptorKind.CODES: "hamming", DescriptorKind.VECTORS: "squared euclidean"}
"""How distances are measured, by the kind of descriptor."""


class Query(BaseModel):
    """The image that was searched for, as its content says."""

    format: str = Field(description="JPEG, PNG, WEBP, BMP, GIF or TIFF")
    width: int = Field(description="in pixels")
    height: int = Field(description="in pixels")
    bytes: int
    k: int = Field(description="hits asked for")


class Hit(BaseModel):
    """One image of the index."""

    id: str
    row: int = Field(description="row of the image in the index")
    distance: int | float = Field(
        description="to the query: Hamming distance in bits, or squared Euclidean distance of unit vectors"
    )
    similarity: float = Field(description="1 - distance / bits; of vectors the cosine, 1 - distance / 2")
    label: int | list[int] | None
    class_name: str | list[str] | None
    path: str | None = Field(description="name of the image's file, without its folders")
    image: str = Field(description="address of the image on this server")


class IndexVersion(BaseModel):
    """What answered: version of the index, fingerprint of the model that made it."""

    version: int
    model: str


class SearchAnswer(BaseModel):
    """Hits in ascending order of distance, then of row."""

    query: Query
    hits: list[Hit]
    index: IndexVersion
    timings_ms: dict[str, float] = Field(
        description="decode: reading and checking the file's header; encode: pixels to descriptor, with the "
        "wait for a batch; search: the slowest shard group; merge; records: ids and labels; total"
    )


class Example(BaseModel):
    """An image of the index to start from."""

    id: str
    class_name: str | list[str] | None
    image: str


class IndexAnswer(BaseModel):
    """The index and the server's limits."""

    rows: int
    kind: str = Field(description="codes or vectors")
    bits: int | None = Field(default=None, description="of a code")
    dimension: int | None = Field(default=None, description="of a vector")
    shards: int
    shard_groups: int
    metric: str
    version: int
    model: str
    class_names: list[str] | None
    max_k: int
    max_upload_bytes: int
    formats: list[str]
    examples: list[Example] = Field(description="images spread evenly over the index")


class Health(BaseModel):
    """Says that every part of the server answers."""

    status: str
    version: int


class Problem(BaseModel):
    """What is wrong, where, and what to do about it."""

    problem: str
    where: str | None
    mend: str | None


class ErrorAnswer(BaseModel):
    """The body of every answer that is not a success."""

    error: Problem
