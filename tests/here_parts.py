"""Work of Ray's processes, done in this one: each of those loads everything first, which takes seconds."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from ray_retrieval import encode


@contextmanager
def encoding_in_this_process():
    """Within, images are encoded here, and no Ray is needed for it."""

    def run(jobs, items, config):
        work = [encode._Work(job.model.uri, job.out.uri) for job in jobs]
        yield from map(encode._PartEncoder(work, tables(jobs, items), config, 1), items)

    def tables(jobs, items):
        rows = {(one["job"], one["part"]): one["first"] + np.arange(one["rows"]) for one in items}
        return {place: jobs[place[0]].table.take(some) for place, some in rows.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "_run", run)
        patch.setattr(encode, "ray", SimpleNamespace(get=lambda table: table))
        patch.setattr(encode, "keep_freed_memory", lambda: None)
        yield
