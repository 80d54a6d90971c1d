"""Trainings counted in steps, and what they write down: the log, events for TensorBoard, recordings."""

import json
import struct

import numpy as np
import pytest
import safetensors.torch
import torch
from loop_parts import LocalReporter, config, loss_curve, trainer
from pydantic import ValidationError
from samples import coloured_benchmark

from ray_retrieval.data.source import ImageSource
from ray_retrieval.errors import RecipeError
from ray_retrieval.loop import TrainConfig, read_outcome
from ray_retrieval.loop import trainer as loop_trainer
from ray_retrieval.loop.steplog import StepLog, read_steps
from ray_retrieval.loop.tensorboard import refuse_remote
from ray_retrieval.storage import Folder

BATCHES = 8  # of 8 or 7 of 60 images
PLAIN = {"epochs": None, "schedule": {"name": "constant"}}
TIMES = ("seconds", "waiting_seconds", "computing_seconds", "images_per_second")


def steps_config(steps, **changes):
    return config(**{**PLAIN, "steps": steps, **changes})


def lasting(records):
    """Lines of the log without what differs from run to run."""
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def weights(reporter):
    return read_outcome(reporter.latest()).weights


class TestLength:
    def test_whole_epochs_are_the_same_in_steps(self, tmp_path):
        reporters = [LocalReporter(tmp_path / name) for name in "ab"]
        schedule = {"name": "linear", "end": 0.001}
        epochs = trainer(config(epochs=2, schedule=schedule)).fit(reporters[0])
        steps = trainer(steps_config(2 * BATCHES, schedule=schedule)).fit(reporters[1])
        assert loss_curve(epochs) == loss_curve(steps)
        expected, found = (weights(reporter)["last"] for reporter in reporters)
        assert all(torch.equal(found[name], value) for name, value in expected.items())

    def test_training_ends_within_an_epoch(self, tmp_path):
        reporter, run = LocalReporter(tmp_path / "c"), Folder(tmp_path / "run")
        history = trainer(steps_config(BATCHES + 3, log={"every": 1})).fit(reporter, run)
        assert [(record["epoch"], record["step"]) for record in history] == [(1, BATCHES), (2, BATCHES + 3)]
        assert "validation" in history[-1]
        outcome = read_outcome(reporter.latest())
        assert (outcome.epochs["last"], outcome.steps["last"]) == (2, BATCHES + 3)
        # The loss of the epoch is the mean over what was seen of it.
        lines = [record for record in read_steps(run) if record["epoch"] == 2]
        sizes = [len(part) for part in np.array_split(np.arange(60), BATCHES)][: len(lines)]
        assert history[-1]["loss"] == pytest.approx(np.average([r["loss"] for r in lines], weights=sizes))

    def test_rounds_that_are_not_trained_are_not_mined(self, tmp_path):
        mined = []
        loss = {"name": "contrastive", "negatives": 2, "queries": 24, "pool": 40, "rounds": 2}
        image = {"size": 20, "resize": "long_side"}
        made = trainer(
            steps_config(6, augmentation={}, validation={"every": 9}),
            method="gem",
            image=image,
            loss=loss,
            projection=True,
            benchmark=coloured_benchmark(60, mixed_sizes=True),
        )
        before = made.method.before_round
        made.method.before_round = lambda clock, encode: (mined.append(clock.round), before(clock, encode))
        assert made.fit(LocalReporter(tmp_path))[-1]["step"] == 6  # the steps of a round
        assert mined == [0]

    def test_either_epochs_or_steps_say_how_long(self):
        assert TrainConfig().length == (50, "epochs")
        counted = TrainConfig(steps=7)
        assert counted.length == (7, "steps")
        assert TrainConfig.model_validate(counted.model_dump()) == counted
        assert (TrainConfig(epochs=3).total_steps(5), counted.total_steps(5)) == (15, 7)
        with pytest.raises(ValidationError, match=r"either 'epochs' or 'steps' .* got both"):
            TrainConfig(steps=7, epochs=3)
        with pytest.raises(ValidationError, match=r"either 'epochs' or 'steps' .* got neither"):
            TrainConfig(epochs=None)


WITHIN = {
    "validation": {"every_steps": 3},
    "checkpoint": {"min_seconds": 0, "every_steps": 3},
    "log": {"every": 2},
    "clip_norm": 1.0,
}


