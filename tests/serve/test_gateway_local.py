"""The gateway over indices of local features: shortlists of groups, verification, matches."""

import asyncio
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gateway_parts import Behind, gateway_over, rows, search, soon
from local_parts import draw_set, draw_view, local_set, together
from PIL import Image
from samples import coloured_table
from search_parts import draw_vectors, write
from serving_parts import Served, picture, write_model

from ray_retrieval import search as searching
from ray_retrieval.descriptors import Local, Vectors
from ray_retrieval.errors import QueryError
from ray_retrieval.search import Index, remove
from ray_retrieval.search.rerank import GeometricVerificationConfig
from ray_retrieval.search.verify import VerifyConfig, compare
from ray_retrieval.search.votes import LocalSearchConfig
from ray_retrieval.serve.backend import DescriptorExample, IdExample, ImageExample
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.gateway import Gateway
from ray_retrieval.storage import Folder

COUNT = 14
PICTURES = [picture(number, side=24) for number in range(3)]
SCENE = draw_set(120, seed=1)
SETS = {
    PICTURES[0]: SCENE,
    PICTURES[1]: draw_set(90, seed=40),
    PICTURES[2]: local_set(np.zeros((0, 16)), np.zeros((0, 2))),
}


class Features:
    """Describes three pictures by the features above, and all others by some of their own."""

    def __init__(self, model: str, *, threads: int = 1, batch_size: int = 1, engine: str = "torch") -> None:
        from ray_retrieval.model_folder import read_model_description

        _, self.fingerprint = read_model_description(Folder(model))
        self.one_size = False

    def encode(self, images: list[bytes], box: Any = None) -> tuple[Local, dict[int, str]]:
        return together([SETS.get(image) or draw_set(30, seed=len(image)) for image in images]), {}

    def close(self) -> None: ...


def views() -> Local:
    shared = (0, 60, 0, 40, 0, 0, 0, 50, 0, 0, 0, 0, 0, 0)
    return together([draw_view(SCENE, many, seed=number)[0] for number, many in enumerate(shared)])


def built(folder: Path, shortlist: str) -> Served:
    model = write_model(Folder(folder / "model"), note="local")
    write(folder / "embeddings", views(), coloured_table(COUNT, classes=2).table, model=model)
    config = LocalSearchConfig.model_validate(
        {"shortlist": shortlist, "words": 8 if shortlist == "asmk" else None}
    )
    searching.build(folder / "embeddings", folder / "index", shards=3, local=config)
    ids = Index.open(folder / "index").records(np.arange(COUNT))["id"].to_pylist()
    return Served("", str(folder / "index"), str(folder / "model"), ids)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return built(tmp_path_factory.mktemp("local"), "exact")


def on(served: Served, work: Callable[[Gateway, Behind], Any], **options: Any) -> Any:
    async def run() -> Any:
        return await work(*gateway_over(served, encoder=Features, **options))

    return asyncio.run(run())


def photograph(number: int) -> ImageExample:
    return ImageExample(PICTURES[number], "PNG", 24, 24)


@pytest.mark.parametrize(
    ("shortlist", "where", "few"),
    [
        ("exact", None, 0),
        ("asmk", "label = 1", 0),
        *(("votes", where, few) for where in (None, "label = 1") for few in (0, 400, 10**6)),
    ],
)
def test_groups_find_the_shortlist_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shortlist: str, where: str | None, few: int
) -> None:
    monkeypatch.setattr("ray_retrieval.search.neighbours._FEW", few)
    served = built(tmp_path, shortlist)
    remove(served.index, [served.ids[5]])
    expected = Index.open(served.index).search(SCENE, 10, where=where)
    real = expected.rows[0] >= 0

    async def work(gateway: Gateway, behind: Behind) -> None:
        answer = await search(gateway, photograph(0), rerank="none", where=where)
        assert rows(answer) == expected.rows[0][real].tolist()
        assert [hit.distance for hit in answer.hits] == expected.distances[0][real].tolist()

    for groups in (1, 3):
        on(served, work, groups=groups)


