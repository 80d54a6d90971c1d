"""Which rows of a table play which role: drawn once, saved with a checksum, read ever after.

A draw depends on the seed and the labels alone: never on a global generator, on the order of the calls, or
on the version of a library. One uniform number a row (Philox, `random()`) ranks the rows of each class; the
parts of the plan take their shares of that ranking one after another. Where whole classes are drawn
(`draw_groups`), there is one number a class instead.
"""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ray_retrieval.data.table import ImageTable, IntArray
from ray_retrieval.errors import DataError
from ray_retrieval.storage import Folder, check_file, digest, read_description, write_description

_DESCRIPTION, _ROWS = "split.json", "split.parquet"
_KIND, _VERSION = "split", 1
REST = "rest"
"""The role of the rows that no part of a plan took."""


@dataclass(frozen=True)
class SplitPlan:
    """How many rows of each class go where.

    Attributes:
        parts: role → how many: an int is that many of every class; a float is that share of each class,
            rounded, but at least one. Rows with several labels (multi-hot) have no class to balance: there an
            int is the number in all, and a float the share of all.
        seed: of the draw.
        keep: rows of each class that must be left over for the role "rest".
        most: classes that a share is taken of: where there are more, it is one row each of so many classes,
            which are drawn. Every class must have enough rows all the same.
    """

    parts: Mapping[str, int | float]
    seed: int
    keep: int = 0
    most: int | None = None


@dataclass(frozen=True)
class Split:
    """Roles and their rows.

    Attributes:
        roles: role → int64 rows. Roles may overlap: the training rows can be part of the database.
        origin: what the split was drawn by (a protocol, its numbers, the seed), for the record.
    """

    roles: dict[str, IntArray]
    origin: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def draw(
        labels: npt.NDArray[Any],
        plan: SplitPlan,
        *,
        class_names: list[str] | None = None,
        where: str | None = None,
    ) -> "Split":
        """Disjoint roles as planned, and "rest" with all other rows; the rows of a role ascend.

        Args:
            labels: int64 [n] or bool multi-hot [n, classes].
            plan: what to draw.
            class_names: for the error.
            where: the table's name, for the error.

        Raises:
            DataError: naming the class, its count and what is needed, if a class has too few rows.
        """
        several = labels.ndim == 2
        # By rank: a label may be a number of any size, such as that of an article.
        present, groups = np.unique(
            np.zeros(len(labels), np.int64) if several else labels, return_inverse=True
        )
        counts = np.bincount(groups, minlength=1)
        wanted = {role: _shares(share, counts) for role, share in plan.parts.items()}
        named = [f"'{class_names[label]}'" if class_names else str(label) for label in present.tolist()]
        _refuse_short(counts, wanted, plan.keep, named=None if several else named, where=where)
        for number, (role, part) in enumerate(plan.parts.items()):
            if isinstance(part, float) and plan.most is not None:
                wanted[role] = _of_some_classes(wanted[role], plan.most, [plan.seed, number])
        rank = ranked(groups, plan.seed)
        roles, taken = {}, np.zeros(len(counts), dtype=np.int64)
        for role, share in wanted.items():
            roles[role] = np.flatnonzero((rank >= taken[groups]) & (rank < (taken + share)[groups]))
            taken = taken + share
        roles[REST] = np.flatnonzero(rank >= taken[groups])
        return Split(roles, {"seed": plan.seed, "parts": dict(plan.parts)})

    def save(self, folder: Folder, table: ImageTable) -> None:
        """Write split.parquet (role, row, id) and, last, split.json (checksum, the table's fingerprint)."""
        roles = list(self.roles)
        rows = np.concatenate([np.zeros(0, dtype=np.int64), *self.roles.values()])
        number = np.repeat(np.arange(len(roles), dtype=np.int32), [len(self.roles[role]) for role in roles])
        ids = pa.array(table.ids).take(pa.array(rows))
        column = pa.DictionaryArray.from_arrays(pa.array(number, pa.int32()), pa.array(roles, pa.string()))
        buffer = io.BytesIO()
        pq.write_table(pa.table({"role": column, "row": rows, "id": ids}), buffer)
        data = buffer.getvalue()
        folder.write_bytes(_ROWS, data)
        body = {
            "origin": self.origin,
            "table": {"rows": len(table), "fingerprint": table.row_fingerprint},
            "roles": {role: len(rows) for role, rows in self.roles.items()},
            "file": {"file": _ROWS, "bytes": len(data), "sha256": digest(data)},
        }
        write_description(folder, _DESCRIPTION, kind=_KIND, version=_VERSION, body=body)

    @staticmethod
    def saved(folder: Folder) -> bool:
        """Whether a complete split lies in the folder."""
        return folder.exists(_DESCRIPTION)

    @staticmethod
    def load(folder: Folder, table: ImageTable) -> "Split":
        """The split that `save` wrote.

        Raises:
            ArtefactError: if a file is missing, damaged, or of a later version.
            DataError: if the split belongs to another table, or names rows that it does not have.
        """
        body = read_description(folder, _DESCRIPTION, kind=_KIND, version=_VERSION)
        check_file(folder, body["file"], content=True)
        where = folder.uri_of(_DESCRIPTION)
        drawn = body["table"]
        if drawn["rows"] != len(table) or drawn["fingerprint"] != table.row_fingerprint:
            raise DataError(
                f"the split is of a table of {drawn['rows']} rows ({drawn['fingerprint']}), {table.name} has "
                f"{len(table)} ({table.row_fingerprint}): ids, labels or their order have changed",
                where=where,
                mend="bring the images back as they were, or remove the split to draw a new one",
            )
        with folder.reading(body["file"]["file"]) as source:
            found = pq.read_table(source)
        names, rows = found["role"].cast(pa.string()).to_numpy(), found["row"].to_numpy()
        if len(rows) and (rows.min() < 0 or rows.max() >= len(table)):
            raise DataError(f"the split names rows outside 0…{len(table) - 1}", where=where)
        roles = {role: rows[names == role].astype(np.int64) for role in body["roles"]}
        for role, count in body["roles"].items():
            if len(roles[role]) != count:
                raise DataError(f"{role} has {len(roles[role])} rows, {count} are recorded", where=where)
        return Split(roles, body["origin"])


