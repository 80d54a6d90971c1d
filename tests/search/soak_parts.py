"""An index and a model of it in plain Python that go through the same changes, one after another.

The machine here is run for seconds by the tests and for half an hour by `benchmarks/index_soak.py`.
"""

import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from search_parts import (
    IMAGE,
    KilledError,
    assert_same,
    draw_codes,
    draw_local,
    draw_vectors,
    files_in,
    write,
)

from ray_retrieval.descriptors import Codes, Local, Vectors, concatenate
from ray_retrieval.errors import ArtefactError, DataError, QueryError
from ray_retrieval.search import Index, add, build, compact, prune, remove, rollback, versions
from ray_retrieval.search.approximate import ApproximateConfig
from ray_retrieval.search.hits import NO_ROW
from ray_retrieval.search.neighbours import FeatureSegment
from ray_retrieval.search.votes import LocalSearchConfig, search_votes
from ray_retrieval.storage import Folder

NAMES = ["cat", "dog", "fox"]
BITS, DIMENSION = 10, 4
KINDS = ("codes", "cells", "vectors", "approximate", "local")
VOTES = LocalSearchConfig(shortlist="exact", neighbours=8)
STRUCTURES = {
    "approximate": ApproximateConfig(search="IVF2,SQ8", nprobe=1, recall_queries=5),
    "cells": ApproximateConfig(search="BIVF2", nprobe=1, recall_queries=5),
}


@dataclass(frozen=True)
class Row:
    """What is known of a row, and its descriptor as a set of one."""

    id: str
    label: int | None
    price: float | None
    image: bytes
    descriptor: Codes | Vectors | Local


FILTERS = {
    "label = dog": lambda row: row.label == 1,
    "label in (cat, 2) and price < 5": lambda row: (
        row.label in (0, 2) and row.price is not None and row.price < 5
    ),
    "not label = fox": lambda row: row.label in (0, 1),
    "price is null or price >= 7": lambda row: row.price is None or row.price >= 7,
    "id >= 'id-05' and id != 'id-08'": lambda row: row.id >= "id-05" and row.id != "id-08",
    "price = -1": lambda row: False,
}


