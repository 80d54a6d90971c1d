"""What an opened index is, and whether it is what was recorded when it was made."""

from typing import Any

import numpy as np

from ray_retrieval.errors import ArtefactError
from ray_retrieval.search.deletes import read_deletes
from ray_retrieval.search.hits import NO_ROW
from ray_retrieval.search.index import Index
from ray_retrieval.search.manifest import CURRENT, Manifest, SelfTest, backwards, read_current
from ray_retrieval.search.shard import IMAGES, ROWS
from ray_retrieval.search.structure_sizes import private_bytes
from ray_retrieval.storage import check_file

_SAME_SCORE = 1e-4
_KIND_OF = {ROWS: "known_bytes", IMAGES: "image_bytes"}


def check(index: Index) -> list[str]:
    """What was checked of a version, one line each; see `Index.verify`.

    Raises:
        ArtefactError: naming the first file that is missing, damaged or inconsistent.
    """
    manifest, folder = index.manifest, index.folder
    current = read_current(folder)
    checks = [f"{CURRENT} names {current.name}, and its checksum agrees"]
    earlier = len(list(backwards(folder, current))) - 1
    if earlier:
        checks.append(f"{earlier} earlier versions, and the checksums of their manifests agree")
    _check_ranges(index)
    checks.append(f"{len(manifest.shards)} shards hold rows 0 to {manifest.next_row - 1} without gaps")
    for shard in index.shards.values():
        shard.check_files(content=True)
        shard.check_rows()
        files, size = len(shard.entry.files), shard.entry.bytes
        checks.append(f"{shard.entry.folder}: {files} files, {size:,} bytes, checksums agree")
    for entry in manifest.files:
        check_file(folder, entry.model_dump(), content=True)
        checks.append(f"{entry.file}: {entry.bytes:,} bytes, checksum agrees")
    if manifest.deletes is not None:
        read_deletes(folder, manifest, content=True)
        checks.append(f"{manifest.deletes.file}: {manifest.deleted:,} deleted rows, checksum agrees")
    if index.shortlist is not None and len(index.shards) < len(manifest.shards):
        checks.append("test queries are left out: what is nearest is known only with all shards open")
        return checks
    check_hits(index)
    checks.append(f"{len(manifest.self_test)} test queries find what they found when it was built")
    return checks


def check_hits(index: Index) -> None:
    """Search for the test queries of a version; those of local features need all its shards open.

    Raises:
        ArtefactError: if one does not find what it found when the version was made.
    """
    manifest = index.manifest
    if index.shortlist is not None and len(index.shards) < len(manifest.shards):
        return
    agrees = _finds_again if index.shortlist is None else _makes_again
    for number, test in enumerate(manifest.self_test):
        if not agrees(index, test):
            raise ArtefactError(
                f"test query {number} does not find what it found when the index was built",
                where=index.folder.uri_of(manifest.name),
                mend="build the index anew",
            )


def describe(index: Index) -> dict[str, Any]:
    """What an index is, as plain values; see `Index.info`."""
    manifest = index.manifest
    return {
        "folder": str(index.folder),
        "version": manifest.number,
        "parent": manifest.parent,
        "operation": manifest.operation,
        **manifest.form.as_json(),
        "search": manifest.search,
        **({} if manifest.why is None else {"why": manifest.why}),
        **({} if manifest.approximate is None else manifest.approximate.info()),
        **({} if manifest.local is None else manifest.local.info()),
        "rows": manifest.rows,
        **({"deleted": manifest.deleted} if manifest.deleted else {}),
        **({} if manifest.local is None else _features_in_all(manifest)),
        "shards": len(manifest.shards),
        "bytes": manifest.bytes,
        **_memory(manifest),
        "columns": index.schema.names,
        "classes": None if manifest.class_names is None else len(manifest.class_names),
        "model": manifest.model,
        **({"engines": list(manifest.engines)} if manifest.engines else {}),
        "embeddings": manifest.embeddings,
    }


def _memory(manifest: Manifest) -> dict[str, Any]:
    """Bytes of each kind of file, and memory that a process needs to have the index open."""
    kinds = {"descriptor_bytes": 0, "known_bytes": 0, "image_bytes": 0}
    for shard in manifest.shards:
        for file in shard.files:
            kinds[_KIND_OF.get(file.file, "descriptor_bytes")] += file.bytes
    beside = sum(file.bytes for file in manifest.beside if file is not None)
    private = _private(manifest, beside)
    searched = kinds["descriptor_bytes"] + beside
    return {
        **kinds,
        "structure_bytes": beside,
        "private_bytes": private,
        "searched_bytes_per_row": round(searched / max(1, manifest.next_row), 2),
    }


def _private(manifest: Manifest, beside: int) -> int | None:
    """Of what lies beside the shards, and of removed rows; None if FAISS's kind is not known."""
    removed = 8 * manifest.deleted
    shards = sum(file is not None for file in manifest.beside)
    built = manifest.approximate or manifest.local
    if built is None or built.factory is None:
        return removed
    rows = sum(
        shard.features or shard.rows
        for shard, file in zip(manifest.shards, manifest.beside, strict=True)
        if file is not None
    )
    held = private_bytes(built.factory, beside, rows, manifest.form.size, shards)
    return None if held is None else held + removed


def _features_in_all(manifest: Manifest) -> dict[str, Any]:
    features, rows = sum(shard.features for shard in manifest.shards), max(1, manifest.next_row)
    return {
        "features": features,
        "features_per_image": features / rows,
        "bytes_per_image": manifest.bytes / rows,
    }


def _check_ranges(index: Index) -> None:
    manifest: Manifest = index.manifest
    expected = 0
    for entry in manifest.shards:
        if entry.first_row != expected:
            break
        expected += entry.rows
    if expected != manifest.next_row:
        raise ArtefactError(
            "damaged: its shards do not cover its rows", where=index.folder.uri_of(manifest.name)
        )


def _finds_again(index: Index, test: SelfTest) -> bool:
    """Whether the opened shards find the recorded hits that lie in them."""
    like = index.form.zeros(0).data
    query = np.frombuffer(bytes.fromhex(test.query), like.dtype).reshape(1, -1)
    found = index.search(index.form.with_rows(query), len(test.rows), exact=True)
    hits = [hit for hit in zip(found.distances[0], found.rows[0], strict=True) if hit[1] != NO_ROW]
    entries = [shard.entry for shard in index.shards.values()]
    opened = [range(entry.first_row, entry.first_row + entry.rows) for entry in entries]
    recorded = list(zip(test.distances, test.rows, strict=True))
    expected = [hit for hit in recorded if any(hit[1] in rows for rows in opened)]
    # Some shards alone find more than their part of the hits; those come after the recorded ones.
    return hits[: len(expected)] == expected and not any(hit < recorded[-1] for hit in hits[len(expected) :])


def _makes_again(index: Index, test: SelfTest) -> bool:
    """Whether a row's shortlist is the recorded one.

    Its scores come of matrix products, whose last digits differ between machines: so may the order of images
    with the same score.
    """
    found = index.search(index.descriptors([int(test.query)]), max(1, len(test.rows)))
    real = found.rows[0] != NO_ROW
    now = dict(zip(found.rows[0, real].tolist(), found.distances[0, real].tolist(), strict=True))
    then = dict(zip(test.rows, test.distances, strict=True))
    last = max(then.values(), default=0.0)  # Images that score as the last one may change places with it.
    return all(
        abs(then.get(row, last) - now.get(row, last)) <= _SAME_SCORE for row in now.keys() | then.keys()
    )