class TestWithinAnEpoch:
    @pytest.mark.parametrize("stop_after", [1, 2, 4])
    def test_a_killed_run_leaves_what_an_undisturbed_one_does(self, tmp_path, stop_after):
        settings = steps_config(13, **WITHIN)
        runs = [Folder(tmp_path / name) for name in ("run", "killed")]
        reporters = [LocalReporter(tmp_path / name) for name in ("a", "b")]
        undisturbed = trainer(settings).fit(reporters[0], runs[0])
        with pytest.raises(KeyboardInterrupt):
            trainer(settings).fit(LocalReporter(tmp_path / "b", stop_after), runs[1])
        # As if it had come further before it was killed.
        later = read_steps(runs[0])[-1]
        runs[1].write_text(
            "steps.jsonl", "".join(json.dumps(line) + "\n" for line in [*read_steps(runs[1]), later])
        )
        resumed = trainer(settings).fit(reporters[1], runs[1])
        assert loss_curve(resumed) == loss_curve(undisturbed)
        lines = [read_steps(run) for run in runs]
        assert [line["step"] for line in lines[0]] == [2, 3, 4, 6, 8, 9, 10, 12, 13]
        assert lasting(lines[0]) == lasting(lines[1])
        expected, found = (weights(reporter) for reporter in reporters)
        for which in ("best", "last"):
            assert all(torch.equal(found[which][name], value) for name, value in expected[which].items())

    def test_the_best_model_may_be_one_within_an_epoch(self, tmp_path, monkeypatch):
        values = iter([0.2, 0.9, 0.4, 0.3, 0.1])  # after steps 3, 6, 8 (the epoch's end), 9 and 10
        monkeypatch.setattr(loop_trainer, "measure", lambda *_, **__: {"map": next(values)})
        reporter, run = LocalReporter(tmp_path / "c"), Folder(tmp_path / "run")
        history = trainer(steps_config(10, **WITHIN)).fit(reporter, run)
        outcome = read_outcome(reporter.latest())
        assert outcome.steps == {"best": 6, "last": 10}
        assert outcome.epochs == {"best": 1, "last": 2}
        assert outcome.validation == {"best": {"map": 0.9}, "last": {"map": 0.1}}
        within = safetensors.torch.load_file(tmp_path / "c" / "epoch_0000_batch_000006" / "last.safetensors")
        assert all(torch.equal(outcome.weights["best"][name], value) for name, value in within.items())
        assert [record["validation"]["map"] for record in history] == [0.4, 0.1]
        measured = {
            line["step"]: line["validation"]["map"] for line in read_steps(run) if "validation" in line
        }
        assert measured == {3: 0.2, 6: 0.9, 8: 0.4, 9: 0.3, 10: 0.1}

    def test_a_loss_that_is_not_finite_ends_a_long_epoch(self, tmp_path):
        settings = steps_config(100, optimizer={"lr": 1e30}, log={"every": 2})
        made = trainer(settings, benchmark=coloured_benchmark(240))
        with pytest.raises(RecipeError, match=r"train.optimizer.lr: the loss is not finite in epoch 1"):
            made.fit(LocalReporter(tmp_path))
        assert made.progress.step < 10


class TestLog:
    def test_lines_are_means_since_the_line_before(self, tmp_path):
        runs = {every: Folder(tmp_path / str(every)) for every in (1, 4)}
        for every, run in runs.items():
            made = trainer(steps_config(6, log={"every": every}, clip_norm=0.5))
            made.fit(LocalReporter(tmp_path / f"checkpoints{every}"), run)
        each, lines = read_steps(runs[1]), read_steps(runs[4])
        assert [line["step"] for line in lines] == [4, 6]
        sizes = [len(part) for part in np.array_split(np.arange(60), BATCHES)]
        for line, part in zip(lines, (slice(0, 4), slice(4, 6)), strict=True):
            mean = np.average([one["loss"] for one in each[part]], weights=sizes[part])
            assert line["loss"] == pytest.approx(mean)
            assert line["loss"] == pytest.approx(sum(line["terms"].values()))
            assert line["gradient_norm"] == pytest.approx(
                np.mean([one["gradient_norm"] for one in each[part]])
            )
            assert line["lr"] == 0.05
            assert line["seconds"] == pytest.approx(
                line["waiting_seconds"] + line["computing_seconds"], abs=2e-6
            )
            assert line["images_per_second"] > 0

    def test_norms_are_logged_only_where_gradients_are_clipped(self, tmp_path):
        trainer(steps_config(2)).fit(LocalReporter(tmp_path / "c"), Folder(tmp_path / "run"))
        (line,) = read_steps(Folder(tmp_path / "run"))
        assert "gradient_norm" not in line

    def test_another_training_starts_the_log_anew(self, tmp_path):
        run = Folder(tmp_path)
        log = StepLog(run, 0)
        log.add({"step": 100})
        log.write()
        assert read_steps(run) == [{"step": 100}]
        StepLog(run, 99)
        assert read_steps(run) == []


