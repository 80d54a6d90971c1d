"""The replicas' classes in this process, without Ray: what they batch and drop, and the real encoder."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import RayActorError, WorkerCrashedError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from response_parts import Silent, without_complaints
from serving_parts import AverageHash, GreyVector, Served, make_index, picture, write_model

from ray_retrieval import model
from ray_retrieval.errors import QueryError
from ray_retrieval.methods import METHODS
from ray_retrieval.search import Hits, Index, build
from ray_retrieval.search.approximate import ApproximateConfig
from ray_retrieval.search.filters import Filter
from ray_retrieval.serve.asking import asking
from ray_retrieval.serve.behind import PartError
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.deployments import Handles, parts_of
from ray_retrieval.serve.encoders import EncoderReplica
from ray_retrieval.serve.gathering import Gathering
from ray_retrieval.serve.shards import ShardGroup
from ray_retrieval.serve.versions import current_key
from ray_retrieval.serve.wire import (
    Encoded,
    EncodeJob,
    Gone,
    GoneError,
    GroupAnswer,
    GroupQuery,
    Late,
    ModelKey,
    VersionKey,
    Wrong,
)
from ray_retrieval.storage import Folder

CONFIG = ServeConfig(encoder_batch=4)
NEVER = float("inf")


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
    boxes = [(4.0, 4.0, 36.0, 36.0) if seed > 8 else None for seed in range(11)]
    whole, failures = encoder.encode(images)
    parts, _ = encoder.encode(images[9:], boxes[9])
    expected = np.concatenate([whole.data[:9], parts.data])
    encoder.close()
    assert set(failures) == {3, 8}
    key = ModelKey(uri, encoder.fingerprint)
    replica = EncoderReplica(key, model.Encoder, CONFIG)
    jobs = [EncodeJob(key, image, box, NEVER) for image, box in zip(images, boxes, strict=True)]
    for position, answer in enumerate(replica.encode_batch(jobs)):
        assert isinstance(answer, Encoded)
        if position in failures:
            assert answer.found == failures[position]
        else:
            assert not isinstance(answer.found, str)
            np.testing.assert_array_equal(answer.found.data[0], expected[position])


def test_an_encoder_answers_by_the_model_that_is_asked_for_or_not_at_all(indexed: Served) -> None:
    key = ModelKey(indexed.model, AverageHash(indexed.model).fingerprint)
    former = ModelKey(indexed.model, "0123456789abcdef")
    jobs = [
        EncodeJob(key, picture(1), None, NEVER),
        EncodeJob(former, picture(1), None, NEVER),
        EncodeJob(key, picture(1), None, time.time() - 1),
    ]
    # One that starts anew once a new model was rolled in is still told of the former one.
    for told in (key, former):
        replica = EncoderReplica(told, AverageHash, CONFIG, indexed.index)
        assert replica._kept.is_open(key)
        assert [type(answer) for answer in replica.encode_batch(jobs)] == [Encoded, Gone, Late]


def test_an_encoder_does_not_begin_with_a_model_that_has_made_no_index_yet(
    indexed: Served, tmp_path: Path
) -> None:
    """As while a run is made anew: others go on with the former model, which they hold."""
    former = make_index(tmp_path, count=10, shards=1, note="former")
    told = ModelKey(indexed.model, current_key(former.index).model)
    for index in (former.index, None):
        with pytest.raises(GoneError, match="by now"):
            EncoderReplica(told, AverageHash, CONFIG, index)


def test_an_encoder_without_room_for_a_model_says_so_before_it_is_asked_for(
    indexed: Served, tmp_path: Path
) -> None:
    write_model(Folder(tmp_path), note="large")

    def made(uri: str, **options: Any) -> AverageHash:
        if uri == str(tmp_path):
            raise RuntimeError("CUDA out of memory")
        return AverageHash(uri, **options)

    key = ModelKey(indexed.model, current_key(indexed.index).model)
    replica = EncoderReplica(key, made, CONFIG)
    said = asyncio.run(replica.prepare(ModelKey(str(tmp_path), "0123456789abcdef")))
    assert said == "RuntimeError: CUDA out of memory"
    assert isinstance(asyncio.run(replica.prepare(key)), float)


def asked(version: VersionKey, descriptors: Any, k: int, **more: Any) -> GroupQuery:
    return GroupQuery(
        **{
            "version": version,
            "queries": descriptors,
            "k": k,
            "where": None,
            "expires": NEVER,
            "groups": 2,
            **more,
        }
    )


def hits_of(answer: Any) -> Hits:
    assert isinstance(answer, GroupAnswer)
    assert isinstance(answer.found, Hits)
    return answer.found


@pytest.mark.parametrize("one_size", [False, True])
def test_encoders_of_one_size_keep_freed_memory(
    indexed: Served, monkeypatch: pytest.MonkeyPatch, one_size: bool
) -> None:
    kept: list[bool] = []
    monkeypatch.setattr("ray_retrieval.compute.keep_freed_memory", lambda: kept.append(True))

    def made(uri: str, **options: Any) -> AverageHash:
        encoder = AverageHash(uri, **options)
        encoder.one_size = one_size
        return encoder

    EncoderReplica(ModelKey(indexed.model, current_key(indexed.index).model), made, CONFIG)
    assert kept == [True] * one_size


def test_gateways_of_another_division_get_the_share_of_their_own(indexed: Served) -> None:
    codes, _ = AverageHash(indexed.model).encode([picture(700)])
    version = current_key(indexed.index)

    def found(number: int, groups: int) -> Any:
        query = asked(version, codes, 3, groups=groups, expires=time.time() + 60)
        return asyncio.run(made[number].search(query))

    made = [ShardGroup(number, 2, CONFIG, version) for number in range(2)]
    for number, groups, shards in ((0, 1, [0, 1, 2]), (0, 2, [0, 1]), (1, 2, [2]), (0, 3, [0]), (1, 3, [1])):
        expected = Index.open(indexed.index, shards=shards).search(codes, 3)
        np.testing.assert_array_equal(hits_of(found(number, groups)).rows, expected.rows)
    assert isinstance(found(1, 1), Gone)


def test_a_group_answers_queries_of_different_k_and_filter_in_one_batch(indexed: Served) -> None:
    codes, _ = AverageHash(indexed.model).encode([picture(seed) for seed in range(700, 712)])
    version = current_key(indexed.index)
    group = ShardGroup(0, 2, CONFIG, version)
    wheres = [None, Filter.parse("label = bee")]
    rows = [codes.take(np.array([number])) for number in range(12)]
    queries = [asked(version, row, 1 + 15 * n, where=wheres[n % 2], groups=2) for n, row in enumerate(rows)]
    answers = group.search_batch(queries)
    index = Index.open(indexed.index, shards=[0, 1])
    for number, answer in enumerate(answers):
        expected = index.search(rows[number], 1 + 15 * number, where=wheres[number % 2])
        np.testing.assert_array_equal(hits_of(answer).distances, expected.distances)
        np.testing.assert_array_equal(hits_of(answer).rows, expected.rows)


def test_an_approximate_search_finds_the_same_whatever_is_asked_beside_it(tmp_path: Path) -> None:
    served = make_index(tmp_path, count=60, shards=1, encoder=GreyVector)
    crude = ApproximateConfig(search="IVF2,PQ2x4", k_factor=1, nprobe=1, recall_queries=5)
    build(tmp_path / "embeddings", tmp_path / "crude", approximate=crude)
    version, index = current_key(str(tmp_path / "crude")), Index.open(tmp_path / "crude")
    vectors, _ = GreyVector(served.model).encode([picture(seed) for seed in range(700, 708)])
    rows = [vectors.take(np.array([number])) for number in range(len(vectors))]
    for where in (None, Filter.parse("label in (ant, bee)")):
        queries = [
            asked(version, row, (1, 3, 40)[n % 3], where=where, groups=1) for n, row in enumerate(rows)
        ]
        answers = ShardGroup(0, 1, CONFIG, version).search_batch(queries)
        for query, answer in zip(queries, answers, strict=True):
            alone = index.search(query.queries, query.k, where=where)
            np.testing.assert_array_equal(hits_of(answer).rows, alone.rows)
            np.testing.assert_array_equal(hits_of(answer).distances, alone.distances)


def test_a_group_tells_what_it_cannot_answer_and_answers_the_others(indexed: Served) -> None:
    codes, _ = AverageHash(indexed.model).encode([picture(1)])
    version = current_key(indexed.index)
    another = VersionKey(version.uri, 1, "0" * 64, version.model)
    queries = [
        asked(version, codes, 3),
        asked(another, codes, 3),
        asked(version, codes, 3, expires=time.time() - 1),
        asked(version, codes, 3, where=Filter.parse("price < 3")),
    ]
    answers = ShardGroup(0, 1, CONFIG).search_batch(queries)
    assert [type(answer) for answer in answers] == [GroupAnswer, Gone, Late, Wrong]
    assert hits_of(answers[0]).rows[0, 0] == 1
    assert isinstance(answers[3], Wrong)
    assert indexed.index not in str(answers[3].error)


def test_a_group_without_shards_finds_nothing(tmp_path: Path) -> None:
    served = make_index(tmp_path, count=10, shards=1, encoder=GreyVector)
    vectors, _ = GreyVector(served.model).encode([picture(1)])
    version = current_key(served.index)
    groups = [ShardGroup(number, 2, CONFIG, version) for number in range(2)]
    query = asked(version, vectors, 3, groups=2)
    sizes = [hits_of(group.search_batch([query])[0]).rows.shape[1] for group in groups]
    assert sorted(sizes) == [0, 3]


def test_questions_gather_while_the_worker_is_busy() -> None:
    batches: list[list[int]] = []
    all_asked = threading.Event()

    def work(batch: list[int]) -> list[int]:
        batches.append(batch)
        all_asked.wait()
        if 13 in batch:
            raise QueryError("unlucky")
        return [2 * one for one in batch]

    async def run() -> list[Any]:
        gathering = Gathering(work, ThreadPoolExecutor(1), most=4)
        first = asyncio.create_task(gathering.ask(0))
        while not batches:
            await asyncio.sleep(0.001)
        rest = [asyncio.create_task(gathering.ask(number)) for number in (1, 2, 3, 4, 5, 13)]
        await asyncio.sleep(0.01)
        rest[1].cancel()  # Who has gone is not worked for.
        await asyncio.sleep(0)
        all_asked.set()
        return await asyncio.gather(first, *rest, return_exceptions=True)

    answers = asyncio.run(run())
    assert batches == [[0], [1, 3, 4, 5], [13]]
    assert isinstance(answers.pop(2), asyncio.CancelledError)
    assert isinstance(answers.pop(), QueryError)
    assert answers == [0, 2, 6, 8, 10]


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


def test_a_replica_that_died_is_asked_again_until_time_is_up() -> None:
    method = Method(RayActorError(), WorkerCrashedError())
    assert asyncio.run(asking(method, "group")(7, 30)) == 7
    assert method.calls == 3
    dead = Method(*(RayActorError() for _ in range(100)))
    with pytest.raises(PartError) as caught:
        asyncio.run(asking(dead, "group")(7, 0.35))
    assert caught.value.why == "dead"
    assert 2 <= dead.calls <= 4


def test_what_a_process_breaks_off_as_it_ends_is_asked_again() -> None:
    class Ending(Method):
        async def remote(self, value: int) -> int:
            self.calls += 1
            if self.calls < 3:
                raise asyncio.CancelledError
            return value

    method = Ending()
    assert asyncio.run(asking(method, "group")(7, 30)) == 7
    assert method.calls == 3


def test_an_image_that_processes_die_of_is_asked_once_more_at_most() -> None:
    deadly = Method(*(RayActorError() for _ in range(9)))
    with pytest.raises(PartError, match="dead"):
        asyncio.run(asking(deadly, "encoder", again=1)(7, 30))
    assert deadly.calls == 2
    restarted = Method(RayActorError(), *(DeploymentUnavailableError(DeploymentID("x")) for _ in range(3)))
    assert asyncio.run(asking(restarted, "encoder", again=1)(7, 30)) == 7


def test_what_has_effects_is_not_asked_again() -> None:
    method = Method(RayActorError())
    with pytest.raises(PartError, match="dead"):
        asyncio.run(asking(method, "writer", again=0)(7, 30))
    assert method.calls == 1


def test_a_part_that_is_full_is_not_asked_again() -> None:
    method = Method(BackPressureError(5, 5))
    with pytest.raises(PartError) as caught:
        asyncio.run(asking(method, "encoder")(7, 30))
    assert (caught.value.why, method.calls) == ("busy", 1)
    assert caught.value.as_query_error().status == 503


def test_a_part_that_is_silent_is_told_that_nobody_waits() -> None:
    response = Silent()

    class Part:
        def remote(self, question: int) -> Silent:
            return response

    async def why() -> str | None:
        try:
            await asking(Part(), "encoder")(7, 0.05)
        except PartError as error:
            return error.why
        return None

    assert asyncio.run(without_complaints(why())) == "late"
    assert response.cancelled()


@pytest.mark.parametrize(
    ("answer", "error"),
    [(Late(), PartError), (Gone("pruned"), GoneError), (Wrong(QueryError("k", status=422)), QueryError)],
)
def test_what_a_part_says_instead_of_an_answer_is_raised(answer: Any, error: type[Exception]) -> None:
    class Says:
        async def remote(self, question: int) -> Any:
            return answer

    with pytest.raises(error):
        asyncio.run(asking(Says(), "group")(7, 5))


class Handle:
    """A deployment's handle that writes down what it is asked."""

    def __init__(self) -> None:
        self.encoded: list[ModelKey] = []
        self.prepared: list[Any] = []
        self.encode, self.search, self.ping = self, self, self

    def options(self, *, _by_reference: bool) -> "Handle":
        return self

    async def remote(self, job: EncodeJob) -> Encoded:
        self.encoded.append(job.model)
        return Encoded("no image", job.model.fingerprint, 1)

    def broadcast(self, method: str, question: Any) -> "Handle":
        self.prepared.append(question)
        return self

    async def results_async(self, **_: Any) -> list[float]:
        return [1.0]


