"""Google Landmarks v2 as Parquet shards: the original JPEG bytes, labels 0…C−1, a part to validate on.

    planned = plan("data/gldv2", Gldv2BuildConfig())
    build(planned, "data/gldv2-clean", threads=16)

The folder that comes of it:

    settings.json           what the build follows; another build needs another folder
    shards/train-00000-of-00128.parquet, …         id, label, image {bytes, path}: see `data.shards`
    shards/validation-00000-of-00128.parquet, …
    parts/train-00000-of-00128.parquet, …          where each image of a shard stands, and what was missing
    train.parquet, validation.parquet              id, label, image {path: an address in a shard}
    classes.parquet         label, landmark_id, name
    relabeling.csv          new_label,old_label
    missing.csv             id,landmark_id,reason: photographs that are left out
    gldv2.json              last: counts, and a checksum of every file

A build that was killed goes on at the first shard that is not finished. Run again after more archives were
unpacked, it writes the shards anew whose missing photographs have come since. Sources are only read.

Every photograph is decoded once here, and those that cannot be are left out like missing ones.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from ray_retrieval.commands import command
from ray_retrieval.data import location, shards
from ray_retrieval.data.columns import IMAGE_TYPE, images_at
from ray_retrieval.data.datasets.gldv2_plan import PARTS, Plan
from ray_retrieval.data.decode import MAX_BYTES, decode
from ray_retrieval.data.table import IntArray
from ray_retrieval.errors import ArtefactError, DataError
from ray_retrieval.storage import (
    Folder,
    check_file,
    file_entry,
    is_uri,
    read_description,
    write_description,
)

DESCRIPTION = "gldv2.json"
KIND, VERSION = "gldv2", 2
"""Builds of version 1 have read the photographs' headers only."""
_SETTINGS, _SETTINGS_KIND = "settings.json", "gldv2-settings"
_PART_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("label", pa.int64()),
        ("address", pa.string()),
        ("problem", pa.string()),
    ]
)
"""A row a photograph: its address below the folder, or why it has none."""

Advance = Callable[[int], None]


def build(planned: Plan, out: str, *, threads: int, advance: Advance = lambda _: None) -> dict[str, Any]:
    """Write the shards of a collection, or those that are not there yet.

    Args:
        planned: what is built; its source holds `train/0/1/2/….jpg`.
        out: the folder of the build, on a local disk.
        threads: readers at work.
        advance: called with the number of photographs that a step dealt with.

    Returns:
        What `gldv2.json` says.

    Raises:
        DataError: if no photograph is there, or the folder holds another build.
        ArtefactError: if the folder cannot be written.
    """
    if is_uri(out):
        raise DataError("a build goes to a local folder", where=out, mend="build locally, then copy it")
    folder = Folder(out)
    if not os.path.isdir(os.path.join(planned.source, "train")):
        raise DataError(
            "there is no folder 'train' with photographs in it",
            where=planned.source,
            mend=_fetched_by(planned.source),
        )
    _claim(folder, planned.origin)
    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="read") as pool:
        parts = {
            part: [
                _shard(folder, name, planned, rows, pool, advance)
                for name, rows in _named(part, planned.parts[part], planned.shards)
            ]
            for part in PARTS
        }
    return _describe(folder, planned, parts)


def verify(uri: str) -> int:
    """Compare every file of a build with its checksum; the number of files.

    Raises:
        ArtefactError: naming the first that is missing or damaged, or if the build is not complete.
    """
    folder = Folder(uri)
    entries = entries_of(read_description(folder, DESCRIPTION, kind=KIND, version=VERSION))
    for entry in entries:
        check_file(folder, entry, content=True)
    return len(entries)


def entries_of(description: dict[str, Any]) -> list[dict[str, Any]]:
    """{"file", "bytes", "sha256"} of every file that a build's description names."""
    found = [*description["files"]]
    for part in PARTS:
        found += description["parts"][part]["shards"]
    return found