def events(folder):
    """All events of the files in a folder, read without TensorBoard: length, checksum, bytes, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.iterdir()):
        data, place = file.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event()
            event.ParseFromString(data[place + 12 : place + 12 + length])
            yield event
            place += 16 + length


class TestTensorBoard:
    def test_losses_histograms_and_pictures_are_there(self, tmp_path):
        settings = steps_config(
            5, tensorboard=True, log={"every": 2, "histograms_every": 5}, validation={"every_steps": 4}
        )
        made = trainer(settings)
        made.method.pictures = lambda images: {"negative": 255 - images}
        made.fit(LocalReporter(tmp_path / "c"), Folder(tmp_path / "run"))
        values = {}
        for event in events(tmp_path / "run" / "tensorboard"):
            for value in event.summary.value:
                values[value.tag, event.step] = value
        lines = read_steps(Folder(tmp_path / "run"))
        assert [line["step"] for line in lines] == [2, 4, 5]
        for line in lines:
            assert values["loss/total", line["step"]].simple_value == pytest.approx(line["loss"])
            assert values["optimizer/lr", line["step"]].simple_value == pytest.approx(0.05)
            assert ("time/waiting_seconds", line["step"]) in values
        assert {step for tag, step in values if tag == "validation/map"} == {4, 5}
        for number in range(4):
            picture = values[f"negative/{number}", 4].image
            assert (picture.width, picture.height) == (16, 16)
        for name, parameter in made.method.named_parameters():
            for kind, tensor in (("parameters", parameter.detach()), ("gradients", parameter.grad)):
                histogram = values[f"{kind}/{name}", 5].histo
                assert sum(histogram.bucket) == histogram.num == tensor.numel()
                assert histogram.sum == pytest.approx(float(tensor.double().sum()), abs=1e-6)
                assert (histogram.min, histogram.max) == (float(tensor.min()), float(tensor.max()))

    def test_events_are_not_written_to_a_store(self):
        with pytest.raises(RecipeError, match=r"train.tensorboard: .* local folder"):
            refuse_remote(Folder("mock://bucket/run"))


@pytest.mark.parametrize("steps", [6, 3])
def test_some_steps_are_recorded(tmp_path, steps):
    """Also where a training ends before all have been."""
    settings = steps_config(steps, profile={"wait": 1, "steps": 4}, validation={"every": 9})
    trainer(settings).fit(LocalReporter(tmp_path / "c"), Folder(tmp_path / "run"))
    trace = json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())
    recorded = {event["name"] for event in trace["traceEvents"] if "ProfilerStep" in event.get("name", "")}
    assert len(recorded) >= min(4, steps - 1)
    assert "aten::" in (tmp_path / "run" / "profile" / "operators.txt").read_text()


def test_totals_are_the_sums_over_the_rows():
    made = trainer(config(batch_size=4, augmentation={"flip": True}))
    rows = np.array([7, 3, 3, 50, *range(20)])

    def work(images):
        outputs = next(iter(made.method(images).values())).double()
        return {"count": torch.tensor(float(len(images)), dtype=torch.float64), "sum": outputs.sum(dim=0)}

    found = made.encode.totals(rows, work)
    table, preprocessing = made.benchmark.train, made.method.preprocessing
    with ImageSource(table, preprocessing, memory_bytes=0, threads=1) as source, torch.no_grad():
        made.method.eval()
        expected = work(source.batch(rows))
    assert float(found["count"]) == 24
    assert torch.allclose(found["sum"], expected["sum"], atol=1e-4)
    assert not found["sum"].requires_grad
