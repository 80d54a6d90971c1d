"""What the server does where much is asked, parts fail, or several write: in this process."""

import asyncio
import dataclasses
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from gateway_parts import Behind, gateway_over, image, rows, search, soon
from serving_parts import AverageHash, NotedHash, Served, make_index, picture

from ray_retrieval.errors import ArtefactError, QueryError
from ray_retrieval.lock import writing_alone
from ray_retrieval.search import Index, remove
from ray_retrieval.search.filters import Filter
from ray_retrieval.serve import filtering, gateway, rolling, writing
from ray_retrieval.serve.backend import IdExample, NewImage
from ray_retrieval.serve.behind import PartError, Removal
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.encoders import EncoderReplica
from ray_retrieval.serve.gateway import Gateway
from ray_retrieval.serve.problems import answer_of
from ray_retrieval.serve.shards import ShardGroup
from ray_retrieval.serve.versions import Kept, current_key
from ray_retrieval.serve.wire import EncodeJob, GroupAnswer, GroupQuery, Late, ModelKey
from ray_retrieval.serve.writing import addition, tidy, written, written_by
from ray_retrieval.storage import Folder

WRITABLE = ServeConfig(writable=True, poll_s=0.1)
FAR = float("inf")


@pytest.fixture
def own(indexed: Served, tmp_path: Path) -> Served:
    """A copy of the index that may be changed."""
    shutil.copytree(indexed.index, tmp_path / "index")
    return dataclasses.replace(indexed, index=str(tmp_path / "index"))


def on(served: Served, work: Callable[[Gateway, Behind], Any], **options: Any) -> Any:
    async def run() -> Any:
        return await work(*gateway_over(served, **{"config": WRITABLE, **options}))

    return asyncio.run(run())


def behind_it(over: Gateway, **parts: Any) -> None:
    """Put other functions behind a gateway."""
    over._rolling["x"].parts = dataclasses.replace(over._rolling["x"].parts, **parts)


def test_a_request_of_many_images_takes_turns_and_leaves_room_for_others(own: Served) -> None:
    async def work(over: Gateway, behind: Behind) -> None:
        encode, at_once, most = over._rolling["x"].parts.encode, [0], [0]

        async def counted(job: EncodeJob, timeout_s: float) -> Any:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
            try:
                if at_once[0] > 6:  # as a handle does whose queue is full
                    raise PartError("encoder", "busy")
                await asyncio.sleep(0.001)
                return await encode(job, timeout_s)
            finally:
                at_once[0] -= 1

        behind_it(over, encode=counted)
        assert len((await over.embed([image(n) for n in range(50)], None, deadline=soon())).descriptors) == 50
        assert most == [2]
        new = [NewImage(f"new {n}", image(n)) for n in range(20)]
        many = [over.embed([image(n) for n in range(20)], None, deadline=soon()) for _ in range(6)]
        change, *_ = await asyncio.gather(over.add(new, None, replace=False, deadline=soon()), *many)
        assert change.changed == 20
        assert most == [6]

    on(own, work, config=ServeConfig(writable=True, max_ongoing=4, max_queued=2))


def test_when_one_fails_its_siblings_are_given_up(indexed: Served) -> None:
    async def work(over: Gateway, behind: Behind) -> None:
        given_up = []

        async def encode(job: EncodeJob, timeout_s: float) -> Any:
            if job.image == picture(1):
                raise PartError("encoder", "dead")
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                given_up.append(job.image)
                raise

        behind_it(over, encode=encode)
        for failing in (
            search(over, image(0), image(1)),
            over.embed([image(0), image(1)], None, deadline=soon()),
        ):
            with pytest.raises(QueryError, match="does not answer"):
                await failing
        await asyncio.sleep(0)
        assert given_up == [picture(0), picture(0)]

    on(indexed, work)


