"""Images in, descriptors out: for a photograph or a folder, in this process, without Ray.

For whole databases there is `encode`, which works in parallel, goes on where it was stopped, and keeps what
an index is built from.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_retrieval.cores import cores
from ray_retrieval.data import location
from ray_retrieval.data.table import ImageTable
from ray_retrieval.descriptors import Codes, Descriptors, Form, Local, Vectors, concatenate
from ray_retrieval.errors import DataError, RecipeError
from ray_retrieval.model import Encoder
from ray_retrieval.search.columns import descriptor_columns, with_metadata
from ray_retrieval.storage import Folder

SUFFIXES = (".npy", ".parquet")
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Embedded:
    """Images with their descriptors.

    Attributes:
        ids: of the images that could be decoded, in the order given; their paths where several have one id.
        paths: of their files; None for those that lie in a table as bytes.
        descriptors: one row each, or one set of local features, which may be empty.
        model: fingerprint of the model.
        failures: id and reason of each image that could not be decoded.
    """

    ids: list[str]
    paths: list[str | None]
    descriptors: Descriptors
    model: str
    failures: list[tuple[str, str]]

    @property
    def form(self) -> Form:
        return Form.of(self.descriptors)

    def rows_in_words(self) -> list[str]:
        """Each vector as a list of numbers, each code in hexadecimal, the number of local features."""
        if isinstance(self.descriptors, Local):
            counts = self.descriptors.counts.tolist()
            return [f"{count:,} local feature{'' if count == 1 else 's'}" for count in counts]
        if isinstance(self.descriptors, Codes):
            return [row.tobytes().hex() for row in self.descriptors.data]
        return [f"[{', '.join(f'{value:.6g}' for value in row)}]" for row in self.descriptors.data.tolist()]

    def as_json(self) -> dict[str, Any]:
        """Plain values; codes in hexadecimal, of local features what is known beside their descriptors."""
        images = [
            {"id": identifier, "path": path, **row}
            for identifier, path, row in zip(self.ids, self.paths, _as_json(self.descriptors), strict=True)
        ]
        return {**self.summary(), "images": images}

    def summary(self) -> dict[str, Any]:
        """Plain values of what they are, without the descriptors themselves."""
        failures = [{"id": identifier, "reason": reason} for identifier, reason in self.failures]
        return {"model": self.model, **self.form.as_json(), "rows": len(self.ids), "failures": failures}


def embed(
    model: str | Path | Folder,
    tables: ImageTable | Sequence[ImageTable],
    *,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Embedded:
    """Descriptors of images by a trained model.

    Args:
        model: a model directory.
        tables: of images, one or several, as `open_images` makes of a file, a folder, a list, CSV or Parquet.
        threads: processor threads; unset: all.
        progress: called with the number of images of each batch that is done.

    Raises:
        ArtefactError: if `model` is no model directory or is damaged.
        DataError: if none of the images can be decoded, or they come in another form than tables.
    """
    several = [tables] if isinstance(tables, ImageTable) else list(tables)
    for table in several:
        if not isinstance(table, ImageTable):
            raise DataError(f"images come as tables, got {type(table).__name__}", mend="give open_images(…)")
    kept: list[tuple[str, str | None]] = []
    parts: list[Descriptors] = []
    failures: list[tuple[str, str]] = []
    with closing(Encoder(model, threads=threads or cores())) as encoder:
        for piece in _pieces(several):
            found, failed = encoder.encode_table(piece)
            good = np.array([row for row in range(len(piece)) if row not in failed], np.int64)
            ids, paths = piece.ids, piece.paths
            kept += [(ids[row], paths[row]) for row in good.tolist()]
            parts.append(found.take(good))
            failures += [(ids[row], reason) for row, reason in sorted(failed.items())]
            if progress is not None:
                progress(len(piece))
    if not kept:
        identifier, reason = failures[0] if failures else (None, "there are none")
        raise DataError(f"none of the images can be decoded: {reason}", where=identifier)
    ids = [identifier for identifier, _ in kept]
    if len(set(ids)) < len(ids):  # files of one name in several folders
        ids = [path or identifier for identifier, path in kept]
    return Embedded(
        ids=ids,
        paths=[path for _, path in kept],
        descriptors=concatenate(parts),
        model=encoder.fingerprint,
        failures=failures,
    )


def _pieces(tables: Sequence[ImageTable]) -> Iterator[ImageTable]:
    """Some rows of the tables at a time."""
    for table in tables:
        for start in range(0, len(table), _ROWS_AT_ONCE):
            yield table.take(np.arange(start, min(start + _ROWS_AT_ONCE, len(table))))


def _as_json(descriptors: Descriptors) -> list[dict[str, Any]]:
    """What is said of each image."""
    if isinstance(descriptors, Codes):
        return [{"code": row.tobytes().hex()} for row in descriptors.data]
    if isinstance(descriptors, Vectors):
        return [{"vector": row} for row in descriptors.data.tolist()]
    found = []
    for row in range(len(descriptors)):
        one = descriptors.take(np.array([row]))
        arrays = {"locations": one.locations, "scales": one.scales, "scores": one.scores}
        more = {"vector": one.vectors[0].tolist()} if one.vectors.shape[1] else {}
        said = {name: array.tolist() for name, array in arrays.items()}
        found.append({"size": one.sizes[0].tolist(), "features": len(one.data), **said, **more})
    return found


def check_suffix(out: str | Path) -> None:
    """Raise RecipeError if `save` cannot write a file of that name."""
    name = location.name_of(str(out))
    if Path(name).suffix.lower() not in SUFFIXES:
        raise RecipeError(
            f"descriptors cannot be saved as '{Path(name).suffix or name}'",
            where=out,
            mend=f"end the name in {' or '.join(SUFFIXES)}",
        )


def save(embedded: Embedded, out: str | Path) -> None:
    """Write descriptors at a path or URI, whole or not at all.

    `.parquet`: columns id · path · the descriptors, as `search.columns` has them, and the model's fingerprint
    in the metadata. `.npy`: float32 [n, dimension] or uint8 [n, ceil(bits / 8)], and the ids of the rows as a
    list in a file of the same name that ends in `.ids.json`.

    Raises:
        RecipeError: if the name ends otherwise, or in `.npy` and they are sets of local features.
        ArtefactError: if the file cannot be written.
    """
    check_suffix(out)
    folder, name = Folder(str(out)).parent, location.name_of(str(out))
    if Path(name).suffix.lower() == ".npy":
        if isinstance(embedded.descriptors, Local):
            raise RecipeError(
                "sets of local features are no one array", where=out, mend="end the name in .parquet"
            )
        ids = json.dumps(embedded.ids, indent=2, ensure_ascii=False)
        with folder.writing(f"{Path(name).stem}.ids.json") as beside:
            beside.write(ids.encode())
            beside.flush()
            with folder.writing(name) as stream:
                np.save(stream, embedded.descriptors.data, allow_pickle=False)
        return
    table = pa.table({"id": embedded.ids, "path": pa.array(embedded.paths, pa.string())})
    for field, column in descriptor_columns(embedded.descriptors):
        table = table.append_column(field, column)
    table = table.replace_schema_metadata(with_metadata(table.schema, embedded.model).metadata)
    with folder.writing(name) as stream:
        pq.write_table(table, stream, compression="zstd")
