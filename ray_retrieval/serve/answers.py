"""The JSON bodies of the server's answers."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from ray_retrieval.descriptors import DescriptorKind
from ray_retrieval.errors import QueryError

METRICS = {
    DescriptorKind.CODES: "hamming",
    DescriptorKind.VECTORS: "squared euclidean",
    DescriptorKind.LOCAL: "score of matching local features, its sign turned",
}
"""How distances are measured, by the kind of descriptor."""

Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the upright image."""


class Example(BaseModel):
    """One of the images, descriptors or ids that a search started from, as the server understood it."""

    kind: Literal["image", "id", "descriptor"]
    id: str | None = Field(default=None, description="of an image of the index")
    format: str | None = Field(default=None, description="JPEG, PNG, WEBP, BMP, GIF or TIFF, by its content")
    width: int | None = Field(default=None, description="of the upright image, in pixels")
    height: int | None = Field(default=None, description="of the upright image, in pixels")
    bytes: int | None = Field(default=None, description="of the file")
    box: Box | None = Field(
        default=None, description="left, top, right, bottom: all that counts of the upright image, in pixels"
    )


class Query(BaseModel):
    """What was searched for."""

    examples: list[Example]
    combine: Literal["average", "best"]
    k: int = Field(description="hits asked for")
    where: str | None = Field(description="the filter")
    rerank: str = Field(description="name of the re-ranking that was used; none without")


class Why(BaseModel):
    """What speaks for a hit, where it was asked for.

    Of codes the bits that differ from the query's; of local features where the inliers lie.
    """

    bits: int | None = None
    differing: list[int] | None = Field(default=None, description="numbers of the bits that differ, from 0")
    query_code: str | None = Field(default=None, description="the query's code, hexadecimal")
    code: str | None = Field(default=None, description="the hit's code, hexadecimal")
    query_points: list[Point] | None = Field(
        default=None, description="x and y of each inlier in the query, in pixels of the upright image"
    )
    points: list[Point] | None = Field(default=None, description="the same inliers in the hit")
    query_size: tuple[int, int] | None = Field(default=None, description="width and height of the query")
    size: tuple[int, int] | None = Field(default=None, description="width and height of the hit")


class Hit(BaseModel):
    """One image of the index."""

    rank: int = Field(description="1 is the nearest")
    id: str
    row: int = Field(description="row of the image in this version of the index")
    distance: int | float = Field(
        description="in the search, before any re-ranking: Hamming distance in bits, squared Euclidean "
        "distance of unit vectors, or of local features the score with its sign turned"
    )
    similarity: float = Field(
        description="1 - distance / bits; of vectors the cosine; of local features the score"
    )
    in_words: str = Field(
        description="how near it is, as people read it: 3 bits, cosine 0.8125, score 0.1250; where hits are "
        "verified 37 inliers, no match, not verified"
    )
    score: float | None = Field(default=None, description="by which re-ranking put it here, lowest first")
    inliers: int | None = Field(
        default=None, description="of geometric verification; 0: too few to mean anything"
    )
    label: int | list[int] | None = Field(default=None, description="class numbers")
    class_name: str | list[str] | None = None
    columns: dict[str, Any] = Field(default_factory=dict, description="further columns of the index")
    path: str | None = Field(default=None, description="name of the image's file, without its folders")
    image: str = Field(description="address of the thumbnail on this server")
    original: str = Field(description="address of the image as it was indexed, on this server")
    why: Why | None = None


class Served(BaseModel):
    """What answered: name and version of the index, fingerprint of the model that made it."""

    name: str
    version: int
    model: str


class Partial(BaseModel):
    """What an answer lacks, where groups of shards did not answer."""

    groups: list[int] = Field(description="numbers of the groups of shards that did not answer")
    rows: int = Field(description="rows of the index that were not searched")
    of_rows: int = Field(description="rows of the index")


class SearchAnswer(BaseModel):
    """Hits in ascending order of distance, then of row; re-ranked ones in the order of their scores."""

    query: Query
    hits: list[Hit]
    index: Served
    partial: Partial | None = Field(default=None, description="null: all shards were searched")
    notes: list[str] = Field(
        default_factory=list, description="why there are no hits, or that none is a match"
    )
    timings_ms: dict[str, float] = Field(
        description="decode: reading and checking headers; encode: pixels to descriptors, with the wait for "
        "a batch; search: the slowest group of shards; merge; rerank; records: ids and labels; total"
    )


class Problem(BaseModel):
    """What is wrong, where, and what to do about it."""

    problem: str
    where: str | None
    mend: str | None
    status: int = Field(description="as HTTP has it; of one of several the status that it would have alone")


