"""A server whose encoders run an export: it finds what the model finds."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from export_parts import made, saved
from gateway_parts import gateway_over, rows, search
from samples import coloured_table
from search_parts import write
from serving_parts import Served

from ray_retrieval import search as searching
from ray_retrieval.export import export
from ray_retrieval.methods.greedyhash import GreedyHash
from ray_retrieval.model import Encoder
from ray_retrieval.search import Index
from ray_retrieval.serve.backend import ImageExample
from ray_retrieval.serve.config import ServeConfig


def test_a_server_by_an_export_finds_what_the_model_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = coloured_table(24)
    model = saved(tmp_path / "model", made("greedyhash", table))
    export(model)
    encoder = Encoder(model)
    codes, _ = encoder.encode_table(table)
    assert len(np.unique(codes.data, axis=0)) > 3
    write(tmp_path / "embeddings", codes, table.table, model=encoder.fingerprint)
    searching.build(tmp_path / "embeddings", tmp_path / "index", shards=2)
    wanted = Index.open(tmp_path / "index").search(codes, 10)
    served = Served("", str(tmp_path / "index"), model, [])

    def not_asked(*_: object) -> None:
        raise AssertionError("the model itself is not to describe images")

    monkeypatch.setattr(GreedyHash, "describe", not_asked)

    async def ask() -> None:
        config = ServeConfig(engine="onnx")
        gateway, _ = gateway_over(served, encoder=Encoder, config=config)
        for row in range(0, len(table), 5):
            answer = await search(gateway, ImageExample(table.image_bytes(row), "PNG", 8, 8))
            assert rows(answer) == wanted.rows[row].tolist()
            assert [hit.distance for hit in answer.hits] == wanted.distances[row].tolist()

    asyncio.run(ask())
