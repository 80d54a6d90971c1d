"""Versions that follow each other while searches are under way, in this process."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gateway_parts import Behind, gateway_over, image, search, soon
from serving_parts import AverageHash, Served, make_index, picture, pixels

from ray_retrieval.errors import QueryError
from ray_retrieval.search import Index, compact, prune, remove
from ray_retrieval.serve import gateway as module
from ray_retrieval.serve.backend import ImageExample, NewImage
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.gateway import Gateway
from ray_retrieval.serve.versions import Kept, current_key, open_version, share
from ray_retrieval.serve.wire import GoneError

WRITABLE = ServeConfig(writable=True, poll_s=0.1)


@pytest.fixture
def own(indexed: Served, tmp_path: Path) -> Served:
    """A copy of the index that may be changed."""
    shutil.copytree(indexed.index, tmp_path / "index")
    return Served("", str(tmp_path / "index"), indexed.model, indexed.ids)


def on(served: Served, work: Callable[[Gateway, Behind], Any], config: ServeConfig = WRITABLE) -> Any:
    async def run() -> Any:
        return await work(*gateway_over(served, config=config))

    return asyncio.run(run())


class Oracle:
    """What each version of an index finds for an image, all shards searched in one go."""

    def __init__(self, served: Served) -> None:
        self._served, self._encoder = served, AverageHash(served.model)
        self._indices: dict[int, Index] = {}

    def hits(self, version: int, seed: int, k: int = 10) -> list[tuple[str, int]]:
        if version not in self._indices:
            self._indices[version] = Index.open(self._served.index, version=version)
        index = self._indices[version]
        codes, _ = self._encoder.encode([picture(seed)])
        found = index.search(codes, k)
        rows = found.rows[0][found.rows[0] >= 0]
        ids = index.records(rows)["id"].to_pylist()
        return list(zip(ids, found.distances[0].tolist(), strict=False))


def test_added_images_are_found_when_the_answer_comes_and_removed_ones_are_not(own: Served) -> None:
    async def work(gateway: Gateway, behind: Behind) -> None:
        broken = NewImage("broken", ImageExample(b"no image", "PNG", 1, 1))
        new = [NewImage("one", image(9001), "bee"), NewImage("two", image(9002), "dragonfly"), broken]
        change = await gateway.add(new, None, replace=False, deadline=soon())
        assert (change.index.version, change.rows, change.changed) == (2, 302, 2)
        assert list(change.left_out) == ["broken"]
        (hit,) = (await search(gateway, image(9002), k=1)).hits
        assert (hit.id, hit.distance, hit.class_name) == ("two", 0, "dragonfly")
        assert (await gateway.original("two", None)).data == picture(9002)
        with pytest.raises(QueryError, match="in the index already") as caught:
            await gateway.add(new[:1], None, replace=False, deadline=soon())
        assert caught.value.status == 409
        change = await gateway.add([NewImage("one", image(9003))], None, replace=True, deadline=soon())
        assert (change.index.version, change.rows) == (3, 302)
        change = await gateway.remove(["one", "two"], None, None, deadline=soon())
        assert (change.index.version, change.rows, change.changed) == (4, 300, 2)
        assert not {"one", "two"} & {hit.id for hit in (await search(gateway, image(9002), k=300)).hits}
        change = await gateway.remove(None, "label = bee", None, deadline=soon())
        assert change.rows == 200
        assert gateway.describe().indexes[0].version == 5

    on(own, work)


def test_pictures_are_told_apart_by_what_they_show_and_not_by_the_version(own: Served) -> None:
    kept, replaced = own.ids[7], own.ids[8]

    async def work(gateway: Gateway, behind: Behind) -> None:
        tags = {
            (one, size): await gateway.picture_tag(one, size, None)
            for one in (kept, replaced)
            for size in (64, 16, None)
        }
        assert len(set(tags.values())) == 6
        first = await gateway.thumbnail(kept, 64, None)
        assert first.etag == tags[kept, 64]
        assert (await gateway.original(replaced, None)).etag == tags[replaced, None]
        await gateway.thumbnail(replaced, 64, None)
        change = await gateway.add([NewImage(replaced, image(9003))], None, replace=True, deadline=soon())
        assert change.index.version == 2
        for (one, size), tag in tags.items():
            assert (await gateway.picture_tag(one, size, None) == tag) == (one == kept)
        assert await gateway.thumbnail(kept, 64, None) is first
        shown = await gateway.thumbnail(replaced, 64, None)
        assert (pixels(shown.data) == pixels(picture(9003))).all()
        with pytest.raises(QueryError, match="no image of that id"):
            await gateway.picture_tag("nobody", 64, None)

    on(own, work)


@pytest.mark.parametrize(
    ("new", "problem"),
    [
        ([NewImage("a", image(1), 17)], "no class 17"),
        ([NewImage("a", image(1), [0, 1])], "one class each"),
        ([NewImage("a", image(1), None, {"row": 3})], "no further column"),
        ([NewImage("a", image(1), None, {"code": 3})], "no further column"),
        ([NewImage("a", image(1), None, {"vector": 3})], "no further column"),
        ([NewImage("a", image(1), None, {"price": 3})], "no column 'price'"),
        ([NewImage("a", image(1), None, {"": 3})], "no column ''"),
        ([NewImage("a", image(1), None, {"a\0b": 3})], r"no column 'a\\x00b'"),
    ],
)
def test_what_does_not_fit_the_index_is_told(own: Served, new: list[NewImage], problem: str) -> None:
    async def work(gateway: Gateway, behind: Behind) -> None:
        with pytest.raises(QueryError, match=problem) as caught:
            await gateway.add(new, None, replace=False, deadline=soon())
        assert caught.value.status == 422
        assert Index.open(own.index).version == 1

    on(own, work)


def test_what_does_not_fit_the_index_is_told_before_images_are_described(own: Served) -> None:
    undecodable = ImageExample(b"no image", "PNG", 1, 1)

    async def work(gateway: Gateway, behind: Behind) -> None:
        for columns in ({"row": 3}, {"price": 3}):
            new = [NewImage("a", undecodable, None, columns)]
            with pytest.raises(QueryError, match="column"):
                await gateway.add(new, None, replace=False, deadline=soon())
        with pytest.raises(QueryError, match="in the index already"):
            await gateway.add([NewImage(own.ids[0], undecodable)], None, replace=False, deadline=soon())

    on(own, work)


def test_a_removal_names_ids_or_a_filter(own: Served) -> None:
    async def work(gateway: Gateway, behind: Behind) -> None:
        for ids, where in ((None, None), ([own.ids[0]], "label = bee")):
            with pytest.raises(QueryError, match="one of the two"):
                await gateway.remove(ids, where, None, deadline=soon())
        with pytest.raises(QueryError, match="no image of that id"):
            await gateway.remove(["nobody"], None, None, deadline=soon())
        with pytest.raises(QueryError, match="none of its 300 rows would be left") as caught:
            await gateway.remove(None, "label >= 0", None, deadline=soon())
        assert own.index not in str(caught.value)

    on(own, work)


def test_a_server_that_is_not_writable_changes_nothing(own: Served) -> None:
    async def work(gateway: Gateway, behind: Behind) -> None:
        with pytest.raises(QueryError, match="this server changes no index") as caught:
            await gateway.remove([own.ids[0]], None, None, deadline=soon())
        assert caught.value.status == 403

    on(own, work, ServeConfig())


def test_no_search_fails_or_mixes_versions_while_they_change(own: Served) -> None:
    oracle = Oracle(own)

    async def work(gateway: Gateway, behind: Behind) -> set[int]:
        stop, seen = asyncio.Event(), set()
        wrong = []

        async def client(seed: int) -> None:
            while not stop.is_set():
                answer = await search(gateway, image(seed))
                seen.add(answer.index.version)
                found = [(hit.id, hit.distance) for hit in answer.hits]
                if found != oracle.hits(answer.index.version, seed):
                    wrong.append((answer.index.version, seed))

        clients = [asyncio.create_task(client(seed)) for seed in range(6)]
        await asyncio.sleep(0.1)
        await gateway.add([NewImage("near", image(3))], None, replace=False, deadline=soon())
        await gateway.remove([own.ids[3]], None, None, deadline=soon())
        # Somebody else, such as the command line, publishes too.
        await asyncio.to_thread(remove, own.index, [own.ids[4]])
        await asyncio.to_thread(compact, own.index)
        for _ in range(100):
            await asyncio.sleep(0.1)
            if 5 in seen:
                break
        stop.set()
        await asyncio.gather(*clients)
        assert not wrong
        assert behind.prepared[-1] == 5
        return seen

    assert {1, 5} <= on(own, work)


def test_a_version_that_cannot_be_opened_is_not_served(own: Served) -> None:
    codes, _ = AverageHash(own.model).encode([picture(8)])
    expected = Index.open(own.index).search(codes, 10).rows[0].tolist()

    async def work(gateway: Gateway, behind: Behind) -> None:
        await search(gateway, image(8))
        manifest = remove(own.index, [own.ids[8]]).manifest
        assert manifest.deletes is not None
        (Path(own.index) / manifest.deletes.file).write_bytes(b"damaged")
        await asyncio.sleep(0.5)
        answer = await search(gateway, image(8))
        assert answer.index.version == 1
        assert [hit.row for hit in answer.hits] == expected
        assert 'outcome="refused"' in gateway.metrics().decode()

    on(own, work)


def test_a_version_that_finds_something_else_than_was_recorded_is_not_served(own: Served) -> None:
    """Its files are there and as large as they were, so that they can be opened."""

    async def work(gateway: Gateway, behind: Behind) -> None:
        await search(gateway, image(8))
        remove(own.index, [own.ids[8]])
        manifest = compact(own.index).manifest
        for shard in manifest.shards:
            codes = Path(own.index, shard.folder, "codes.bin")
            data = codes.read_bytes()
            header = len(data) - 8 * shard.rows
            codes.write_bytes(data[:header] + bytes(255 - one for one in data[header:]))
        live = await gateway._rolling["x"].refresh(force=True)
        assert live.key.number == 1
        assert behind.prepared == [1]
        assert 'outcome="refused"' in gateway.metrics().decode()
        assert "test query" in str(await behind.groups[0].prepare((current_key(own.index), 2)))

    on(own, work, ServeConfig(writable=True, poll_s=1000))


def test_a_version_for_which_there_is_no_memory_is_not_tried_again_and_again(
    own: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def too_much(*of: Any) -> None:
        tried.append(of)
        raise MemoryError("no room for it")

    async def work(gateway: Gateway, behind: Behind) -> None:
        await search(gateway, image(8))
        monkeypatch.setattr("ray_retrieval.serve.rolling.Rerankings", too_much)
        remove(own.index, [own.ids[8]])
        for _ in range(3):
            assert (await gateway._rolling["x"].refresh(force=True)).key.number == 1
        assert (await search(gateway, image(8))).index.version == 1
        assert len(tried) == 1
        assert "x stays at version 1: no room for it" in caplog.text

    on(own, work, ServeConfig(poll_s=1000))


def test_an_index_that_cannot_be_read_for_now_is_told_as_such(own: Served) -> None:
    async def work(gateway: Gateway, behind: Behind) -> None:
        async def gone(query: Any, timeout_s: float) -> Any:
            raise GoneError("pruned")

        gateway._rolling["x"].groups[0]._ask = gone
        Path(own.index).rename(f"{own.index}-away")
        with pytest.raises(QueryError, match="no longer there") as caught:
            await search(gateway, image(8))
        assert caught.value.status == 503

    on(own, work)


def test_a_picture_that_is_overwritten_while_it_is_read_keeps_the_tag_of_before(
    own: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = ["before"]

    def stored(index: Index, identifier: str) -> bytes:
        written[0] = "after"
        return picture(7)

    monkeypatch.setattr(module, "stored_image", stored)
    monkeypatch.setattr(module, "picture_key", lambda index, identifier: (written[0],))

    async def work(gateway: Gateway, behind: Behind) -> None:
        before = await gateway.picture_tag(own.ids[7], None, None)
        assert (await gateway.original(own.ids[7], None)).etag == before

    on(own, work)


def test_a_group_that_starts_late_opens_the_version_that_it_is_asked_for(own: Served) -> None:
    first = current_key(own.index)
    remove(own.index, [own.ids[0]])
    second = current_key(own.index)
    parts = [open_version(key, group=1, groups=2) for key in (first, second)]
    assert [part.version for part in parts if part is not None] == [1, 2]
    compact(own.index)
    prune(own.index, keep=1)
    with pytest.raises(GoneError):
        open_version(first)
    assert open_version(current_key(own.index)) is not None


def test_versions_share_the_shards_that_are_the_same(own: Served) -> None:
    before = open_version(current_key(own.index))
    assert before is not None
    remove(own.index, [own.ids[0]])
    after = open_version(current_key(own.index), known=[before])
    assert after is not None
    assert all(before.shards[number] is after.shards[number] for number in range(3))
    assert after.rows == before.rows - 1


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("groups", [1, 2, 3, 5])
def test_groups_share_the_shards_out_evenly(shards: int, groups: int) -> None:
    parts = [share(shards, group, groups) for group in range(groups)]
    assert [shard for part in parts for shard in part] == list(range(shards))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_nobody_asks_for_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    now, closed = [0.0], []
    monkeypatch.setattr("ray_retrieval.serve.versions.time.monotonic", lambda: now[0])
    kept: Kept[int, str] = Kept(lambda key, others: f"{key} beside {others}", idle_s=10, close=closed.append)
    assert kept.get(1) == "1 beside []"
    assert kept.get(2) == "2 beside ['1 beside []']"
    now[0] = 9
    kept.get(1)
    now[0] = 12
    kept.get(1)
    assert closed == ["2 beside ['1 beside []']"]
    now[0] = 100
    assert kept.get(1) == "1 beside []"
    assert len(kept) == 1


def test_a_new_model_in_the_same_folders_is_rolled_in_without_a_mixture(tmp_path: Path) -> None:
    first = make_index(tmp_path)

    async def work(gateway: Gateway, behind: Behind) -> None:
        before = await search(gateway, image(5))
        (tmp_path / "new").mkdir()
        second = make_index(tmp_path / "new", note="another")
        for name in ("model", "index"):  # as a run does that is made anew: the model first
            shutil.rmtree(tmp_path / name)
            shutil.copytree(tmp_path / "new" / name, tmp_path / name)
            assert (await search(gateway, image(5))).index == before.index
        fingerprint = AverageHash(second.model).fingerprint
        for _ in range(100):
            await asyncio.sleep(0.05)
            answer = await search(gateway, image(5))
            assert answer.hits == before.hits
            if answer.index.model == fingerprint:
                break
        assert answer.index.model == fingerprint != before.index.model

    on(first, work, ServeConfig(poll_s=0.1))