def test_a_new_model_in_the_folder_of_local_features_is_of_its_own_encoders() -> None:
    own, local, group = Handle(), Handle(), Handle()
    parts = parts_of(Handles(own, [group]), {"file:///local": local}, CONFIG)
    main, renewed = ModelKey("file:///main", "m" * 16), ModelKey("file:///local", "n" * 16)
    key = VersionKey("file:///index", 1, "0" * 64, main.fingerprint)

    async def work() -> list[float | str]:
        await parts.encode(EncodeJob(main, b"", None, NEVER), 5)
        await parts.encode(EncodeJob(renewed, b"", None, NEVER), 5)
        return await parts.prepare(key, [main, renewed])

    assert asyncio.run(work()) == [1.0]
    assert (own.encoded, local.encoded) == ([main], [renewed])
    assert (own.prepared, local.prepared, group.prepared) == ([main], [renewed], [(key, 1)])


@pytest.mark.parametrize(("why", "said"), [(TimeoutError(), True), (RayActorError(), False)])
def test_a_version_waits_for_who_is_slow_to_open_it_and_not_for_who_died(why: Exception, said: bool) -> None:
    class Without(Handle):
        async def results_async(self, **_: Any) -> list[float]:
            raise why

    model = ModelKey("file:///main", "m" * 16)
    key = VersionKey("file:///index", 1, "0" * 64, model.fingerprint)
    for encoder, group in ((Without(), Handle()), (Handle(), Without())):
        found = asyncio.run(parts_of(Handles(encoder, [group]), {}, CONFIG).prepare(key, [model]))
        problems = [one for one in found if isinstance(one, str)]
        assert problems == ["not every process is ready for it within 120 s"] * said


@pytest.mark.parametrize("module", ["deployments", "shards", "writers"])
def test_only_encoders_load_pytorch(module: str) -> None:
    """Each process that does would hold half a gigabyte more."""
    asked = f"import sys, ray_retrieval.serve.{module}; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"