def load_or_draw(
    folder: Folder,
    table: ImageTable,
    draw: Callable[[int], dict[str, IntArray]],
    *,
    seed: int,
    origin: dict[str, Any],
) -> tuple[Split, list[str]]:
    """The saved split of a folder, or else a new one, which is saved there.

    Args:
        folder: where the split lies or will lie.
        table: the images.
        draw: a function of the seed that returns the roles.
        seed: of a new draw. A saved split counts whatever the seed: the second value then says so.
        origin: what the draw follows; a saved split must have been drawn by the same.

    Returns:
        The split, and notes for the record.

    Raises:
        DataError: if the saved split was drawn otherwise, or belongs to another table.
        ArtefactError: if it is damaged.
    """
    if not Split.saved(folder):
        split = Split(draw(seed), {**origin, "seed": seed})
        split.save(folder, table)
        return split, []
    split = Split.load(folder, table)
    for key in sorted({*origin, *split.origin} - {"seed"}):
        if split.origin.get(key) != origin.get(key):
            raise DataError(
                f"the saved split was drawn with {key} = {split.origin.get(key)}, asked is {origin.get(key)}",
                where=folder.uri_of(_DESCRIPTION),
                mend="ask for the same, or use another folder",
            )
    drawn = split.origin.get("seed")
    return split, [] if drawn == seed else [
        f"the split is the saved one, drawn with seed {drawn}, not {seed}"
    ]


def ranked(groups: IntArray, seed: int) -> IntArray:
    """int64 [n]: the place of each row, from 0, among those of its group in an order that is drawn.

    Args:
        groups: int64 [n], from 0: the group of each row.
        seed: of the draw.
    """
    uniform = np.random.Generator(np.random.Philox(seed)).random(len(groups))
    # Two stable sorts: by group, and within it by the uniform number; equal numbers stay in row order.
    order = np.argsort(uniform, kind="stable")
    order = order[np.argsort(groups[order], kind="stable")]
    counts = np.bincount(groups, minlength=1)
    starts = np.cumsum(counts) - counts
    rank = np.empty(len(groups), dtype=np.int64)
    rank[order] = np.arange(len(groups)) - starts[groups[order]]
    return rank


