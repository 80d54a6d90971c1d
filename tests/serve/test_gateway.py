"""The gateway over real indices, with functions of this process behind it."""

import asyncio
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gateway_parts import Behind, gateway_over, image, rows, search, soon
from PIL import Image
from serving_parts import AverageHash, GreyVector, Served, make_index, picture, pixels

from ray_retrieval.descriptors import Codes, Vectors
from ray_retrieval.errors import DataError, QueryError, StoreError
from ray_retrieval.query import Searcher
from ray_retrieval.search import Index
from ray_retrieval.serve.backend import DescriptorExample, IdExample, ImageExample
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.describing import card
from ray_retrieval.serve.gateway import Gateway
from ray_retrieval.serve.lookups import known, media_type
from ray_retrieval.serve.wire import GoneError
from ray_retrieval.storage import Folder, write_description

Work = Callable[[Gateway, Behind], Any]


def on(served: Served, work: Work, **options: Any) -> Any:
    """What work gives on a gateway and the loop that it was made for."""

    async def run() -> Any:
        return await work(*gateway_over(served, **options))

    return asyncio.run(run())


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return make_index(tmp_path_factory.mktemp("vectors"), count=60, encoder=GreyVector)


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_groups_together_find_what_the_whole_index_finds(indexed: Served, groups: int) -> None:
    codes, _ = AverageHash(indexed.model).encode([picture(5000)])
    index = Index.open(indexed.index)

    async def work(gateway: Gateway, behind: Behind) -> None:
        for k in (1, 7, 300, 500):
            expected = index.search(codes, k)
            hits = (await search(gateway, image(5000), k=k)).hits
            assert [hit.row for hit in hits] == [row for row in expected.rows[0].tolist() if row >= 0]
            assert [hit.distance for hit in hits] == expected.distances[0][: len(hits)].tolist()
            assert [hit.id for hit in hits] == [indexed.ids[hit.row] for hit in hits]

    on(indexed, work, groups=groups)


def test_vectors_are_answered_with_their_cosines(vectors: Served) -> None:
    everything, _ = GreyVector(vectors.model).encode([picture(number) for number in range(60)])
    cosines = everything.data[7] @ everything.data.T

    async def work(gateway: Gateway, behind: Behind) -> None:
        hits = (await search(gateway, image(7), k=60)).hits
        assert [hit.row for hit in hits] == np.argsort(-cosines, kind="stable").tolist()
        assert [hit.similarity for hit in hits] == pytest.approx(np.sort(cosines)[::-1].tolist(), abs=1e-6)
        about = gateway.describe().indexes[0]
        assert (about.kind, about.dimension, about.bits) == ("vectors", 64, None)
        assert about.metric == "squared euclidean"

    on(vectors, work, encoder=GreyVector)


def test_an_id_and_a_descriptor_find_what_their_image_finds(indexed: Served) -> None:
    codes, _ = AverageHash(indexed.model).encode([picture(9)])

    async def work(gateway: Gateway, behind: Behind) -> None:
        found = rows(await search(gateway, image(9)))
        assert rows(await search(gateway, IdExample(indexed.ids[9]))) == found
        assert rows(await search(gateway, DescriptorExample(codes.data[0]))) == found
        with pytest.raises(QueryError, match="no image of that id") as caught:
            await search(gateway, IdExample("nobody"))
        assert caught.value.status == 404

    on(indexed, work)


@pytest.mark.parametrize(
    "wrong", [np.zeros(7, np.uint8), np.zeros(8, np.float32), np.ones(64, np.float32), np.zeros(0, np.uint8)]
)
def test_a_descriptor_of_another_form_is_refused(indexed: Served, wrong: Any) -> None:
    async def work(gateway: Gateway, behind: Behind) -> None:
        with pytest.raises(QueryError, match="64-bit codes") as caught:
            await search(gateway, DescriptorExample(wrong))
        assert caught.value.status == 422

    on(indexed, work)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 1e30])
def test_a_vector_without_a_direction_is_refused(vectors: Served, value: float) -> None:
    async def work(gateway: Gateway, behind: Behind) -> None:
        with pytest.raises(QueryError, match="no direction"):
            await search(gateway, DescriptorExample(np.full(64, value, np.float32)))

    on(vectors, work, encoder=GreyVector)


