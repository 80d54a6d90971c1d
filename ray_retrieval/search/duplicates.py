"""Images that an index holds already, by their content.

The content of an image is its bytes, wherever they lie: in the index, in embeddings, or in the file that a
path names. Where they cannot be had, it is the descriptor; but codes say too little for that, and so do
sets without a feature: such an image is like no other.

Only images of the same length can be the same, and lengths are known without reading, so few are read; but
for each path in the index its store is asked for the length.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from ray_retrieval.descriptors import Codes, DescriptorKind, Descriptors, Form, Local, concatenate
from ray_retrieval.search.embeddings import Embeddings
from ray_retrieval.search.hits import NO_ROW
from ray_retrieval.search.images import image_length, read_image
from ray_retrieval.search.index import Index
from ray_retrieval.search.sources import EmbeddedRows, NewRows
from ray_retrieval.storage import digest

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_UNKNOWN = -1


@dataclass(frozen=True)
class _Contents:
    """What is known of the content of some images.

    Attributes:
        form: of the descriptors.
        lengths: int64 [n], of their bytes; -1 where these cannot be had.
        image: gives the bytes of one, or None.
        descriptors: gives some descriptors.
    """

    form: Form
    lengths: Rows
    image: Callable[[int], bytes | None]
    descriptors: Callable[[Rows], Descriptors]

    @property
    def comparable(self) -> Mask:
        """Bool [n]: which may have a key at all."""
        descriptors_tell = self.form.kind is not DescriptorKind.CODES
        return np.asarray((self.lengths != _UNKNOWN) | descriptors_tell, np.bool_)

    def key(self, place: int) -> str | None:
        """Stands for the content of an image; None where it is like no other."""
        data = self.image(place) if self.lengths[place] != _UNKNOWN else None
        if data is not None:
            return f"image {digest(data)}"
        described = self.descriptors(np.array([place], np.int64))
        if isinstance(described, Codes) or (isinstance(described, Local) and len(described.data) == 0):
            return None
        return f"descriptor {digest(described.data.tobytes())}"


def duplicates(index: Index, new_rows: NewRows, replaced: Rows | None = None) -> Mask:
    """Bool [rows]: which of new rows are the same image as one of the index, or as one before them.

    Args:
        index: opened whole.
        new_rows: of the same form.
        replaced: int64 [rows]: the row of the index that each one is to replace, `NO_ROW` for none. One that
            replaces a row is a duplicate only if it is the same image as that one; the others are compared
            with what the index holds then.
    """
    new = _of_embeddings(new_rows.embeddings) if isinstance(new_rows, EmbeddedRows) else _of_others(new_rows)
    if replaced is None:
        replaced = np.full(len(new.lengths), NO_ROW)
    rows, old = _of_index(index, np.unique(new.lengths))
    candidates = np.flatnonzero(old.comparable)
    held = {int(rows[place]): old.key(int(place)) for place in candidates}
    lengths, counts = np.unique(new.lengths, return_counts=True)
    alike = np.isin(new.lengths, np.union1d(old.lengths, lengths[counts > 1])) & new.comparable
    coming = {place: new.key(place) for place in np.flatnonzero(alike).tolist()}
    same = [
        place
        for place, key in coming.items()
        if key is not None and replaced[place] != NO_ROW and held.get(int(replaced[place])) == key
    ]
    found = np.zeros(len(new.lengths), np.bool_)
    found[same] = True
    replacing = (replaced != NO_ROW) & ~found
    outdated = set(replaced[replacing].tolist())
    known = {key for row, key in held.items() if row not in outdated}
    known |= {coming.get(place) for place in np.flatnonzero(replacing).tolist()}
    for place, key in coming.items():
        if key is not None and replaced[place] == NO_ROW:
            found[place] = key in known
            known.add(key)
    return found


def _of_index(index: Index, lengths: Rows) -> tuple[Rows, _Contents]:
    """The rows of an index whose images have one of some lengths, int64 [n], and their content."""
    found, known = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for number, shard in enumerate(index.shards.values()):
        places = index.selection().places(number)
        held = shard.image_lengths()[places]
        if "path" in shard.rows.schema.names:
            paths = shard.rows.column("path")
            for place in np.flatnonzero(held == _UNKNOWN):
                held[place] = _length_of(paths[int(places[place])].as_py())
        some = np.isin(held, lengths)
        found.append(places[some] + shard.entry.first_row)
        known.append(held[some])
    rows = np.concatenate(found)
    shard_of, place_of = index.located(rows)

    def image(place: int) -> bytes | None:
        held = index.shards[int(shard_of[place])].image(int(place_of[place]))
        if held is not None:
            return held
        path = index.records(rows[place : place + 1])["path"][0].as_py()
        return None if path is None else read_image(path)

    return rows, _Contents(
        index.form, np.concatenate(known), image, lambda places: index.descriptors(rows[places])
    )


def _of_embeddings(embeddings: Embeddings) -> _Contents:
    lengths, paths = [np.zeros(0, np.int64)], list[str | None]()
    for number in range(len(embeddings.parts)):
        table = embeddings.read_part(number, ["image.path"])
        own = pc.struct_field(table["image"], "path").to_pylist()
        held = np.full(len(own), _UNKNOWN, np.int64)
        if embeddings.parts[number]["images"]:
            column = pc.struct_field(embeddings.read_part(number, ["image.bytes"])["image"], "bytes")
            held = pc.fill_null(pc.binary_length(column), _UNKNOWN).to_numpy().astype(np.int64)
        for place in np.flatnonzero(held == _UNKNOWN):
            held[place] = _length_of(own[place])
        lengths.append(held)
        paths += own
    before = np.cumsum([0, *(part["rows"] for part in embeddings.parts)])
    held_images = _HeldImages(embeddings)

    def image(place: int) -> bytes | None:
        number = int(np.searchsorted(before, place, side="right")) - 1
        held = held_images.of(number, place - int(before[number]))
        path = paths[place]
        return held if held is not None or path is None else read_image(path)

    def described(places: Rows) -> Descriptors:
        return embeddings.descriptors.take(places)

    return _Contents(embeddings.form, np.concatenate(lengths), image, described)


def _of_others(new_rows: NewRows) -> _Contents:
    """Of rows that come without images: their files are known by their paths, if at all."""
    paths: list[str | None] = []
    parts = []
    for table, descriptors in new_rows.tables(0, len(new_rows)):
        named = "path" in table.schema.names
        paths += table["path"].to_pylist() if named else [None] * len(descriptors)
        parts.append(descriptors)
    lengths = np.array([_length_of(path) for path in paths], np.int64)
    joined = concatenate(parts)

    def image(place: int) -> bytes | None:
        path = paths[place]
        return None if path is None else read_image(path)

    return _Contents(new_rows.form, lengths, image, joined.take)


class _HeldImages:
    """Images that embeddings hold as bytes, one part at a time."""

    def __init__(self, embeddings: Embeddings) -> None:
        self._embeddings, self._number = embeddings, _UNKNOWN

    def of(self, number: int, place: int) -> bytes | None:
        """The image at a place of a part."""
        if not self._embeddings.parts[number]["images"]:
            return None
        if number != self._number:
            table = self._embeddings.read_part(number, ["image.bytes"])
            self._column, self._number = pc.struct_field(table["image"], "bytes"), number
        found: bytes | None = self._column[place].as_py()
        return found


def _length_of(path: str | None) -> int:
    length = None if path is None else image_length(path)
    return _UNKNOWN if length is None else length
