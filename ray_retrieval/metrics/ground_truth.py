"""Ground truth of the Oxford and Paris benchmarks: lists of rows a query; `revisited` says what they mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from ray_retrieval.errors import MetricError
from ray_retrieval.metrics.positions import Wanted
from ray_retrieval.words import counted

__all__ = ["LISTS", "POSITIVE", "GroundTruth", "Lists", "Protocol"]

Protocol = Literal["revisited", "classic"]
Lists = Sequence[Mapping[str, Any]]
Ints = npt.NDArray[np.int64]

LISTS: dict[Protocol, tuple[str, ...]] = {"revisited": ("easy", "hard", "junk"), "classic": ("ok", "junk")}
"""The lists of a query."""

POSITIVE: dict[Protocol, dict[str, tuple[str, ...]]] = {
    "revisited": {"easy": ("easy",), "medium": ("easy", "hard"), "hard": ("hard",)},
    "classic": {"classic": ("ok",)},
}
"""Which of them are positive, by protocol; the others are ignored."""


@dataclass(frozen=True)
class GroundTruth:
    """Checked lists of rows for each query.

    Attributes:
        protocol: which lists there are.
        wanted: all rows that are listed.
        lists: int64 [w], for each of them its list: its place among those of the protocol.
    """

    protocol: Protocol
    wanted: Wanted
    lists: Ints

    @classmethod
    def of(cls, ground_truth: Lists, protocol: Protocol = "revisited") -> "GroundTruth":
        """From one mapping a query, as the benchmarks' files have it.

        Args:
            ground_truth: for each query the rows of the database, whole numbers, in the lists `easy`, `hard`
                and `junk`, or `ok` and `junk` for the classic protocol. Other keys are not looked at.
            protocol: which lists are read.

        Raises:
            MetricError: if there is no query, a list is missing or holds other than row numbers, or a row is
                in two lists of a query or twice in one.
        """
        if protocol not in get_args(Protocol):
            raise MetricError(
                f"unknown protocol {protocol!r}", mend=f"choose one of {', '.join(get_args(Protocol))}"
            )
        if len(ground_truth) == 0:
            raise MetricError("there is no query", where="ground_truth")
        rows, lists = [], []
        for query, given in enumerate(ground_truth):
            parts = [_list_of(given, name, query, protocol) for name in LISTS[protocol]]
            of_query = np.concatenate(parts)
            order = np.argsort(of_query, kind="stable")
            ascending = of_query[order]
            twice = ascending[1:][ascending[1:] == ascending[:-1]]
            if len(twice):
                raise MetricError(
                    f"row {twice[0]:,} is listed twice for query {query:,}",
                    where="ground_truth",
                    mend=f"name a row in one of {', '.join(LISTS[protocol])} only",
                )
            rows.append(ascending)
            lists.append(np.repeat(np.arange(len(parts)), [len(part) for part in parts])[order])
        return cls(protocol, Wanted.of(rows), np.concatenate(lists))

    def check_rows(self, rows: int) -> None:
        """Look whether a database of so many rows has all that are listed.

        Raises:
            MetricError: if it has not.
        """
        last = int(self.wanted.rows.max(initial=-1))
        if last >= rows:
            raise MetricError(
                f"row {last:,} is listed, but the database has {counted(rows, 'row')}",
                where="ground_truth",
                mend="give the ground truth of this database, whose rows are in the benchmark's order",
            )


def _list_of(given: Mapping[str, Any], name: str, query: int, protocol: Protocol) -> Ints:
    if name not in given:
        other = next((key for key in LISTS if all(list_ in given for list_ in LISTS[key])), None)
        raise MetricError(
            f"query {query:,} has no list {name!r}, which the {protocol} protocol needs",
            where="ground_truth",
            mend=f"use protocol={other!r}" if other else f"give {', '.join(LISTS[protocol])}",
        )
    rows = np.asarray(given[name])
    if rows.size == 0 and rows.ndim == 1:
        return np.zeros(0, np.int64)
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or rows.min() < 0:
        raise MetricError(
            f"list {name!r} of query {query:,} holds row numbers from 0, got {rows.dtype} "
            f"{list(rows.shape)}" + (f" with {rows.min()}" if rows.dtype.kind == "i" else ""),
            where="ground_truth",
        )
    return rows.astype(np.int64)
