"""The images that a run is trained on, each looked at once; those that cannot be decoded are left out."""

from dataclasses import replace
from typing import Any

import numpy as np

from ray_retrieval.cores import cores
from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.data.source import check_images, read_errors, write_errors
from ray_retrieval.data.table import ImageTable
from ray_retrieval.errors import DataError
from ray_retrieval.progress import Display, counted
from ray_retrieval.storage import Folder, fingerprint

TRAINED_ON = ("train", "validation_queries", "validation_database")
"""The roles of a benchmark that a training looks at."""


def checked(run: Folder) -> str | None:
    """Fingerprint of the images that were looked at before; None before the first."""
    return run.read_json("data.json")["checked"] if run.exists("data.json") else None


def without_broken(
    benchmark: Benchmark, run: Folder, display: Display, *, settled: bool = False
) -> Benchmark:
    """The benchmark without the training and validation images that cannot be decoded.

    They are looked at once a run, whatever number of workers trains later; `errors/` lists the broken ones.

    Args:
        benchmark: with all images.
        run: the run's folder.
        display: where progress is shown.
        settled: whether something was trained without the broken ones, which then stay left out. Until then,
            those that are mended count.

    Raises:
        DataError: if none of a table's images can be decoded.
    """
    if benchmark.untrainable or benchmark.decoded:
        return benchmark  # they may be missing, and are not needed; or were looked at before
    tables = {role: getattr(benchmark, role) for role in TRAINED_ON}
    # One table may play several roles: its errors are found once, under the first of them.
    listed = {id(table): role for role, table in reversed(tables.items())}
    known = fingerprint([table.fingerprint for table in tables.values()])
    named = {role: tables[role] for role in listed.values()}
    if checked(run) != known:
        _check(named, run, display)
        run.write_json("data.json", {"checked": known})
    elif not settled:
        _look_again(named, run)
    kept: dict[str, Any] = {}
    whole: dict[int, ImageTable] = {}
    for role, table in tables.items():
        name = f"{listed[id(table)]}.parquet"
        errors = read_errors(run / "errors", name)
        if errors:
            display.say(
                f"note: {role}: {len(errors)} of {len(table)} images cannot be decoded and are left out"
                f" (first: {errors[0].id}: {errors[0].reason}); all are in {run}/errors/{name}"
            )
        # Roles that have the same table keep on having the same.
        if id(table) not in whole:
            whole[id(table)] = _without(table, {error.row for error in errors})
        kept[role] = whole[id(table)]
    return replace(benchmark, **kept)


def _check(tables: dict[str, ImageTable], run: Folder, display: Display) -> None:
    with display.task("check", sum(map(len, tables.values())), "images") as advance:
        for role, table in tables.items():
            errors = check_images(table, threads=cores(), progress=counted(advance))
            write_errors(run / "errors", errors, f"{role}.parquet")


def _look_again(tables: dict[str, ImageTable], run: Folder) -> None:
    """Take what can be decoded by now off the lists of broken images."""
    for role, table in tables.items():
        name = f"{role}.parquet"
        listed = read_errors(run / "errors", name)
        if listed:
            again = check_images(table.take(np.array([error.row for error in listed])), threads=cores())
            left = {error.row for error in again}
            write_errors(run / "errors", [listed[place] for place in sorted(left)], name)


def _without(table: ImageTable, broken: set[int]) -> ImageTable:
    if not broken:
        return table
    kept = np.setdiff1d(np.arange(len(table)), np.array(sorted(broken), np.int64))
    if not len(kept):
        raise DataError("none of the images can be decoded", where=table.name)
    return table.take(kept)
