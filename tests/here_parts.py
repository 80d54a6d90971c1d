"""Work of Ray's processes, done in this one: each of those loads everything first, which takes seconds."""

from contextlib import contextmanager

import pytest

from ray_retrieval import encode


@contextmanager
def encoding_in_this_process():
    """Within, images are encoded here. A Ray is there, whose store the tables go through."""

    def run(jobs, items, config):
        work = [encode._Work(job.model.uri, job.out.uri) for job in jobs]
        yield from map(encode._PartEncoder(work, encode._share(jobs, items), config, 1), items)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "_run", run)
        patch.setattr(encode, "keep_freed_memory", lambda: None)
        yield