def test_several_codes_are_averaged_by_the_majority_of_their_bits(indexed: Served) -> None:
    codes, _ = AverageHash(indexed.model).encode([picture(seed) for seed in (1, 2, 3, 4)])
    bits = np.unpackbits(codes.data, axis=1)
    index = Index.open(indexed.index)
    for count in (3, 4):
        expected = []
        for bit in range(64):  # one by one, as it is written
            ones = sum(int(bits[n, bit]) for n in range(count))
            expected.append(int(bits[0, bit]) if 2 * ones == count else int(2 * ones > count))
        query = Codes(np.packbits(np.array(expected, np.uint8))[None], 64)

        async def work(gateway: Gateway, behind: Behind, count: int = count, query: Codes = query) -> None:
            found = await search(gateway, *(image(seed) for seed in range(1, count + 1)))
            assert rows(found) == index.search(query, 10).rows[0].tolist()

        on(indexed, work)


def test_the_best_of_several_examples_counts(indexed: Served) -> None:
    codes, _ = AverageHash(indexed.model).encode([picture(seed) for seed in (501, 502, 503)])
    everything = Index.open(indexed.index).descriptors().data
    differing = np.unpackbits(codes.data[:, None] ^ everything[None], axis=2).sum(axis=2)
    least = differing.min(axis=0)
    order = np.lexsort((np.arange(len(least)), least))[:25]

    async def work(gateway: Gateway, behind: Behind) -> None:
        examples = [image(seed) for seed in (501, 502, 503)]
        hits = (await search(gateway, *examples, k=25, combine="best", why=True)).hits
        assert [hit.row for hit in hits] == order.tolist()
        assert [hit.distance for hit in hits] == least[order].tolist()
        for hit in hits:
            assert hit.why is not None
            assert hit.why.differing is not None
            assert len(hit.why.differing) == hit.distance

    on(indexed, work)


def test_mean_vectors_are_of_length_one_and_opposite_ones_have_none(vectors: Served) -> None:
    described, _ = GreyVector(vectors.model).encode([picture(1), picture(2)])
    mean = described.data.astype(np.float64).mean(axis=0)
    query = Vectors((mean / np.linalg.norm(mean)).astype(np.float32)[None])
    expected = Index.open(vectors.index).search(query, 10).rows[0].tolist()

    async def work(gateway: Gateway, behind: Behind) -> None:
        assert rows(await search(gateway, image(1), image(2))) == expected
        one = described.data[0]
        with pytest.raises(QueryError, match="no direction"):
            await search(gateway, DescriptorExample(one), DescriptorExample(-one))

    on(vectors, work, encoder=GreyVector)


def test_why_names_the_bits_that_differ(indexed: Served) -> None:
    codes, _ = AverageHash(indexed.model).encode([picture(777)])
    stored = Index.open(indexed.index)

    async def work(gateway: Gateway, behind: Behind) -> None:
        for hit in (await search(gateway, image(777), k=3, why=True)).hits:
            own = stored.descriptors([hit.row]).data[0]
            both = zip(np.unpackbits(codes.data[0]), np.unpackbits(own), strict=True)
            assert hit.why is not None
            assert hit.why.differing == [number for number, (a, b) in enumerate(both) if a != b]
            assert hit.why.code == own.tobytes().hex()

    on(indexed, work)


def test_a_filter_holds_and_a_wrong_one_is_told(indexed: Served) -> None:
    async def work(gateway: Gateway, behind: Behind) -> None:
        hits = (await search(gateway, image(4), k=300, where="label = bee")).hits
        assert {hit.class_name for hit in hits} == {"bee"}
        assert len(hits) == 100
        none = await search(gateway, image(4), where="label = bee and label = ant")
        assert (none.hits, none.notes) == ([], ["no image of the index passes the filter"])
        with pytest.raises(QueryError):
            await search(gateway, image(4), where="nonsense = = 3")

    on(indexed, work)


