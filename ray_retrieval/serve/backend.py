"""What the HTTP layer asks of what stands behind it: requests in, answers out. No HTTP here, and no Ray."""

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy.typing as npt

from ray_retrieval.serve.answers import (
    Box,
    ChangeAnswer,
    EmbedAnswer,
    Health,
    IndexesAnswer,
    MapAnswer,
    MatchAnswer,
    Record,
    SampleAnswer,
    SearchAnswer,
)
from ray_retrieval.serve.thumbnails import Thumbnail


@dataclass(frozen=True)
class ImageExample:
    """An image that was sent, checked by its header.

    Attributes:
        data: bytes of the file.
        format: as Pillow names it.
        width: of the upright image.
        height: of the upright image.
        box: all that counts of it; None: the whole.
    """

    data: bytes
    format: str
    width: int
    height: int
    box: Box | None = None


@dataclass(frozen=True)
class IdExample:
    """An image of the index; with a box, that part of it is encoded anew."""

    id: str
    box: Box | None = None


@dataclass(frozen=True)
class DescriptorExample:
    """A descriptor of the index's kind: a packed code, uint8 [bytes], or a vector of any length."""

    data: npt.NDArray[Any]


PhotographExample = ImageExample | IdExample
"""What is compared with another one."""
AnyExample = PhotographExample | DescriptorExample


@dataclass(frozen=True)
class SearchRequest:
    """One search.

    Attributes:
        examples: at least one.
        k: hits wanted, at least 1.
        combine: several examples give one query, their average (unit vectors: the mean; codes: the majority
            of each bit), or each is searched and a row counts by the best of its distances.
        index: name of the index; None: the first one.
        where: a filter, in the language of `search.filters`.
        rerank: name of a re-ranking that the index offers; None: its default; "none": without.
        why: whether hits say what speaks for them.
        partial: answer without groups of shards that do not; None: as the server is configured.
    """

    examples: tuple[AnyExample, ...]
    k: int = 10
    combine: Literal["average", "best"] = "average"
    index: str | None = None
    where: str | None = None
    rerank: str | None = None
    why: bool = False
    partial: bool | None = None


@dataclass(frozen=True)
class NewImage:
    """An image to add.

    Attributes:
        id: of it; unique in the index.
        image: the file.
        label: class number, name, or several of them; None: unknown.
        columns: values of further columns.
    """

    id: str
    image: ImageExample
    label: int | str | list[int] | list[str] | None = None
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Original:
    """An image as it was indexed: its bytes, media type by its content, and a tag that changes with it."""

    data: bytes
    media_type: str
    etag: str


class Backend(Protocol):
    """Answers requests. Each method raises QueryError with the status to answer.

    `index` is a name; None is the first index. `deadline` is a moment of `time.monotonic`: who comes to it
    later gives up with status 503 and lets those who work for it know.
    """

    async def search(self, request: SearchRequest, *, deadline: float) -> SearchAnswer:
        """The nearest images of an index."""
        ...

    async def embed(self, images: list[ImageExample], index: str | None, *, deadline: float) -> EmbedAnswer:
        """Descriptors of images by the model of an index."""
        ...

    async def match(
        self,
        first: PhotographExample,
        second: PhotographExample,
        index: str | None,
        *,
        deadline: float,
    ) -> MatchAnswer:
        """What two photographs have in common, by the local features of an index's model."""
        ...

    async def match_picture(
        self,
        first: PhotographExample,
        second: PhotographExample,
        index: str | None,
        *,
        deadline: float,
    ) -> bytes:
        """The same drawn, as a PNG file."""
        ...

    async def add(
        self, images: list[NewImage], index: str | None, *, replace: bool, deadline: float
    ) -> ChangeAnswer:
        """Add images and publish a new version, which is served when this returns."""
        ...

    async def remove(
        self, ids: list[str] | None, where: str | None, index: str | None, *, deadline: float
    ) -> ChangeAnswer:
        """Remove images, by their ids or by a filter, and publish a new version."""
        ...

    def describe(self) -> IndexesAnswer:
        """What is served."""
        ...

    async def record(self, identifier: str, index: str | None) -> Record:
        """What an index knows of one image."""
        ...

    async def sample(
        self, count: int, seed: int | None, where: str | None, index: str | None
    ) -> SampleAnswer:
        """Images drawn at random; without a seed others each time."""
        ...

    async def map(self, index: str | None) -> MapAnswer:
        """The map of a sample of the index; made once per version, the first caller waits."""
        ...

    async def picture_tag(self, identifier: str, size: int | None, index: str | None) -> str:
        """The tag of a thumbnail, or without a size of the original, which changes with its content."""
        ...

    async def thumbnail(self, identifier: str, size: int, index: str | None) -> Thumbnail:
        """An image of the index, shrunk to fit a square of `size` pixels."""
        ...

    async def original(self, identifier: str, index: str | None) -> Original:
        """An image of the index as it was indexed."""
        ...

    async def check(self) -> Health:
        """Says that every part answers."""
        ...

    def metrics(self) -> bytes:
        """The gateway's own measurements in the text format of Prometheus."""
        ...
