"""The JSON bodies of requests."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator

from ray_retrieval.errors import QueryError

Finite = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1, max_length=4096)]
BodyType = TypeVar("BodyType", bound="Body")

SOURCES = ("image", "url", "id", "vector", "code")
"""What an example may be."""


def _exactly_one(*names: str) -> ConfigDict:
    """Says in the schema what a validator checks."""
    return ConfigDict(json_schema_extra={"oneOf": [{"required": [name]} for name in names]})


class Body(BaseModel):
    """A part of a request, which refuses keys that it does not know."""

    model_config = ConfigDict(extra="forbid")


class BoxBody(Body):
    """The part of an image that counts."""

    box: tuple[Finite, Finite, Finite, Finite] | None = Field(
        default=None, description="left, top, right, bottom in pixels of the upright image"
    )

    @model_validator(mode="after")
    def _has_an_area(self) -> "BoxBody":
        check_box(self.box)
        return self


class ExampleBody(BoxBody):
    """What to search for: exactly one of image, url, id, vector and code."""

    model_config = _exactly_one(*SOURCES)

    image: str | None = Field(default=None, description="an image file in base64, or a data: URL of one")
    url: Text | None = Field(default=None, description="address of an image at a host that the server allows")
    id: Text | None = Field(default=None, description="of an image of the index")
    vector: Annotated[list[Finite], Field(min_length=1, max_length=65_536)] | None = Field(
        default=None, description="of the index's dimension and of any length but 0"
    )
    code: Annotated[str, Field(pattern=r"^([0-9A-Fa-f]{2})+$", max_length=65_536)] | None = Field(
        default=None, description="hexadecimal, ceil(bits / 8) bytes, the first bit highest"
    )

    @model_validator(mode="after")
    def _is_one_thing(self) -> "ExampleBody":
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(SOURCES)}, got {' and '.join(given) or 'none'}")
        if self.box is not None and given[0] in ("vector", "code"):
            raise ValueError(f"a {given[0]} has no box")
        return self


class OneImageBody(Body):
    """Exactly one of image and url."""

    model_config = _exactly_one("image", "url")

    image: str | None = Field(default=None, description="an image file in base64, or a data: URL of one")
    url: Text | None = Field(default=None, description="address of an image at a host that the server allows")

    @model_validator(mode="after")
    def _is_one_image(self) -> "OneImageBody":
        if (self.image is None) == (self.url is None):
            raise ValueError("give one of image and url")
        return self


class ImageBody(BoxBody, OneImageBody):
    """An image: exactly one of image and url."""


class SearchSettings(Body):
    """How to search."""

    k: int = Field(default=10, ge=1, description="hits wanted")
    index: Text | None = Field(default=None, description="name of the index; the first one unless told")
    where: Annotated[str, Field(max_length=100_000)] | None = Field(
        default=None, description="a filter, such as: label in (3, dog) and price < 20"
    )
    rerank: Text | None = Field(
        default=None, description="name of a re-ranking of the index; none: without; its default unless told"
    )
    combine: Literal["average", "best"] = Field(
        default="average",
        description="several examples: search for their mean, or for each and keep the best",
    )
    why: bool = Field(default=False, description="say what speaks for each hit")
    partial: bool | None = Field(
        default=None, description="answer without the shards that do not; as the server is set unless told"
    )


class SearchBody(SearchSettings):
    """One search."""

    examples: list[ExampleBody] = Field(min_length=1)


class FormSettings(SearchSettings):
    """How to search for the images of a form: its field `request`."""

    boxes: list[tuple[Finite, Finite, Finite, Finite] | None] | None = Field(
        default=None, description="one for each image, in their order; null: the whole image"
    )

    @model_validator(mode="after")
    def _have_areas(self) -> "FormSettings":
        for box in self.boxes or []:
            check_box(box)
        return self


class BatchBody(Body):
    """Several searches. What is wrong with one is its own answer."""

    searches: list[Any] = Field(min_length=1)


class EmbedBody(Body):
    """Images to describe."""

    images: list[ImageBody] = Field(min_length=1)
    index: Text | None = Field(
        default=None, description="whose model describes them; the first one unless told"
    )


class MatchBody(Body):
    """Two photographs, each an image, a url or an id."""

    first: ExampleBody
    second: ExampleBody
    index: Text | None = Field(
        default=None, description="whose model finds features; the first one unless told"
    )


class NewImageSettings(Body):
    """What is known of an image to add."""

    id: Text | None = Field(
        default=None, description="unique in the index; in a form, the file's name unless told"
    )
    label: StrictInt | Text | list[StrictInt] | list[Text] | None = Field(
        default=None, description="number or name of its class, or several"
    )
    columns: dict[str, Any] = Field(
        default_factory=dict, description="values of further columns of the index"
    )


class NewImageBody(NewImageSettings, OneImageBody):
    """An image to add: an id, and exactly one of image and url."""

    id: Text = Field(description="unique in the index")


class AddBody(Body):
    """Images to add."""

    images: list[NewImageBody] = Field(min_length=1)


class AddSettings(Body):
    """What is known of the images of a form, in their order: its field `request`."""

    images: list[NewImageSettings] = Field(min_length=1)


class RemoveBody(Body):
    """Images to remove: exactly one of ids and where."""

    model_config = _exactly_one("ids", "where")

    ids: Annotated[list[Text], Field(min_length=1, max_length=100_000)] | None = None
    where: Annotated[str, Field(min_length=1, max_length=100_000)] | None = Field(
        default=None, description="a filter: what it lets through is removed"
    )

    @model_validator(mode="after")
    def _is_one_choice(self) -> "RemoveBody":
        if (self.ids is None) == (self.where is None):
            raise ValueError("give one of ids and where")
        return self


def check_box(box: tuple[float, float, float, float] | None) -> None:
    """See that a box has an area.

    Raises:
        ValueError: if not.
    """
    if box is not None and not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError("a box is left, top, right, bottom with left < right and top < bottom")


def parsed(kind: type[BodyType], body: bytes | str) -> BodyType:
    """A body out of its JSON.

    Raises:
        QueryError: 400 if it is no JSON, 422 if it says something else than a body may.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise explain(error) from None
    except UnicodeError:
        raise QueryError("the body is no JSON in UTF-8", where="body", mend="see /docs") from None


def checked(kind: type[BodyType], values: Any) -> BodyType:
    """A body out of plain values.

    Raises:
        QueryError: 422 if they say something else than a body may.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise explain(error) from None


def explain(error: ValidationError) -> QueryError:
    """The first of the errors, in our words."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"] if not _names_a_type(part)) or "body"
    message = first["msg"].removeprefix("Value error, ")
    return QueryError(
        message[:1].lower() + message[1:],
        where=where[:200],
        mend="see /docs",
        status=400 if first["type"] == "json_invalid" else 422,
    )


def _names_a_type(part: int | str) -> bool:
    """Pydantic also names the member of a union that it tried, such as list[int]."""
    return isinstance(part, str) and (
        "[" in part or "-" in part or part in ("int", "str", "constrained-str", "tuple")
    )
