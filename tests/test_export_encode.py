"""An export encodes in the place of the model."""

from dataclasses import replace

import numpy as np
import pytest
from export_parts import made, saved
from samples import coloured_table, write_images

from ray_retrieval.data.table import ImageTable, open_images
from ray_retrieval.encode import EncodeConfig, EncodeJob, encode
from ray_retrieval.errors import ArtefactError, DataError
from ray_retrieval.export import export
from ray_retrieval.model import Encoder
from ray_retrieval.search.embeddings import Embeddings
from ray_retrieval.storage import Folder


def test_an_export_encodes_in_the_place_of_the_model(encoding_here, tmp_path):
    table = coloured_table(12)
    source = saved(tmp_path / "model", made("greedyhash", table))
    job = EncodeJob(Folder(source), table, Folder(tmp_path / "out"))
    config = EncodeConfig(workers=1, threads=1, engine="onnx")
    with pytest.raises(ArtefactError, match="no export of model"):
        encode([job], config)
    export(source)
    assert encode([job], config) == 12
    found = Embeddings.open(str(tmp_path / "out"))
    encoder = Encoder(source, device="cpu")
    wanted, _ = encoder.encode_table(table)
    assert (found.engine, found.model) == ("onnx", encoder.fingerprint)
    np.testing.assert_array_equal(found.descriptors.data, wanted.data)
    assert encode([job], config) == 0
    assert found.export == job.export.checksum
    key = job.key(config, "m", 0, 12)
    job.export = replace(job.export, description={"file": {"sha256": "of another export"}})
    other = job.key(config, "m", 0, 12)
    job.export = None
    assert len({key, other, job.key(EncodeConfig(), "m", 0, 12)}) == 3


def test_what_is_mended_is_encoded_with_the_next_start(encoding_here, tmp_path):
    folder = write_images(tmp_path / "photos", 12)
    files = sorted(folder.rglob("*.png"))
    whole = files[0].read_bytes()
    for file in files[:2]:
        file.write_bytes(b"no image")
    source = saved(tmp_path / "model", made("greedyhash", coloured_table(12)))
    config = EncodeConfig(workers=1, threads=1, rows_per_part=4)

    def encoded():
        job = EncodeJob(Folder(source), open_images(str(folder)), Folder(tmp_path / "out"))
        count = encode([job], config)
        return count, Embeddings.open(str(tmp_path / "out")).error_count

    assert [encoded(), encoded()] == [(12, 2), (0, 2)]
    files[0].write_bytes(whole)
    assert [encoded(), encoded()] == [(4, 1), (0, 1)]


def test_a_column_that_embeddings_need_is_refused_before_any_image_is_described(tmp_path, monkeypatch):
    table = coloured_table(3)
    named = ImageTable(table.table.append_column("path", [table.ids]), name="set.parquet")
    source = saved(tmp_path / "model", made("greedyhash", table))
    monkeypatch.setattr("ray_retrieval.encode._run", None)
    with pytest.raises(DataError, match=r"set.parquet: column 'path' of the images has a name that"):
        encode([EncodeJob(Folder(source), named, Folder(tmp_path / "out"))], EncodeConfig())
