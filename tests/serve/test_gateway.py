"""The gateway over a real index, with functions of this process in the place of encoders and shard groups."""

import asyncio
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from serving_parts import AverageHash, GreyVector, Served, make_index, picture, pixels

from ray_retrieval.errors import DataError, QueryError
from ray_retrieval.search import Index
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.gateway import Gateway, SearchGroup
from ray_retrieval.serve.wire import GroupHits, Row, identity


def group_of(served: Served, shards: list[int]) -> SearchGroup:
    index = Index.open(served.index, shards=shards)

    async def search(query: tuple[Row, int]) -> GroupHits:
        row, k = query
        hits = index.search(index.form.with_rows(row[None]), k)
        return GroupHits(identity(index), hits.distances[0], hits.rows[0])

    return search


async def nothing() -> None:
    pass


def gateway_over(
    served: Served, groups: list[SearchGroup], kind: type[AverageHash | GreyVector] = AverageHash
) -> Gateway:
    encoder = kind(served.model)

    async def encode(image: bytes) -> Row | str:
        described, failures = encoder.encode([image])
        reason = failures.get(0)
        return described.data[0] if reason is None else reason

    index = Index.open(served.index)
    return Gateway(index, encode=encode, groups=groups, pings=[nothing], config=ServeConfig())


@pytest.fixture(scope="module")
def gateway(indexed: Served) -> Gateway:
    return gateway_over(indexed, [group_of(indexed, [2]), group_of(indexed, [0, 1])])


@pytest.mark.parametrize("k", [1, 7, 300, 500])
def test_groups_together_find_what_the_whole_index_finds(gateway: Gateway, indexed: Served, k: int) -> None:
    codes, _ = AverageHash(indexed.model).encode([picture(5000)])
    expected = Index.open(indexed.index).search(codes, k)
    hits = asyncio.run(gateway.search(picture(5000), k)).hits
    assert [hit.row for hit in hits] == [row for row in expected.rows[0].tolist() if row >= 0]
    assert [hit.distance for hit in hits] == expected.distances[0][: len(hits)].tolist()
    assert [hit.id for hit in hits] == [indexed.ids[hit.row] for hit in hits]


def test_vectors_are_answered_with_their_cosines(tmp_path: Path) -> None:
    served = make_index(tmp_path, count=40, encoder=GreyVector)
    groups = [group_of(served, [1]), group_of(served, [0, 2])]
    gateway = gateway_over(served, groups, GreyVector)
    everything, _ = GreyVector(served.model).encode([picture(number) for number in range(40)])
    cosines = everything.data[7] @ everything.data.T
    hits = asyncio.run(gateway.search(picture(7), 40)).hits
    assert [hit.row for hit in hits] == np.argsort(-cosines, kind="stable").tolist()
    assert [hit.similarity for hit in hits] == pytest.approx(np.sort(cosines)[::-1].tolist(), abs=1e-6)
    assert (hits[0].row, hits[0].distance) == (7, 0)
    about = gateway.describe()
    assert (about.kind, about.dimension, about.bits, about.metric) == (
        "vectors",
        64,
        None,
        "squared euclidean",
    )


def test_groups_of_another_index_give_no_answer(gateway: Gateway, indexed: Served) -> None:
    true = group_of(indexed, [0, 1, 2])

    async def other(query: tuple[Row, int]) -> GroupHits:
        return dataclasses.replace(await true(query), index="another")

    with pytest.raises(QueryError, match="has changed") as caught:
        asyncio.run(gateway_over(indexed, [other]).search(picture(1), 3))
    assert caught.value.status == 503


def test_an_image_that_begins_well_and_ends_early_is_a_bad_request(gateway: Gateway) -> None:
    with pytest.raises(QueryError) as caught:
        asyncio.run(gateway.search(picture(1, side=64, kind="JPEG")[:900], 3))
    assert caught.value.status == 400


def test_thumbnails_are_found_by_id_and_kept(gateway: Gateway, indexed: Served) -> None:
    for number, identifier in enumerate(indexed.ids[:6]):
        first = asyncio.run(gateway.thumbnail(identifier, 64))
        np.testing.assert_array_equal(pixels(first.data), pixels(picture(number)))
        assert asyncio.run(gateway.thumbnail(identifier, 64)) is first
        assert asyncio.run(gateway.thumbnail(identifier, 16)).etag != first.etag


def test_an_image_that_cannot_be_read_does_not_tell_where_it_was(
    gateway: Gateway, indexed: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(self: Index, row: int) -> bytes:
        raise DataError("the file is missing", where="/secret/place")

    monkeypatch.setattr(Index, "image_bytes", lost)
    with pytest.raises(QueryError, match="cannot be read") as caught:
        asyncio.run(gateway.thumbnail(indexed.ids[9], 100))
    assert caught.value.status == 404
    assert "secret" not in str(caught.value)


def test_a_part_that_gives_no_sign_of_life_is_told(indexed: Served) -> None:
    async def dead() -> None:
        raise QueryError("the encoder does not answer", status=503)

    index = Index.open(indexed.index)
    gateway = Gateway(index, encode=dead, groups=[], pings=[nothing, dead], config=ServeConfig())  # type: ignore[arg-type]
    with pytest.raises(QueryError, match="the encoder"):
        asyncio.run(gateway.check())


def test_identities_tell_indices_of_the_same_number_apart(indexed: Served, tmp_path: Path) -> None:
    from ray_retrieval.search import build

    build(f"{Path(indexed.index).parent}/embeddings", tmp_path / "other", shards=2)
    one, other = Index.open(indexed.index), Index.open(tmp_path / "other")
    assert one.version == other.version
    assert identity(one) != identity(other)
    assert identity(one) == identity(Index.open(indexed.index))