def test_verified_hits_are_those_of_the_step_and_say_where_their_inliers_lie(local: Served) -> None:
    index = Index.open(local.index)
    config = GeometricVerificationConfig()

    async def work(gateway: Gateway, behind: Behind) -> None:
        answer = await search(gateway, photograph(0), k=6, why=True)
        assert answer.query.rerank == "geometric_verification"
        assert set(rows(answer)[:3]) == {1, 3, 7}
        for hit in answer.hits:
            pairs, geometry = compare(SCENE, _local(index, hit.row), config)
            count = 0 if geometry is None else int(geometry.inliers.sum())
            assert hit.inliers == (count if count >= config.min_inliers else 0)
            if hit.inliers:
                assert hit.in_words == f"{hit.inliers} inliers"
                assert hit.why is not None
                assert geometry is not None
                wanted = SCENE.locations[pairs[geometry.inliers][:, 0]]
                np.testing.assert_allclose(hit.why.query_points, wanted)
                assert hit.why.size == (640, 480)
        assert (await search(gateway, photograph(1))).notes[0].startswith("no match found")
        nothing = await search(gateway, photograph(2))
        assert (nothing.hits, nothing.notes) == ([], ["the model finds no features in the image"])

    on(local, work)


@pytest.mark.parametrize(
    ("default", "used"),
    [(None, "geometric_verification"), ("qe", "geometric_verification"), ("none", "none")],
)
def test_local_features_are_verified_whatever_is_the_default_of_other_indices(
    local: Served, default: str | None, used: str
) -> None:
    rerank: Any = {"qe": [{"name": "query_expansion"}]}
    config = ServeConfig.model_validate({"rerank": rerank, "default_rerank": default})

    async def work(gateway: Gateway, behind: Behind) -> None:
        assert (await search(gateway, photograph(0))).query.rerank == used

    on(local, work, config=config)


def test_several_photographs_count_by_the_best_and_have_no_average(local: Served) -> None:
    async def work(gateway: Gateway, behind: Behind) -> None:
        with pytest.raises(QueryError, match="no average") as caught:
            await search(gateway, photograph(0), photograph(1))
        assert caught.value.mend == "set combine to best"
        alone = await search(gateway, photograph(0))
        both = await search(gateway, photograph(1), photograph(0), combine="best")
        assert rows(both)[:3] == rows(alone)[:3]

    on(local, work)


def test_an_image_of_the_index_is_its_own_best_match(local: Served) -> None:
    async def work(gateway: Gateway, behind: Behind) -> None:
        answer = await search(gateway, IdExample(local.ids[3]), k=3)
        assert rows(answer)[0] == 3
        found = await gateway.match(IdExample(local.ids[1]), photograph(0), None, deadline=soon())
        pairs, geometry = compare(_local(Index.open(local.index), 1), SCENE, VerifyConfig())
        assert geometry is not None
        assert (found.same_scene, found.putatives) == (True, len(pairs))
        assert found.inliers == int(geometry.inliers.sum()) == len(found.points[0]) == len(found.points[1])
        assert found.features == (120, 120)
        drawn = await gateway.match_picture(photograph(0), IdExample(local.ids[1]), None, deadline=soon())
        assert Image.open(io.BytesIO(drawn)).format == "PNG"

    on(local, work)