def _claim(folder: Folder, origin: dict[str, Any]) -> None:
    """Write down what the build follows, where there was nothing.

    Raises:
        DataError: if the folder holds what another build wrote, or anything else.
    """
    if folder.exists(_SETTINGS):
        known = read_description(folder, _SETTINGS, kind=_SETTINGS_KIND, version=VERSION)["origin"]
        for key in sorted({*origin, *known}):
            if origin.get(key) != known.get(key):
                raise DataError(
                    f"the folder holds a build with {key} = {known.get(key)}, asked is {origin.get(key)}",
                    where=folder,
                    mend="ask for the same, or use another folder",
                )
        return
    if folder.names():
        raise DataError("the folder is not empty", where=folder, mend="use another one")
    write_description(folder, _SETTINGS, kind=_SETTINGS_KIND, version=VERSION, body={"origin": origin})


def _named(part: str, rows: IntArray, count: int) -> Iterator[tuple[str, IntArray]]:
    """Name and rows of each shard of a part; a part without rows has none."""
    for number, piece in enumerate(np.array_split(rows, count) if len(rows) else []):
        yield f"{part}-{number:05d}-of-{count:05d}.parquet", piece


def _shard(
    folder: Folder,
    name: str,
    planned: Plan,
    rows: IntArray,
    pool: ThreadPoolExecutor,
    advance: Advance,
) -> tuple[dict[str, Any], pa.Table]:
    """The entry of a finished shard, and what became of its photographs; written where it is not there."""
    there = _finished(folder, name, planned, rows)
    if there is not None:
        advance(len(rows))
        return there
    # From here on neither says what is there.
    folder.remove(DESCRIPTION)
    folder.remove(f"parts/{name}")
    problems: list[str | None] = []

    def groups() -> Iterator[pa.Table]:
        for piece in shards.in_groups(rows):
            paths = planned.paths(piece)
            read = list(pool.map(_read, [os.path.join(planned.source, path) for path in paths]))
            problems.extend(problem for _, problem in read)
            yield _group(planned, piece, paths, [data for data, _ in read])
            advance(len(piece))

    shards.write(folder, f"shards/{name}", groups())
    starts, lengths = shards.byte_ranges(folder, f"shards/{name}")
    problem = pa.array(problems, pa.string())
    address = shards.addresses(f"shards/{name}", starts, lengths)
    found = pc.replace_with_mask(pa.nulls(len(rows), pa.string()), problem.is_null(), address)
    ids = pa.array(planned.ids[rows].astype(str), pa.string())
    columns = [ids, pa.array(planned.labels[rows]), found, problem]
    entry = {**file_entry(folder, f"shards/{name}"), "rows": len(starts)}
    table = pa.Table.from_arrays(columns, schema=_PART_SCHEMA)
    with folder.writing(f"parts/{name}") as stream:
        pq.write_table(
            table.replace_schema_metadata({key: str(value) for key, value in entry.items()}), stream
        )
    return entry, table


def _finished(
    folder: Folder, name: str, planned: Plan, rows: IntArray
) -> tuple[dict[str, Any], pa.Table] | None:
    """A shard that is written, unless a photograph that it lacks is there by now."""
    try:
        with folder.reading(f"parts/{name}") as stream:
            table = pq.read_table(stream)
        said = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        entry: dict[str, Any] = {**said, "bytes": int(said["bytes"]), "rows": int(said["rows"])}
        check_file(folder, entry, content=False)
    except (ArtefactError, pa.ArrowInvalid):
        return None
    lacking = planned.paths(rows[np.asarray(table["problem"].is_valid())])
    if any(_read(os.path.join(planned.source, path))[1] is None for path in lacking):
        return None
    return entry, table.replace_schema_metadata()


def _fetched_by(source: str) -> str:
    """What to do where a collection has no photographs."""
    return f"`{command('gldv2', 'download', source, '--tars', '0-499')}` fetches them"