class ErrorAnswer(BaseModel):
    """The body of every answer that is not a success."""

    error: Problem

    @classmethod
    def of(cls, error: QueryError) -> "ErrorAnswer":
        """What an error says."""
        problem = Problem(problem=error.problem, where=error.where, mend=error.mend, status=error.status)
        return cls(error=problem)

    def as_error(self) -> QueryError:
        """The error that says so."""
        wrong = self.error
        return QueryError(wrong.problem, where=wrong.where, mend=wrong.mend, status=wrong.status)


class BatchAnswer(BaseModel):
    """An answer, or what is wrong, for each search of a batch, in their order."""

    answers: list[SearchAnswer | ErrorAnswer]


class Described(BaseModel):
    """The descriptor of one image; one of the three kinds is there."""

    code: str | None = Field(
        default=None, description="hexadecimal, the first bit highest; ceil(bits / 8) bytes"
    )
    vector: list[float] | None = Field(default=None, description="of length 1")
    features: int | None = Field(default=None, description="how many local features were found")
    global_vector: list[float] | None = Field(
        default=None, description="of a model of local features that makes one"
    )


class EmbedAnswer(BaseModel):
    """Descriptors of images, in their order."""

    kind: str = Field(description="codes, vectors or local")
    bits: int | None = None
    dimension: int | None = None
    descriptors: list[Described | ErrorAnswer]
    model: str
    timings_ms: dict[str, float]


class MatchAnswer(BaseModel):
    """What two photographs have in common."""

    verdict: str
    same_scene: bool
    inliers: int
    putatives: int = Field(description="pairs of features that are alike")
    significance: float = Field(description="-log10 of the chance of so many inliers at random")
    sizes: tuple[tuple[int, int], tuple[int, int]] = Field(description="width and height of each, in pixels")
    features: tuple[int, int]
    points: tuple[list[Point], list[Point]] = Field(description="the inliers in the first and in the second")
    matrix: list[list[float]] | None = Field(description="3 x 3: maps the first into the second")
    model: str


class ChangeAnswer(BaseModel):
    """A change of an index that is published."""

    index: Served
    operation: str = Field(description="such as: add 3 rows")
    rows: int = Field(description="of the index by now")
    changed: int = Field(description="rows that were added or removed")
    left_out: dict[str, str] = Field(default_factory=dict, description="images that were not added, and why")


class Record(BaseModel):
    """What the index knows of one image."""

    id: str
    row: int
    label: int | list[int] | None = None
    class_name: str | list[str] | None = None
    columns: dict[str, Any] = Field(default_factory=dict)
    path: str | None = None
    image: str
    original: str


class SampleAnswer(BaseModel):
    """Images drawn from the index at random."""

    images: list[Record]
    seed: int = Field(description="the same seed draws the same images of the same version")
    index: Served


class Spot(BaseModel):
    """One image on the map."""

    id: str
    x: float = Field(description="0 to 1")
    y: float = Field(description="0 to 1")
    class_name: str | list[str] | None = None
    image: str


class MapAnswer(BaseModel):
    """A sample of the index laid out so that what is near in the index is near on the map."""

    spots: list[Spot]
    method: str = Field(description="t-SNE and its settings, in words")
    index: Served


class OfferedReranking(BaseModel):
    """A re-ranking that searches may ask for by name."""

    name: str
    description: str
    is_default: bool


class Version(BaseModel):
    """One version of an index."""

    number: int
    operation: str
    rows: int


class IndexAnswer(BaseModel):
    """An index and its model."""

    name: str
    rows: int
    deleted: int = Field(description="rows that were removed and are not yet compacted away")
    kind: str = Field(description="codes, vectors or local")
    bits: int | None = Field(default=None, description="of a code")
    dimension: int | None = Field(default=None, description="of a vector")
    metric: str
    search: str = Field(description="exact, or the approximate search with its measured recall, in words")
    version: int
    versions: list[Version] = Field(description="the last ones, newest first")
    model: str
    shards: list[dict[str, int]] = Field(
        description="rows, bytes and the group that searches it, of each shard"
    )
    shard_groups: int
    memory: dict[str, float] = Field(
        description="bytes: mapped, private (of the groups of shards) and per_row"
    )
    class_names: list[str] | None
    columns: dict[str, str] = Field(description="names and types of the columns that filters may use")
    rerankings: list[OfferedReranking]
    writable: bool = Field(description="whether images may be added and removed here")
    card: dict[str, Any] = Field(
        description="of the model: method, backbone, training data, and metrics, each with its policy"
    )


class IndexesAnswer(BaseModel):
    """What is served, and the server's limits."""

    indexes: list[IndexAnswer] = Field(description="the first one is searched where none is named")
    max_k: int
    max_upload_bytes: int
    max_pixels: int
    max_examples: int
    max_batch: int
    formats: list[str]
    urls_from: list[str] = Field(description="hosts whose images may be named by URL")
    needs_key: bool


class Health(BaseModel):
    """Says that every part of the server answers."""

    status: str
    versions: dict[str, int] = Field(
        description="version of each index; empty where a key is needed, which nobody has to have here"
    )