def test_vectors_are_verified_by_the_local_features_of_another_index(
    local: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(Folder(tmp_path / "model"), note="vectors")
    vectors = draw_vectors(COUNT, 8, seed=3)
    write(tmp_path / "embeddings", vectors, coloured_table(COUNT, classes=2).table, model=model)
    searching.build(tmp_path / "embeddings", tmp_path / "index", shards=2)
    served = Served("", str(tmp_path / "index"), str(tmp_path / "model"), local.ids)
    step = {"name": "geometric_verification", "local": local.index}
    config = ServeConfig.model_validate({"rerank": {"gv": [step]}, "default_rerank": "gv"})

    class Both(Features):
        def encode(self, images: list[bytes], box: Any = None) -> Any:
            if self.fingerprint != model:
                return super().encode(images)
            return Vectors(np.repeat(vectors.data[3:4], len(images), axis=0)), {}

    async def work(gateway: Gateway, behind: Behind) -> None:
        answer = await search(gateway, photograph(0), k=6, rerank="gv", why=True)
        assert set(rows(answer)[:3]) == {1, 3, 7}
        first = answer.hits[0]
        assert first.inliers
        assert first.in_words.startswith(f"{first.inliers} inliers, cosine")
        cosines: npt.NDArray[Any] = vectors.data[rows(answer)] @ vectors.data[3]
        np.testing.assert_allclose([hit.similarity for hit in answer.hits], cosines, atol=1e-6)
        assert first.why is not None
        assert first.why.points is not None
        assert len(first.why.points) == first.inliers
        for examples in ((DescriptorExample(vectors.data[3]),), (photograph(0), photograph(1))):
            with pytest.raises(QueryError, match="one by one") as caught:
                await search(gateway, *examples, rerank="gv")
            assert caught.value.status == 422
            unasked = await search(gateway, *examples)
            assert unasked.query.rerank == "none"
            assert "not re-ranked by gv: it compares images or ids one by one" in unasked.notes[0]
        both = await search(gateway, photograph(0), photograph(1), combine="best")
        assert (both.query.rerank, both.notes) == ("gv", [])

    async def run() -> None:
        await work(*gateway_over(served, encoder=Both, config=config))

    asyncio.run(run())


def test_a_new_local_model_beside_an_index_is_prepared_and_used(local: Served, tmp_path: Path) -> None:
    for name in ("index", "model"):
        shutil.copytree(Path(local.index).parent / name, tmp_path / "beside" / name)
    model = write_model(Folder(tmp_path / "model"), note="vectors")
    vectors = draw_vectors(COUNT, 8, seed=3)
    write(tmp_path / "embeddings", vectors, coloured_table(COUNT, classes=2).table, model=model)
    searching.build(tmp_path / "embeddings", tmp_path / "index", shards=2)
    served = Served("", str(tmp_path / "index"), str(tmp_path / "model"), local.ids)
    step = {"name": "geometric_verification", "local": str(tmp_path / "beside" / "index")}
    config = ServeConfig.model_validate({"rerank": {"gv": [step]}, "poll_s": 0.05})

    class Both(Features):
        def encode(self, images: list[bytes], box: Any = None) -> Any:
            if self.fingerprint != model:
                return super().encode(images)
            return Vectors(np.repeat(vectors.data[3:4], len(images), axis=0)), {}

    renewed = write_model(Folder(tmp_path / "renewed"), note="local, anew")
    write(tmp_path / "anew", views(), coloured_table(COUNT, classes=2).table, model=renewed)
    exact = LocalSearchConfig.model_validate({"shortlist": "exact"})
    searching.build(tmp_path / "anew", tmp_path / "built", shards=3, local=exact)

    async def run() -> None:
        gateway, behind = gateway_over(served, encoder=Both, config=config)
        before = await search(gateway, photograph(0), k=6, rerank="gv")
        for name in ("model", "index"):
            shutil.rmtree(tmp_path / "beside" / name)
        write_model(Folder(tmp_path / "beside" / "model"), note="local, anew")
        (tmp_path / "built").rename(tmp_path / "beside" / "index")
        for _ in range(100):
            await asyncio.sleep(0.05)
            if renewed in [one.fingerprint for one in behind.models]:
                break
        await gateway._rolling["x"].refresh()
        after = await search(gateway, photograph(0), k=6, rerank="gv")
        assert (rows(after), after.index) == (rows(before), before.index)
        found = gateway._rolling["x"].live.rerankings.local_model()
        assert found is not None
        assert found.fingerprint == renewed
        assert [one.fingerprint for one in behind.models][-2:] == [model, renewed]

    asyncio.run(run())


def test_photographs_are_not_matched_by_codes(indexed: Served) -> None:
    from gateway_parts import image

    async def run() -> None:
        gateway, _ = gateway_over(indexed)
        with pytest.raises(QueryError, match="local features") as caught:
            await gateway.match(image(1), image(2), None, deadline=soon())
        assert caught.value.status == 422

    asyncio.run(run())


def _local(index: Index, row: int) -> Local:
    found = index.descriptors([row])
    assert isinstance(found, Local)
    return found