def _read(path: str) -> tuple[bytes, str | None]:
    """The bytes of a photograph and nothing; or nothing, and why it cannot be used."""
    if not os.path.exists(path):
        return b"", "missing"
    try:
        data = location.read_bytes(path, MAX_BYTES)
        decode(data, target=1)  # a JPEG at an eighth of its size, which reads the whole file all the same
    except DataError as error:
        return b"", error.problem
    return data, None


def _group(planned: Plan, rows: IntArray, paths: list[str], data: list[bytes]) -> pa.Table:
    """A row group of the photographs that there are."""
    there = np.array([len(one) > 0 for one in data], dtype=np.bool_)
    kept = rows[there]
    images = pa.StructArray.from_arrays(
        [
            pa.array([one for one in data if one], pa.large_binary()),
            pa.array([path for path, found in zip(paths, there, strict=True) if found], pa.string()),
        ],
        fields=list(IMAGE_TYPE),
    )
    ids = pa.array(planned.ids[kept].astype(str), pa.string())
    return pa.Table.from_arrays([ids, pa.array(planned.labels[kept]), images], schema=shards.SCHEMA)


def _describe(
    folder: Folder,
    planned: Plan,
    parts: dict[str, list[tuple[dict[str, Any], pa.Table]]],
) -> dict[str, Any]:
    """Write all that tells of the shards, the description last."""
    tables = {
        part: pa.concat_tables([table for _, table in made] or [_PART_SCHEMA.empty_table()])
        for part, made in parts.items()
    }
    missing = pa.concat_tables([table.filter(table["problem"].is_valid()) for table in tables.values()])
    if len(missing) == len(planned.ids):
        raise DataError(
            f"none of the {len(missing):,} photographs is there, the first looked for is "
            f"{planned.paths(np.arange(1))[0]}",
            where=planned.source,
            mend=_fetched_by(planned.source),
        )
    for part, table in tables.items():
        _write_listing(folder, f"{part}.parquet", table.filter(table["address"].is_valid()))
    _write_classes(folder, planned)
    old = pa.array(planned.landmarks).take(missing["label"].combine_chunks())
    _write_csv(folder, "missing.csv", {"id": missing["id"], "landmark_id": old, "reason": missing["problem"]})
    files = [*(f"{part}.parquet" for part in PARTS), "classes.parquet", "relabeling.csv", "missing.csv"]
    body = {
        "origin": planned.origin,
        "classes": len(planned.landmarks),
        "images": len(planned.ids) - len(missing),
        "missing": len(missing),
        "repeated": planned.repeated,
        "parts": {
            part: {
                "images": sum(entry["rows"] for entry, _ in made),
                "classes": len(pc.unique(tables[part].filter(tables[part]["address"].is_valid())["label"])),
                "shards": [entry for entry, _ in made],
            }
            for part, made in parts.items()
        },
        "files": [file_entry(folder, name) for name in files],
    }
    write_description(folder, DESCRIPTION, kind=KIND, version=VERSION, body=body)
    return body


def _write_listing(folder: Folder, name: str, table: pa.Table) -> None:
    """Id, label and address of the images of a part, as a Parquet file that any verb takes for images."""
    address = table["address"].combine_chunks()
    images = images_at(address)
    with folder.writing(name) as stream:
        pq.write_table(pa.table({"id": table["id"], "label": table["label"], "image": images}), stream)


def _write_classes(folder: Folder, planned: Plan) -> None:
    new, old = pa.array(np.arange(len(planned.names))), pa.array(planned.landmarks)
    with folder.writing("classes.parquet") as stream:
        pq.write_table(pa.table({"label": new, "landmark_id": old, "name": pa.array(planned.names)}), stream)
    _write_csv(folder, "relabeling.csv", {"new_label": new, "old_label": old})


def _write_csv(folder: Folder, name: str, columns: dict[str, Any]) -> None:
    # Unquoted headings, as the port writes them: pyarrow would quote them like any text.
    with folder.writing(name) as stream:
        stream.write((",".join(columns) + "\n").encode())
        options = pyarrow.csv.WriteOptions(include_header=False)
        pyarrow.csv.write_csv(pa.table(columns), stream, options)
