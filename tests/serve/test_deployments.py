"""The replicas' classes in this process, without Ray: what they batch, and the real encoder."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from ray.exceptions import RayActorError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError
from serving_parts import AverageHash, Served, picture

from ray_retrieval import model
from ray_retrieval.errors import ArtefactError, ModelError, QueryError
from ray_retrieval.methods import METHODS
from ray_retrieval.search import Index
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.deployments import EncoderReplica, _asking
from ray_retrieval.serve.shards import ShardGroup
from ray_retrieval.serve.wire import identity
from ray_retrieval.storage import Folder

CONFIG = ServeConfig(encoder_batch=4)


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def save_small_model(folder: Path) -> str:
    kind, build = METHODS["greedyhash"]
    torch.manual_seed(0)
    backbone = {"name": "small", "weights": "none"}
    config = kind.model_validate({"bits": 20, "backbone": backbone, "image": {"size": 32}})
    weights = build(config, classes=3, pretrained=False).state_dict()
    model.save(
        Folder(folder),
        config=config.model_dump(mode="json"),
        weights=weights,
        classes=3,
        class_names=None,
        precision="float32",
        training={},
        metrics={},
    )
    return str(folder)


def test_the_real_encoder_answers_a_batch_as_it_does_alone(tmp_path: Path, one_torch_thread: None) -> None:
    uri = save_small_model(tmp_path)
    encoder = model.Encoder(uri)
    images = [picture(seed, side=40, kind="JPEG" if seed % 2 else "PNG") for seed in range(11)]
    images[3], images[8] = b"no image", images[8][:200]
    expected, failures = encoder.encode(images)
    encoder.close()
    assert set(failures) == {3, 8}

    def factory(uri: str, *, threads: int, batch_size: int) -> model.Encoder:
        return model.Encoder(uri, threads=threads, batch_size=batch_size)

    replica = EncoderReplica(uri, encoder.fingerprint, factory, CONFIG)
    for position, answer in enumerate(replica.encode_batch(images)):
        if position in failures:
            assert answer == failures[position]
        else:
            np.testing.assert_array_equal(answer, expected.data[position])


def test_an_encoder_whose_model_was_exchanged_does_not_start(indexed: Served) -> None:
    with pytest.raises(ModelError, match="by now"):
        EncoderReplica(indexed.model, "0123456789abcdef", AverageHash, CONFIG)


def test_a_group_answers_queries_of_different_k_in_one_batch(indexed: Served) -> None:
    fingerprint = AverageHash(indexed.model).fingerprint
    codes, _ = AverageHash(indexed.model).encode([picture(seed) for seed in range(700, 712)])

    group = ShardGroup(indexed.index, fingerprint, [0, 2], CONFIG)
    answers = group.search_batch([(code, 1 + 15 * number) for number, code in enumerate(codes.data)])
    index = Index.open(indexed.index, shards=[0, 2])
    for number, found in enumerate(answers):
        expected = index.search(type(codes)(codes.data[number : number + 1], 64), 1 + 15 * number)
        np.testing.assert_array_equal(found.distances, expected.distances[0])
        np.testing.assert_array_equal(found.rows, expected.rows[0])
        assert found.index == identity(index)


def test_a_group_of_another_models_index_does_not_start(indexed: Served) -> None:
    with pytest.raises(ArtefactError, match="0123456789abcdef"):
        ShardGroup(indexed.index, "0123456789abcdef", [0], CONFIG)


class Method:
    """A deployment's method that fails in the given ways before it answers."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.calls = 0

    async def remote(self, value: int) -> int:
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)
        return value


def test_a_replica_that_died_is_asked_once_more() -> None:
    method = Method(RayActorError())
    assert asyncio.run(_asking(method, "the encoder")(7)) == 7
    assert method.calls == 2


@pytest.mark.parametrize(
    ("failures", "calls", "problem"),
    [
        ([RayActorError(), WorkerCrashedError()], 2, "the encoder does not answer"),
        ([BackPressureError(5, 5)], 1, "the server is busy"),
    ],
)
def test_what_stays_dead_or_is_full_is_a_503(failures: list[Exception], calls: int, problem: str) -> None:
    method = Method(*failures)
    with pytest.raises(QueryError, match=problem) as caught:
        asyncio.run(_asking(method, "the encoder")(7))
    assert caught.value.status == 503
    assert method.calls == calls


def test_a_part_that_is_silent_is_not_waited_for() -> None:
    class Silent:
        async def remote(self) -> None:
            await asyncio.sleep(30)

    with pytest.raises(QueryError, match="does not answer"):
        asyncio.run(_asking(Silent(), "the encoder", timeout_s=0.05)())