def drawn(kind, count, seed):
    if kind in ("codes", "cells"):
        return draw_codes(count, BITS, seed=seed, distinct=max(1, count // 2))
    if kind == "local":
        return draw_local(count, DIMENSION, seed=seed, most=5)
    return draw_vectors(count, DIMENSION, seed=seed, distinct=max(1, (2 * count) // 3))


def rows_of(kind, ids, seed):
    generator, descriptors = np.random.default_rng(seed), drawn(kind, len(ids), seed)
    return [
        Row(
            name,
            None if generator.random() < 0.1 else int(generator.integers(0, 3)),
            None if generator.random() < 0.2 else float(generator.integers(0, 10)),
            b"image %d of %d" % (place, seed),
            descriptors.take(np.array([place])),
        )
        for place, name in enumerate(ids)
    ]


def embedded(folder, rows):
    """Rows as an embeddings directory."""
    images = pa.table(
        {
            "id": pa.array([row.id for row in rows], pa.string()),
            "image": pa.array([{"bytes": row.image, "path": None} for row in rows], IMAGE),
            "label": pa.array([row.label for row in rows], pa.int64()),
            "price": pa.array([row.price for row in rows], pa.float64()),
        }
    )
    shutil.rmtree(folder, ignore_errors=True)
    descriptors = concatenate([row.descriptor for row in rows])
    return write(folder, descriptors, images, part_rows=7, class_names=NAMES)


def searched(kind, rows, queries, k):
    """The hits of some of the rows, as a list of (distance, place) for each query; the oracle."""
    if kind == "local":
        if not rows:
            return [[] for _ in range(len(queries))]
        sets = concatenate([row.descriptor for row in rows])
        hits = search_votes(
            [FeatureSegment(sets.offsets, sets.data, 0, 0)], queries, k, VOTES, images=len(rows)
        )
        pairs = zip(hits.distances, hits.rows, strict=True)
        return [[(float(d), int(r)) for d, r in zip(*pair, strict=True) if r != NO_ROW] for pair in pairs]
    found = []
    for query in queries.data:
        near = [(distance(kind, query, row.descriptor.data[0]), place) for place, row in enumerate(rows)]
        found.append(sorted(near)[:k])
    return found


def distance(kind, query, row):
    if kind in ("codes", "cells"):
        return float(np.unpackbits(query ^ row).sum())
    return float(np.float32(((query.astype(np.float64) - row) ** 2).sum()))


class killed_at:  # noqa: N801
    """Within the block, the process dies at its step `number` of those that change the store."""

    def __init__(self, number):
        self.left, self._patch = number, pytest.MonkeyPatch()

    def __enter__(self):
        writing, removing = Folder.writing, Folder.remove

        def step():
            self.left -= 1
            if self.left == 0:
                raise KilledError

        def write_or_die(folder, name):
            if self.left == 1 and Path(folder.path).is_dir():
                (Path(folder.path) / f"{Path(name).name}.tmp-dead00000000").write_bytes(b"half")
            step()
            return writing(folder, name)

        def remove_or_die(folder, name=""):
            step()
            removing(folder, name)

        self._patch.setattr(Folder, "writing", write_or_die)
        self._patch.setattr(Folder, "remove", remove_or_die)
        return self

    def __exit__(self, *_):
        self._patch.undo()


def survives_kills(start, act, expected, queries, keep):
    """Wherever a change is killed, the version before stays, and the same again gives the expected files."""
    hits, version = Index.open(start).search(queries, 20), Index.open(start).version
    for number in range(1, 100):
        index = shutil.copytree(start, start.parent / f"killed-{number}")
        try:
            with killed_at(number):
                act(index)
            break
        except KilledError:
            pass
        opened = Index.open(index)
        if opened.version == version:
            assert_same(opened.search(queries, 20), hits)
            act(index)
        else:
            # Published: what is left to do is to delete what is no longer needed.
            assert opened.version == version + 1
        assert Index.open(index).verify()
        prune(index, keep)
        assert files_in(index) == expected
        shutil.rmtree(index)
    assert number >= 3


class IndexSoak(RuleBasedStateMachine):
    """Random changes, kills and searches; after each step the index is what the model says."""

    counted: ClassVar[Counter[str]] = Counter()
    """What was done so far, by all machines of the process."""

    def __init__(self):
        super().__init__()
        self.place = Path(tempfile.mkdtemp(prefix="soak-"))
        self.index, self.seed, self.next_id = self.place / "index", 0, 0

    def teardown(self):
        shutil.rmtree(self.place, ignore_errors=True)

    def drawn(self, ids):
        self.seed += 1
        return rows_of(self.kind, ids, self.seed)

    def new_ids(self, count):
        self.next_id += count
        return [f"id-{number:02d}" for number in range(self.next_id - count, self.next_id)]

    @property
    def living(self):
        return [row for row in self.rows if row is not None]

    def done(self, rows):
        """The model has a new version."""
        self.rows = rows
        self.history.append((self.history[-1][0] + 1, rows))

    @initialize(kind=st.sampled_from(KINDS), count=st.integers(4, 25), shards=st.integers(1, 3))
    def begin(self, kind, count, shards):
        self.kind, self.reader = kind, None
        self.rows = self.drawn(self.new_ids(count))
        self.history = [(1, self.rows)]
        source = embedded(self.place / "embeddings", self.rows)
        build(source, self.index, shards=shards, approximate=STRUCTURES.get(kind), local=VOTES)

    # Changes: each is what to do, and what the rows are then.

    def adding(self, data):
        fresh = self.drawn(self.new_ids(data.draw(st.integers(1, 9), label="new rows")))
        source = embedded(self.place / "more", fresh)
        shards = data.draw(st.integers(1, 2), label="shards")
        return lambda: add(self.index, source, shards=shards), [*self.rows, *fresh]

    def replacing(self, data):
        ids = [row.id for row in self.living]
        some = data.draw(st.lists(st.sampled_from(ids), min_size=1, max_size=4, unique=True), label="ids")
        fresh = self.drawn([*some, *self.new_ids(1)])
        source = embedded(self.place / "more", fresh)
        kept = [None if row is not None and row.id in some else row for row in self.rows]
        return lambda: add(self.index, source, replace=True), [*kept, *fresh]

    def removing(self, data):
        ids = [row.id for row in self.living][1:]
        some = data.draw(st.lists(st.sampled_from(ids), min_size=1, max_size=6, unique=True), label="ids")
        kept = [None if row is not None and row.id in some else row for row in self.rows]
        return lambda: remove(self.index, some), kept

    def compacting(self, data):
        shards = data.draw(st.integers(1, 3), label="shards")
        return lambda: compact(self.index, shards=shards), self.living

    def rolling_back(self, data):
        kept = versions(self.index)[1:]
        number = data.draw(st.sampled_from([found["version"] for found in kept]), label="version")
        return lambda: rollback(self.index, number), dict(self.history)[number]

    def changing(self, data):
        kinds = [self.adding, self.replacing, self.compacting]
        kinds += [self.removing] if len(self.living) > 1 else []
        kinds += [self.rolling_back] if len(versions(self.index)) > 1 else []
        chosen = data.draw(st.sampled_from(kinds), label="change")
        self.counted[chosen.__name__] += 1
        return chosen(data)

    @rule(data=st.data())
    def change(self, data):
        act, rows = self.changing(data)
        made = act()
        if made.changed:
            self.done(rows)
        assert rows == self.rows

    @rule(data=st.data(), number=st.integers(1, 16))
    def change_and_die(self, data, number):
        """Killed anywhere, the old version is as it was, and the same again succeeds."""
        act, rows = self.changing(data)
        try:
            with killed_at(number):
                act()
        except KilledError:
            self.counted["killed"] += 1
            if Index.open(self.index).version == self.history[-1][0]:
                self.agrees()
                act()
            prune(self.index, keep=9)
        if Index.open(self.index).version != self.history[-1][0]:
            self.done(rows)
        assert rows == self.rows

    @rule(keep=st.integers(1, 3), number=st.integers(1, 12))
    def prune(self, keep, number):
        try:
            with killed_at(number):
                prune(self.index, keep)
        except KilledError:
            self.counted["killed_pruning"] += 1
            self.agrees()
            prune(self.index, keep)
        there = [found["version"] for found in versions(self.index)]
        assert len(there) <= keep
        needed = {
            name for number in there for name, _ in Index.open(self.index, version=number).manifest.needed()
        }
        assert set(files_in(self.index)) == needed | {"CURRENT"}

    @rule(name=st.sampled_from(["living", "unknown"]))
    def refused(self, name):
        before = files_in(self.index)
        if name == "living":
            with pytest.raises(DataError, match="in the index already"):
                add(self.index, embedded(self.place / "more", self.drawn([self.living[0].id])))
        else:
            with pytest.raises(QueryError, match="no row"):
                remove(self.index, [self.living[0].id, "nobody"])
            with pytest.raises(ArtefactError, match="no version 99"):
                rollback(self.index, 9999)
        assert files_in(self.index) == before

    @rule()
    def keep_reading(self):
        self.reader = Index.open(self.index), self.rows

    @precondition(lambda self: self.reader is not None)
    @rule(seed=st.integers(0, 99))
    def read_on(self, seed):
        self.compare(*self.reader, drawn(self.kind, 2, seed), 5)

    @rule(seed=st.integers(0, 99), k=st.integers(1, 40), where=st.sampled_from([None, *FILTERS]))
    def search(self, seed, k, where):
        self.compare(Index.open(self.index, threads=2), self.rows, drawn(self.kind, 3, seed), k, where)

    @invariant()
    def agrees(self):
        opened = Index.open(self.index)
        self.counted["steps"] += 1
        assert opened.verify()
        numbers = [number for number, row in enumerate(self.rows) if row is not None]
        assert opened.living().tolist() == numbers
        assert (opened.rows, opened.manifest.next_row) == (len(numbers), len(self.rows))
        found = opened.records(numbers).select(["row", "id", "label", "price"]).to_pylist()
        assert found == [
            {"row": number, **{name: getattr(self.rows[number], name) for name in ("id", "label", "price")}}
            for number in numbers
        ]
        last = numbers[-1]
        assert opened.image_bytes(last) == self.rows[last].image
        assert opened.row_of(self.rows[last].id) == last
        self.compare(opened, self.rows, concatenate([self.rows[last].descriptor]), 4)

    def compare(self, opened, rows, queries, k, where=None):
        first = next(number for number, row in enumerate(rows) if row is not None)
        assert opened.image_bytes(first) == rows[first].image
        assert opened.records([first])["id"].to_pylist() == [rows[first].id]
        self.counted["searched" if where is None else "searched_with_a_filter"] += len(queries)
        passes = FILTERS[where] if where else lambda row: True
        numbers = [number for number, row in enumerate(rows) if row is not None and passes(row)]
        wanted = searched(self.kind, [rows[number] for number in numbers], queries, k)
        found = opened.search(queries, k, exact=True, where=where)
        for query, expected in enumerate(wanted):
            real = found.rows[query] != NO_ROW
            assert found.rows[query, real].tolist() == [numbers[place] for _, place in expected]
            np.testing.assert_allclose(
                found.distances[query, real], [far for far, _ in expected], rtol=1e-5, atol=1e-6
            )
            assert not real[len(expected) :].any()
        if self.kind in STRUCTURES:
            self.fair(opened.search(queries, k, where=where), rows, numbers, queries, k)

    def fair(self, found, rows, numbers, queries, k):
        """Approximate hits are as many as there can be, of rows that may be, at their distances, in order."""
        for query, data in enumerate(queries.data):
            hits = [
                hit for hit in zip(found.distances[query], found.rows[query], strict=True) if hit[1] != NO_ROW
            ]
            allowed = set(numbers)
            assert {row for _, row in hits} <= allowed
            assert hits == sorted(hits)
            if len(numbers) < len(rows):
                assert len(hits) == min(k, len(numbers))
            for far, row in hits:
                assert far == pytest.approx(distance(self.kind, data, rows[row].descriptor.data[0]), abs=1e-6)
