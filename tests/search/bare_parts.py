"""Rows of which nothing is known but their descriptors."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ray_retrieval.descriptors import Codes, Form
from ray_retrieval.search.building import build
from ray_retrieval.search.pool import Threads
from ray_retrieval.storage import fingerprint

MODEL = "made-elsewhere"


@dataclass
class Bare:
    """Rows without ids, or anything else: descriptors alone, and columns where some are given."""

    descriptors: object
    columns: pa.Table | None = None
    step: int = 7
    class_names: list[str] | None = None
    model: str = MODEL
    engines: tuple = ()
    where: str = "bare rows"
    next_id: int | None = None

    @property
    def form(self):
        return Form.of(self.descriptors)

    @property
    def schema(self):
        return pa.schema([]) if self.columns is None else self.columns.schema

    @property
    def fingerprint(self):
        return fingerprint([self.descriptors.data.tobytes().hex(), str(self.columns)])

    def __len__(self):
        return len(self.descriptors)

    def id_blocks(self):
        if "id" not in self.schema.names:
            return None
        return iter([self.columns["id"].cast(pa.large_string()).combine_chunks()])

    def tables(self, start, stop):
        for first in range(start, stop, self.step):
            rows = np.arange(first, min(first + self.step, stop))
            table = pa.table({}) if self.columns is None else self.columns.slice(first, len(rows))
            yield table, self.descriptors.take(rows)

    def holds_images(self, start, stop):
        return False

    def images(self, start, stop):
        return iter(())


@dataclass
class CodesFile:
    """Codes in a mapped file of packed rows: what a source of a billion looks like."""

    path: Path
    bits: int
    rows: int
    step: int = 1 << 18

    @property
    def form(self):
        return Form.of(Codes(np.zeros((1, self.bits // 8), np.uint8), self.bits))

    schema = pa.schema([])
    fingerprint = "codes-in-a-file"
    class_names, model, where, next_id, engines = None, MODEL, "a file", None, ()

    def id_blocks(self):
        return None

    def __len__(self):
        return self.rows

    def tables(self, start, stop):
        for first in range(start, stop, self.step):
            # Mapped anew for each piece: what was read of a mapping counts as the process's memory.
            data = np.memmap(self.path, np.uint8, "r", shape=(self.rows, self.bits // 8))
            yield pa.table({}), Codes(np.array(data[first : min(first + self.step, stop)]), self.bits)

    def holds_images(self, start, stop):
        return False

    def images(self, start, stop):
        return iter(())


def build_bare(source, out, *, shards=1, pool=None, **settings):
    return build(source, out, shards=shards, pool=pool or Threads(1), **settings)
