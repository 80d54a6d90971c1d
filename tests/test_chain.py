"""Train, evaluate, export, infer: hashing methods at every published length, on tiny images."""

import numpy as np
import pytest
import torch
from samples import coloured_benchmark, sized

from ray_retrieval import engines, model
from ray_retrieval.data.transforms import prepare
from ray_retrieval.export import export
from ray_retrieval.layers.backbones import BackboneConfig
from ray_retrieval.loop import Process, TrainConfig, Trainer, read_outcome
from ray_retrieval.methods import METHODS, build
from ray_retrieval.methods.hashing import HashingMethod
from ray_retrieval.metrics import hamming
from ray_retrieval.storage import Folder

PUBLISHED = {
    "greedyhash": (12, 24, 32, 48),
    "hashnet": (16, 32, 48, 64),
    "greedyhash_unsupervised": (16, 32, 64),
}
CASES = [
    # The shortest and the longest always; those between are no other in kind.
    pytest.param(name, bits, marks=[] if bits in (lengths[0], lengths[-1]) else pytest.mark.long)
    for name, lengths in PUBLISHED.items()
    for bits in lengths
]


class OneCheckpoint:
    """Keeps the last checkpoint of a training in a folder."""

    def __init__(self, folder):
        self.folder = folder

    def latest(self):
        return None

    def epoch_done(self, record):
        pass

    def checkpoint(self, name, metrics, write):
        self.folder.mkdir(parents=True, exist_ok=True)
        write(self.folder)


def test_every_hashing_method_goes_the_chain():
    assert set(PUBLISHED) == {n for n, (_, method) in METHODS.items() if issubclass(method, HashingMethod)}


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize(("name", "bits"), CASES)
def test_from_training_to_the_exported_codes(name, bits, tmp_path):
    torch.manual_seed(0)
    several = name == "hashnet"  # one method on several labels an image, the others on one
    benchmark = coloured_benchmark(48, several_labels=several)
    backbone = BackboneConfig(name="small", weights="none")
    config = sized(name, bits, backbone=backbone, image={"size": 16})
    train = TrainConfig(epochs=1, batch_size=16, precision="float32", optimizer={"lr": 0.05})
    reporter = OneCheckpoint(tmp_path / "checkpoint")
    Trainer(build(config, classes=3), benchmark, train, seed=1, process=Process()).fit(reporter)
    outcome = read_outcome(reporter.folder)
    model.save(
        Folder(tmp_path / "model"),
        config=config.model_dump(mode="json"),
        weights=outcome.weights["last"],
        classes=3,
        class_names=None,
        precision=outcome.precision,
        training={"epoch": 1},
        metrics={},
    )
    encoder = model.Encoder(str(tmp_path / "model"))
    queries, _ = encoder.encode_table(benchmark.queries)
    database, failures = encoder.encode_table(benchmark.database)
    assert not failures
    report = hamming.evaluate(
        queries.data, benchmark.queries.labels, database.data, benchmark.database.labels, bits=bits
    )
    assert report.bits == bits
    assert 0 < report.map["row"].value <= 1
    described = export(str(tmp_path / "model"), tmp_path / "export", form="torch")
    run = engines.FORMS["torch"].open(tmp_path / "export" / described["file"]["file"])
    table = benchmark.queries
    images = np.stack([prepare(table.image_bytes(row), encoder.preprocessing) for row in range(len(table))])
    codes, relaxed = run(images)
    assert np.array_equal(codes, queries.data)
    assert relaxed.shape == (len(table), bits)