def draw_groups(groups: npt.NDArray[Any], counts: Mapping[str, int], seed: int) -> dict[str, IntArray]:
    """Whole groups of rows (classes, say) for one role after another; what no role took is "rest".

    A role's groups depend on the counts of the roles before it, not on those after it.

    Args:
        groups: [n], integers or text: the group of each row.
        counts: role → how many groups.
        seed: of the draw.

    Returns:
        Role → int64 rows, ascending.

    Raises:
        DataError: if there are fewer groups than are asked for.
    """
    names, number = np.unique(groups, return_inverse=True)
    if sum(counts.values()) > len(names):
        asked = ", ".join(f"{count} {role.replace('_', ' ')}" for role, count in counts.items())
        raise DataError(f"{sum(counts.values())} groups are needed ({asked}), there are {len(names)}")
    uniform = np.random.Generator(np.random.Philox(seed)).random(len(names))
    rank = np.empty(len(names), dtype=np.int64)
    rank[np.argsort(uniform, kind="stable")] = np.arange(len(names))
    ends = np.cumsum([0, *counts.values()])
    place = rank[number]
    roles = {
        role: np.flatnonzero((place >= start) & (place < end))
        for role, start, end in zip(counts, ends[:-1], ends[1:], strict=True)
    }
    return {**roles, REST: np.flatnonzero(place >= ends[-1])}


def draw_one_each(groups: npt.NDArray[Any], seed: int, number: int) -> IntArray:
    """One row of each group by chance: int64, ascending.

    Args:
        groups: [n], integers or text: the group of each row.
        seed: of the draws.
        number: of the draw among those of the same seed.
    """
    uniform = np.random.Generator(np.random.Philox([seed, number])).random(len(groups))
    order = np.lexsort((uniform, groups))
    _, first = np.unique(np.asarray(groups)[order], return_index=True)
    return np.sort(order[first])


def share_of(total: int, share: float, *, least: int) -> int:
    """A share of a number, rounded, but `least` at the least; 0 for a share of 0."""
    return max(least, int(np.floor(share * total + 0.5))) if share > 0 else 0


def held_groups(
    total: int, test: float, validation: float, *, least: int, kind: str, where: object, mend: str
) -> dict[str, int]:
    """How many of all groups are held out, for `draw_groups`: those to test on, then those to validate on.

    Args:
        total: groups there are.
        test: share of them to test on.
        validation: share of the others to validate on; 0 for none, whose role is then left out.
        least: groups of each role, and of those that remain to train on.
        kind: what the groups are, for errors.
        where: of which data, for errors.
        mend: what to ask for instead, for errors.

    Raises:
        DataError: if too few remain.
    """
    tested = share_of(total, test, least=least)
    validated = share_of(total - tested, validation, least=least)
    if total - tested - validated < least:
        raise DataError(
            f"there are {total} {kind}, {tested + validated + least} are needed: {tested} to test on, "
            f"{validated} to validate on, {least} to train on",
            where=where,
            mend=mend,
        )
    return {"test": tested, **({"validation": validated} if validated else {})}


def _shares(share: int | float, counts: IntArray) -> IntArray:
    """int64 [classes]: how many rows of each class a part takes; none of a class that has no row."""
    if isinstance(share, int):
        return np.where(counts > 0, share, 0)
    rounded = np.floor(share * counts + 0.5).astype(np.int64)
    return np.where(counts > 0, np.maximum(rounded, 1 if share > 0 else 0), 0)


def _of_some_classes(shares: IntArray, most: int, seed: list[int]) -> IntArray:
    """The shares [classes], or one row each of `most` of the classes where more than that give any."""
    giving = np.flatnonzero(shares)
    if len(giving) <= most:
        return shares
    uniform = np.random.Generator(np.random.Philox(seed)).random(len(giving))
    drawn = np.zeros_like(shares)
    drawn[giving[np.argsort(uniform, kind="stable")[:most]]] = 1
    return drawn


def _refuse_short(
    counts: IntArray, wanted: Mapping[str, IntArray], keep: int, *, named: list[str] | None, where: str | None
) -> None:
    """Refuse classes of too few rows; `named` are those of `counts`, None where there are no classes."""
    needed = sum(wanted.values(), np.where(counts > 0, keep, 0))
    short = np.flatnonzero(counts < needed)
    if not len(short):
        return
    first = int(short[0])
    subject = "the table" if named is None else f"class {named[first]}"
    shares = [f"{share[first]} {role.replace('_', ' ')}" for role, share in wanted.items() if share[first]]
    detail = ", ".join([*shares, f"{keep} to remain"] if keep else shares)
    others = f"; {len(short) - 1} other classes are short too" if len(short) > 1 else ""
    raise DataError(
        f"{subject} has {counts[first]} images, {needed[first]} are needed ({detail}){others}",
        where=where,
        mend="add images, ask for fewer queries, or leave the class out",
    )