def test_a_re_ranking_by_name_is_the_searchers_own(vectors: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: Any = {"qe": [{"name": "query_expansion", "n": 3}], "one": [{"name": "query_expansion", "n": 1}]}
    config = ServeConfig.model_validate({"rerank": steps, "default_rerank": "qe"})
    monkeypatch.setattr("ray_retrieval.query.Encoder", lambda model, **_: GreyVector(str(model)))
    searchers = {
        name: Searcher(vectors.index, vectors.model, threads=1, rerank=config.rerank[name]) for name in steps
    }

    async def work(gateway: Gateway, behind: Behind) -> None:
        for name, searcher in searchers.items():
            expected = searcher.search([picture(900)], 8)[0]
            hits = (await search(gateway, image(900), k=8, rerank=name)).hits
            assert [hit.row for hit in hits] == [hit.row for hit in expected]
            assert [hit.score for hit in hits] == [hit.score for hit in expected]
            assert [hit.distance for hit in hits] == [hit.distance for hit in expected]
        plain = await search(gateway, image(900), k=8, rerank="none")
        assert plain.hits[0].score is None
        default = await search(gateway, image(900), k=8)
        assert default.query.rerank == "qe"
        with pytest.raises(QueryError, match="no re-ranking 'x'"):
            await search(gateway, image(900), rerank="x")
        with pytest.raises(QueryError, match="filter"):
            await search(gateway, image(900), rerank="qe", where="label = bee")
        filtered = await search(gateway, image(900), where="label = bee")
        assert filtered.query.rerank == "none"
        assert "not re-ranked by qe" in filtered.notes[0]
        about = gateway.describe().indexes[0].rerankings
        assert {one.name: one.is_default for one in about} == {"none": False, "qe": True, "one": False}

    on(vectors, work, config=config, encoder=GreyVector)


def test_a_group_that_is_down_is_an_error_or_left_out_as_asked(indexed: Served) -> None:
    index = Index.open(indexed.index)
    codes, _ = AverageHash(indexed.model).encode([picture(31)])

    async def work(gateway: Gateway, behind: Behind) -> None:
        behind.down = {1}
        with pytest.raises(QueryError, match="does not answer") as caught:
            await search(gateway, image(31))
        assert caught.value.status == 503
        answer = await search(gateway, image(31), partial=True)
        assert answer.partial is not None
        assert (answer.partial.groups, answer.partial.rows, answer.partial.of_rows) == ([1], 100, 300)
        some = Index.open(indexed.index, shards=[0, 1]).search(codes, 10)
        assert rows(answer) == some.rows[0].tolist()
        behind.down = {0, 1}
        with pytest.raises(QueryError) as caught:
            await search(gateway, image(31), partial=True)
        assert caught.value.status == 503
        behind.down = set()
        await asyncio.sleep(1.2)  # Who was down is pinged until it is back.
        whole = await search(gateway, image(31), partial=True)
        assert whole.partial is None
        assert rows(whole) == index.search(codes, 10).rows[0].tolist()
        text = gateway.metrics().decode()
        assert 'ray_retrieval_partial_answers_total{index="x"} 1.0' in text
        assert 'ray_retrieval_failures_total{part="group",why="dead"}' in text

    on(indexed, work)


def test_a_slow_group_is_left_out_in_time(indexed: Served) -> None:
    async def work(gateway: Gateway, behind: Behind) -> None:
        behind.slow = {0: 30.0}
        start = asyncio.get_running_loop().time()
        answer = await search(gateway, image(31))
        assert answer.partial is not None
        assert answer.partial.groups == [0]
        assert asyncio.get_running_loop().time() - start < 5

    on(indexed, work, config=ServeConfig(partial="allow", group_timeout_s=0.3))


def test_a_request_past_its_deadline_is_refused_before_it_is_worked_on(indexed: Served) -> None:
    from ray_retrieval.serve.backend import SearchRequest

    async def work(gateway: Gateway, behind: Behind) -> None:
        with pytest.raises(QueryError, match="in time") as caught:
            await gateway.search(SearchRequest((image(1),)), deadline=soon(-1))
        assert caught.value.status == 503
        assert not behind.asked

    on(indexed, work)


def test_an_answer_of_another_version_is_no_answer(indexed: Served) -> None:
    async def work(gateway: Gateway, behind: Behind) -> None:
        rolling = gateway._rolling["x"]

        async def gone(query: Any, timeout_s: float) -> Any:
            raise GoneError("pruned")

        rolling.groups[0]._ask = gone
        with pytest.raises(QueryError, match="no longer there") as caught:
            await search(gateway, image(1))
        assert caught.value.status == 503

    on(indexed, work)


def test_an_answer_that_says_another_version_or_model_is_none(indexed: Served) -> None:
    async def work(gateway: Gateway, behind: Behind) -> None:
        rolling = gateway._rolling["x"]
        ask, parts = rolling.groups[0]._ask, rolling.parts

        async def of_another_version(query: Any, timeout_s: float) -> Any:
            found = await ask(query, timeout_s)
            return replace(found, version=replace(found.version, number=2))

        async def by_another_model(job: Any, timeout_s: float) -> Any:
            return replace(await parts.encode(job, timeout_s), model="0123456789abcdef")

        rolling.groups[0]._ask = of_another_version
        with pytest.raises(QueryError, match="no longer there"):
            await search(gateway, image(1))
        rolling.groups[0]._ask = ask
        assert (await search(gateway, image(1))).hits
        rolling.parts = replace(parts, encode=by_another_model)
        with pytest.raises(QueryError, match="no longer there"):
            await search(gateway, image(1))

    on(indexed, work)


def test_an_image_that_begins_well_and_ends_early_is_a_bad_request(indexed: Served) -> None:
    broken = ImageExample(picture(1, side=64, kind="JPEG")[:900], "JPEG", 64, 64)

    async def work(gateway: Gateway, behind: Behind) -> None:
        with pytest.raises(QueryError) as caught:
            await search(gateway, broken)
        assert caught.value.status == 400
        embedded = await gateway.embed([image(1), broken], None, deadline=soon())
        codes, _ = AverageHash(indexed.model).encode([picture(1)])
        assert embedded.descriptors[0].code == codes.data[0].tobytes().hex()  # type: ignore[union-attr]
        assert embedded.descriptors[1].error.problem  # type: ignore[union-attr]

    on(indexed, work)


def test_an_image_without_a_finite_vector_harms_no_other(vectors: Served) -> None:
    class Overflowing(GreyVector):
        def encode(self, images: list[bytes], box: Any = None) -> tuple[Vectors, dict[int, str]]:
            found, failures = super().encode(images)
            found.data[[one == picture(66) for one in images]] = np.nan
            return found, failures

    async def work(gateway: Gateway, behind: Behind) -> None:
        searches = [search(gateway, image(seed)) for seed in (66, 7, 66, 8)]
        first, second, third, fourth = await asyncio.gather(*searches, return_exceptions=True)
        for wrong in (first, third):
            assert isinstance(wrong, QueryError)
            assert (wrong.status, "not finite" in wrong.problem) == (422, True)
        assert [rows(one)[0] for one in (second, fourth)] == [7, 8]
        embedded = await gateway.embed([image(7), image(66)], None, deadline=soon())
        assert embedded.descriptors[0].vector is not None  # type: ignore[union-attr]
        assert embedded.descriptors[1].error.status == 422  # type: ignore[union-attr]

    on(vectors, work, encoder=Overflowing)


def test_thumbnails_and_originals_are_found_by_id(indexed: Served) -> None:
    async def work(gateway: Gateway, behind: Behind) -> None:
        for number, identifier in enumerate(indexed.ids[:6]):
            first = await gateway.thumbnail(identifier, 64, None)
            np.testing.assert_array_equal(pixels(first.data), pixels(picture(number)))
            assert await gateway.thumbnail(identifier, 64, "x") is first
            assert (await gateway.thumbnail(identifier, 16, None)).etag != first.etag
            original = await gateway.original(identifier, None)
            assert (original.data, original.media_type) == (picture(number), "image/png")
            record = await gateway.record(identifier, None)
            assert (record.id, record.row, record.label) == (identifier, number, number % 3)
        for look in (gateway.thumbnail("nobody", 64, None), gateway.original("../../etc/passwd/", None)):
            with pytest.raises(QueryError) as caught:
                await look
            assert caught.value.status == 404
        with pytest.raises(QueryError, match="no index 'y'"):
            await gateway.thumbnail(indexed.ids[0], 64, "y")

    on(indexed, work)


@pytest.mark.parametrize(
    ("error", "status", "match"), [(DataError, 404, "cannot be read"), (StoreError, 503, "does not answer")]
)
def test_an_image_that_cannot_be_read_does_not_tell_where_it_was(
    indexed: Served, monkeypatch: pytest.MonkeyPatch, error: type[DataError], status: int, match: str
) -> None:
    def lost(self: Index, row: int) -> bytes:
        raise error("the file is not there", where="/secret/place")

    monkeypatch.setattr(Index, "image_bytes", lost)

    async def work(gateway: Gateway, behind: Behind) -> None:
        for look in (gateway.thumbnail(indexed.ids[9], 100, None), gateway.original(indexed.ids[9], None)):
            with pytest.raises(QueryError, match=match) as caught:
                await look
            assert caught.value.status == status
            assert "secret" not in str(caught.value)

    on(indexed, work)


@pytest.mark.parametrize(
    "place", ["/secret/place/a.jpg", "s3://secret/place/a.jpg", r"C:\secret\place\a.jpg", "a.jpg"]
)
def test_of_the_place_of_an_image_its_name_alone_is_told(indexed: Served, place: str) -> None:
    record = {"id": "one", "row": 3, "label": 1, "path": place, "price": 2}
    told = known("x", Index.open(indexed.index), record)
    assert (told["path"], told["class_name"], told["columns"]) == ("a.jpg", "bee", {"price": 2})
    assert "secret" not in str(told)


def test_what_is_said_of_a_model_does_not_tell_where_its_data_lay(tmp_path: Path) -> None:
    training = {
        "root": "/secret/data/",
        "lists": ["s3://secret/train.csv", {"test": "~/secret/test.csv"}],
        "weights": "$SECRET/weights.pth",
        "epochs": 3,
        "optimiser": "sgd",
    }
    write_description(
        Folder(tmp_path), "model.json", kind="model", version=1, body={"training": training, "classes": 2}
    )
    told = card(Folder(tmp_path))
    assert told["training"] == {
        "root": "data",
        "lists": ["train.csv", {"test": "test.csv"}],
        "weights": "weights.pth",
        "epochs": 3,
        "optimiser": "sgd",
    }
    assert told["classes"] == 2


@pytest.mark.parametrize(
    "data", [b"<html><script>", b"<svg xmlns='http://www.w3.org/2000/svg'>", b"%PDF-", b""]
)
def test_what_is_no_image_is_given_as_none(data: bytes) -> None:
    assert media_type(data) == "application/octet-stream"


def test_a_photograph_of_a_phone_with_further_pictures_is_given_as_a_jpeg() -> None:
    file = io.BytesIO()
    first, second = (Image.open(io.BytesIO(picture(seed))) for seed in (1, 2))
    first.save(file, "MPO", save_all=True, append_images=[second])
    assert media_type(file.getvalue()) == "image/jpeg"


def test_a_sample_is_the_same_for_the_same_seed(indexed: Served) -> None:
    async def work(gateway: Gateway, behind: Behind) -> None:
        one = await gateway.sample(12, 5, None, None)
        assert one.images == (await gateway.sample(12, 5, None, None)).images
        assert len({image.id for image in one.images}) == 12
        assert one.images != (await gateway.sample(12, 6, None, None)).images
        bees = await gateway.sample(500, None, "label = bee", None)
        assert {image.class_name for image in bees.images} == {"bee"}
        assert len(bees.images) == 100

    on(indexed, work)


def test_the_map_is_made_once(vectors: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray_retrieval.serve import maps

    calls = []

    def counted(data: Any) -> Any:
        calls.append(1)
        return np.linspace(0, 1, 2 * len(data), dtype=np.float32).reshape(-1, 2)

    monkeypatch.setattr(maps, "places", counted)

    async def work(gateway: Gateway, behind: Behind) -> None:
        one, other = await asyncio.gather(gateway.map(None), gateway.map("x"))
        assert one == other
        assert len(one.spots) == 60
        assert "t-SNE of 60 images, Euclidean" in one.method
        assert sum(calls) == 1

    on(vectors, work, encoder=GreyVector)


def test_the_index_and_its_model_are_described(indexed: Served) -> None:
    async def work(gateway: Gateway, behind: Behind) -> None:
        await gateway.check()
        about = gateway.describe().indexes[0]
        assert (about.name, about.rows, about.bits, about.version) == ("x", 300, 64, 1)
        assert [shard["group"] for shard in about.shards] == [0, 0, 1]
        assert about.memory["mapped"] > 300 * 8
        assert about.card["fingerprint"] == about.model
        assert about.columns == {"id": "string", "label": "int64"}

    on(indexed, work)


def test_a_part_that_gives_no_sign_of_life_is_told(indexed: Served) -> None:
    async def work(gateway: Gateway, behind: Behind) -> None:
        behind.down = {1}
        with pytest.raises(QueryError, match="a group of shards"):
            await gateway.check()

    on(indexed, work)