def test_what_is_open_is_had_while_something_else_opens() -> None:
    opening, go_on, made = threading.Event(), threading.Event(), []

    def make(key: int, others: list[int]) -> int:
        made.append((key, others))
        if key == 2:
            opening.set()
            assert go_on.wait(10)
        if key == 3:
            raise ArtefactError("damaged")
        return 10 * key

    kept: Kept[int, int] = Kept(make, idle_s=10)
    assert kept.get(1) == 10
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(kept.get, 2) for _ in range(2)]
        assert opening.wait(10)
        assert kept.get(1) == 10
        assert (kept.is_open(1), kept.is_open(2)) == (True, False)
        go_on.set()
        assert [one.result(10) for one in waiting] == [20, 20]
    for _ in range(2):
        with pytest.raises(ArtefactError):
            kept.get(3)
    assert made == [(1, []), (2, [10]), (3, [10, 20]), (3, [10, 20])]


def test_searches_do_not_wait_for_a_version_that_is_opened(
    own: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, _ = AverageHash(own.model).encode([picture(1)])
    first = current_key(own.index)
    group = ShardGroup(0, 1, ServeConfig(), first)
    remove(own.index, [own.ids[9]])
    second, go_on, open_it = current_key(own.index), threading.Event(), group._open

    def slowly(key: Any, known: Any) -> Any:
        assert go_on.wait(10)
        return open_it(key, known)

    monkeypatch.setattr(group._kept, "_make", slowly)

    async def work() -> None:
        waiting = asyncio.create_task(group.search(GroupQuery(second, codes, 3, None, FAR, 1)))
        await asyncio.sleep(0.01)
        answer = await asyncio.wait_for(group.search(GroupQuery(first, codes, 3, None, FAR, 1)), 5)
        assert isinstance(answer, GroupAnswer)
        assert not waiting.done()
        go_on.set()
        found = await waiting
        assert isinstance(found, GroupAnswer)
        assert found.version == second

    asyncio.run(work())


def test_a_change_that_nobody_waits_for_is_not_begun(own: Served) -> None:
    late = Removal(own.index, (own.ids[0],), None, time.time() - 1)
    with pytest.raises(QueryError, match="nothing was changed") as caught:
        written(late)
    assert caught.value.status == 503
    assert Index.open(own.index).version == 1


def test_a_change_without_an_answer_may_be_published(own: Served) -> None:
    async def work(over: Gateway, behind: Behind) -> None:
        async def silent(request: Any, timeout_s: float) -> Any:
            assert time.time() < request.expires < time.time() + timeout_s
            raise PartError("writer", "late")

        behind_it(over, write=silent)
        for change in (
            over.remove([own.ids[1]], None, None, deadline=soon(5)),
            over.add([NewImage("new", image(1))], None, replace=False, deadline=soon(5)),
        ):
            with pytest.raises(QueryError, match="may still be published") as caught:
                await change
            assert caught.value.status == 503

    on(own, work)


def test_a_writer_that_waits_for_another_one_does_not_block(own: Served) -> None:
    async def work() -> None:
        thread = ThreadPoolExecutor(1)
        with writing_alone(Folder(own.index), "build"):
            change = asyncio.create_task(written_by(thread, Removal(own.index, (own.ids[1],), None, FAR)))
            for _ in range(5):
                await asyncio.sleep(0.02)
                assert await asyncio.wait_for(asyncio.wrap_future(thread.submit(lambda: 7)), 2) == 7
            assert not change.done()
        assert (await change).number == 2

    asyncio.run(work())


def test_what_is_published_and_not_served_is_told(own: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rolling, "_AGAIN_S", 0.0)

    async def work(over: Gateway, behind: Behind) -> None:
        behind.refusing = ["no room"]
        with pytest.raises(QueryError, match="published as version 2, not served") as caught:
            await over.add([NewImage("new", image(1))], None, replace=False, deadline=soon())
        assert caught.value.status == 503
        assert "Retry-After" not in answer_of(caught.value).headers
        assert over.describe().indexes[0].version == 1
        behind.refusing = []
        await over._rolling["x"].refresh()
        assert (await over.record("new", None)).row == 300

    on(own, work)


_MUCH, _PLACE = "the filter has", "does not filter by 'path'"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (" or ".join(["label = 1"] * 65), _MUCH),
        ("label in (" + ", ".join(["1"] * 3000) + ")", _MUCH),
        ("id = " + "a" * 9000, _MUCH),
        ("path > '/home'", _PLACE),
        ("label = bee and not (row < 3 or path is null)", _PLACE),
    ],
)
def test_a_filter_that_costs_much_or_tells_where_files_lie_is_refused(
    own: Served, text: str, why: str
) -> None:
    async def work(over: Gateway, behind: Behind) -> None:
        for asked in (
            search(over, image(1), where=text),
            over.sample(3, 1, text, None),
            over.remove(None, text, None, deadline=soon()),
        ):
            with pytest.raises(QueryError, match=why) as caught:
                await asked
            assert caught.value.status == 422

    on(own, work)


def test_a_filter_is_read_once_and_not_on_the_loop(indexed: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    read, where = [], filtering.read_filter

    def counted(index: Index, text: str) -> Filter:
        read.append(threading.current_thread() is threading.main_thread())
        return where(index, text)

    monkeypatch.setattr(filtering, "read_filter", counted)

    async def work(over: Gateway, behind: Behind) -> None:
        for _ in range(3):
            await search(over, image(1), where="label = bee")

    on(indexed, work)
    assert read == [False]


def test_queries_that_became_late_meanwhile_are_not_searched(
    indexed: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, _ = AverageHash(indexed.model).encode([picture(1)])
    version, find = current_key(indexed.index), Index.search

    def slowly(self: Index, *args: Any, **more: Any) -> Any:
        time.sleep(0.2)
        return find(self, *args, **more)

    monkeypatch.setattr(Index, "search", slowly)
    group, soon_over = ShardGroup(0, 1, ServeConfig(), version), time.time() + 0.1
    queries = [
        GroupQuery(version, codes, 3, Filter.parse(f"label = {label}"), soon_over, 1)
        for label in ("ant", "bee")
    ]
    answers = group.search_batch(queries)
    assert [type(answer) for answer in answers] == [GroupAnswer, Late]


def test_a_removal_is_looked_up_aside(own: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    where, look = [], gateway.removal

    def watched(*args: Any) -> Removal:
        where.append(threading.current_thread() is threading.main_thread())
        return look(*args)

    monkeypatch.setattr(gateway, "removal", watched)

    async def work(over: Gateway, behind: Behind) -> None:
        with pytest.raises(QueryError, match="no image of that id"):
            await over.remove([own.ids[1], "nobody"], None, None, deadline=soon())
        change = await over.remove([own.ids[1], own.ids[2], own.ids[1]], None, None, deadline=soon())
        assert change.changed == 2

    on(own, work)
    assert where == [False, False]


def test_a_map_whose_process_died_is_an_answer(indexed: Served) -> None:
    async def dead(data: Any) -> Any:
        raise PartError("map", "dead")

    async def work(over: Gateway, behind: Behind) -> None:
        behind_it(over, lay_out=dead)
        with pytest.raises(QueryError, match="lays out the map does not answer") as caught:
            await over.map(None)
        assert caught.value.status == 503

    on(indexed, work)


def test_of_several_adds_of_one_id_one_succeeds_and_the_others_are_conflicts(own: Served) -> None:
    async def work(over: Gateway, behind: Behind) -> None:
        adds = [over.add([NewImage("one", image(n))], None, replace=False, deadline=soon()) for n in range(3)]
        done = await asyncio.gather(*adds, return_exceptions=True)
        errors = [one for one in done if isinstance(one, QueryError)]
        assert len(errors) == 2
        for error in errors:
            assert error.status == 409
            assert "?replace=true" in str(error)
            assert "--" not in str(error)

    on(own, work)


def test_what_does_not_fit_the_index_is_no_other_writer(own: Served) -> None:
    (Path(own.index) / "CURRENT").write_text("damaged")
    start = time.monotonic()
    with pytest.raises(QueryError) as caught:
        asyncio.run(written_by(ThreadPoolExecutor(1), Removal(own.index, (own.ids[1],), None, FAR)))
    assert time.monotonic() - start < 5
    assert "somebody" not in str(caught.value)


def test_a_busy_group_is_not_left_out(indexed: Served) -> None:
    async def busy(query: Any, timeout_s: float) -> Any:
        raise PartError("group", "busy")

    async def work(over: Gateway, behind: Behind) -> None:
        over._rolling["x"].groups[1]._ask = busy
        with pytest.raises(QueryError, match="busy") as caught:
            await search(over, image(1), partial=True)
        assert caught.value.status == 503

    on(indexed, work)


def test_missing_rows_are_those_that_a_search_could_find(own: Served) -> None:
    remove(own.index, [own.ids[0], own.ids[250]])

    async def work(over: Gateway, behind: Behind) -> None:
        behind.down = {2}
        answer = await search(over, image(1), partial=True)
        assert answer.partial is not None
        assert (answer.partial.rows, answer.partial.of_rows) == (99, 298)

    on(own, work, groups=3)


def test_a_group_without_shards_is_not_missed(indexed: Served) -> None:
    expected = Index.open(indexed.index).search(AverageHash(indexed.model).encode([picture(1)])[0], 10)

    async def work(over: Gateway, behind: Behind) -> None:
        behind.down = {0}
        answer = await search(over, image(1))
        assert answer.partial is None
        assert rows(answer) == expected.rows[0].tolist()

    on(indexed, work, groups=7)


def test_a_short_deadline_of_one_client_says_nothing_of_a_group(indexed: Served) -> None:
    async def work(over: Gateway, behind: Behind) -> None:
        behind.slow = {0: 30.0}
        for deadline, down in ((0.1, False), (3.0, True)):
            with pytest.raises(QueryError):
                await over.search(
                    gateway.SearchRequest((IdExample(indexed.ids[1]),)), deadline=soon(deadline)
                )
            assert over._rolling["x"].groups[0].is_down is down

    on(indexed, work, config=ServeConfig(group_timeout_s=0.5))


def test_classes_of_the_same_name_stay_apart(tmp_path: Path) -> None:
    served = make_index(tmp_path, count=30, class_names=("ant", "bee", "bee"))

    async def work(over: Gateway, behind: Behind) -> None:
        for number, label in enumerate(("bee", 2, "fly")):
            new = [NewImage(f"{number}", image(900 + number), label)]
            await over.add(new, None, replace=False, deadline=soon())
        assert [(await over.record(f"{number}", None)).label for number in range(3)] == [1, 2, 3]
        assert over.describe().indexes[0].class_names == ["ant", "bee", "bee", "fly"]
        assert (await over.record(served.ids[2], None)).label == 2

    on(served, work)


def test_classes_of_the_same_name_stay_apart_where_another_addition_was_faster(tmp_path: Path) -> None:
    served = make_index(tmp_path, count=30, class_names=("ant", "bee", "bee"))
    new = [NewImage(str(n), image(900 + n), label) for n, label in enumerate(("bee", 1, 2, "gnat", "fly"))]
    described = [AverageHash(served.model).encode([one.image.data])[0] for one in new]
    made = addition(Index.open(served.index), new, described, replace=False, expires=FAR)

    async def work(over: Gateway, behind: Behind) -> None:
        await over.add([NewImage("fly", image(800), "fly")], None, replace=False, deadline=soon())

    on(served, work)
    assert made.request is not None
    assert written(made.request).number == 3
    index = Index.open(served.index)
    assert index.class_names == ["ant", "bee", "bee", "fly", "gnat"]
    assert index.records(range(30, 36))["label"].to_pylist() == [3, 1, 1, 2, 4, 3]


def test_new_versions_are_seen_while_files_are_slow(own: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(self: Index, row: int) -> bytes:
        time.sleep(0.5)
        return picture(1)

    monkeypatch.setattr(Index, "image_bytes", slow)

    async def work(over: Gateway, behind: Behind) -> None:
        await search(over, image(1))
        looks = [asyncio.create_task(over.thumbnail(own.ids[n], 64, None)) for n in range(8)]
        await asyncio.sleep(0.05)
        await asyncio.to_thread(remove, own.index, [own.ids[3]])
        live = await over._rolling["x"].refresh(force=True)
        assert live.key.number == 2
        assert not all(look.done() for look in looks)
        await asyncio.gather(*looks)

    on(own, work)


def test_small_shards_are_merged_and_versions_stay(own: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "MOST_SMALL", 4)

    async def work(over: Gateway, behind: Behind) -> None:
        for number in range(5):
            await over.add([NewImage(f"{number}", image(900 + number))], None, replace=False, deadline=soon())
        await asyncio.to_thread(tidy, own.index)
        live = await over._rolling["x"].refresh(force=True)
        assert (len(live.index.shards), live.index.rows) == (4, 305)
        assert (await search(over, image(904), k=1)).hits[0].id == "4"

    on(own, work)
    assert Index.open(own.index, version=1).rows == 300
    monkeypatch.setattr(writing, "MOST_SMALL", 0)
    monkeypatch.setattr(writing, "MOST_BYTES", 0)
    before = Index.open(own.index).version
    remove(own.index, [own.ids[1]])
    tidy(own.index)
    assert Index.open(own.index).version == before + 1


def test_an_encoder_runs_the_engine_that_is_set(indexed: Served) -> None:
    asked = []

    def factory(model: str, **options: Any) -> AverageHash:
        asked.append(options["engine"])
        return AverageHash(model, **options)

    key = ModelKey(indexed.model, AverageHash(indexed.model).fingerprint)
    EncoderReplica(key, factory, ServeConfig(engine="onnx"))
    assert asked == ["onnx"]


def test_a_new_model_is_rolled_in_under_load_without_a_mixture(tmp_path: Path) -> None:
    first = make_index(tmp_path, encoder=NotedHash)
    (tmp_path / "new").mkdir()
    make_index(tmp_path / "new", encoder=NotedHash, note="another")
    expected = {}
    for uri in (tmp_path, tmp_path / "new"):
        opened, encoder = Index.open(uri / "index"), NotedHash(str(uri / "model"))
        assert encoder.fingerprint == opened.model
        found = opened.search(encoder.encode([picture(seed) for seed in range(8)])[0], 10)
        expected[opened.model] = found.rows.tolist(), found.distances.tolist()
    assert len({int(model[:2], 16) for model in expected}) == 2

    async def work(over: Gateway, behind: Behind) -> None:
        stop, seen, wrong = asyncio.Event(), set(), []

        async def client(seed: int) -> None:
            while not stop.is_set():
                answer = await search(over, image(seed))
                seen.add(answer.index.model)
                hits = rows(answer), [hit.distance for hit in answer.hits]
                known = expected[answer.index.model]
                if hits != (known[0][seed], known[1][seed]):
                    wrong.append(answer.index)

        clients = [asyncio.create_task(client(seed)) for seed in range(8)]
        await asyncio.sleep(0.1)
        for name in ("model", "index"):
            await asyncio.to_thread(shutil.rmtree, tmp_path / name)
            (tmp_path / "new" / name).rename(tmp_path / name)
            await asyncio.sleep(0.2)
        for _ in range(100):
            await asyncio.sleep(0.05)
            if len(seen) == 2:
                break
        await asyncio.sleep(0.2)
        stop.set()
        await asyncio.gather(*clients)
        assert not wrong
        assert seen == set(expected)

    on(first, work, config=ServeConfig(poll_s=0.05), encoder=NotedHash)


def test_small_shards_share_the_passes_of_a_filter(own: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, mask = [], Filter.mask

    def counted(self: Filter, records: Any, *args: Any) -> Any:
        passes.append(len(records))
        return mask(self, records, *args)

    monkeypatch.setattr(Filter, "mask", counted)
    remove(own.index, [own.ids[4]])
    found = Index.open(own.index).living("label = bee and row > 100")
    assert found.tolist() == [row for row in range(101, 300) if row % 3 == 1]
    assert passes == [300]
