"""The training loop: exact under data parallelism, exact after an interruption."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pydantic import ValidationError
from samples import coloured_benchmark, sized

from ray_retrieval.errors import RecipeError
from ray_retrieval.layers.backbones import BackboneConfig
from ray_retrieval.loop import Process, TrainConfig, Trainer, read_outcome
from ray_retrieval.methods import build
from ray_retrieval.methods.base import Clock
from ray_retrieval.optim import CosineSchedule, StepSchedule


def config(**changes):
    settings = {
        "epochs": 3,
        "batch_size": 8,
        "precision": "float32",
        "optimizer": {"lr": 0.05},
        "schedule": {"name": "cosine", "warmup": 0.2},
        "augmentation": {"pad": 2, "flip": True, "brightness": 0.1},
        "checkpoint": {"min_seconds": 0},
    }
    return TrainConfig.model_validate({**settings, **changes})


def trainer(
    train=None,
    *,
    process=None,
    benchmark=None,
    dtype=torch.float32,
    method="greedyhash",
    dropout=0.0,
    **settings,
):
    torch.manual_seed(0)
    settings |= {"backbone": BackboneConfig(name="small", weights="none"), "image": {"size": 16}}
    method = build(sized(method, 12, **settings), classes=3).to(dtype)
    if dropout:
        method.backbone.append(torch.nn.Dropout(dropout))
    return Trainer(
        method, benchmark or coloured_benchmark(), train or config(), seed=5, process=process or Process()
    )


class LocalReporter:
    """Checkpoints in a folder; can stop the run like a kill after so many."""

    def __init__(self, folder, stop_after=None):
        self.folder, self.left, self.records = folder, stop_after, []

    def latest(self):
        found = sorted(self.folder.glob("*"), key=lambda path: path.stat().st_mtime_ns)
        return found[-1] if found else None

    def epoch_done(self, record):
        self.records.append(record)

    def checkpoint(self, name, metrics, write):
        if write is not None:
            (self.folder / name).mkdir(parents=True)
            write(self.folder / name)
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def loss_curve(history):
    return [(r["loss"], *r["terms"].values(), r["validation"]["map"]) for r in history]


def test_training_learns(tmp_path):
    history = trainer(config(epochs=6)).fit(LocalReporter(tmp_path))
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert history[-1]["validation"]["map"] > 0.9
    assert [record["epoch"] for record in history] == [1, 2, 3, 4, 5, 6]


HASHNET = {"method": "hashnet", "preset": "deephash"}


@pytest.mark.parametrize(
    ("stop_after", "method"),
    [
        (1, {}),
        (2, {}),
        (4, {}),
        (2, HASHNET),
        (3, {**HASHNET, "bank_size": 20}),
        (3, {"method": "hashnet"}),
        (3, {"method": "xbm", "images_per_class": 4, "memory_size": 13, "warmup_steps": 2}),
    ],
)
def test_an_interrupted_run_ends_like_an_undisturbed_one(tmp_path, stop_after, method):
    settings = config(checkpoint={"min_seconds": 0, "every_steps": 3})
    whole = LocalReporter(tmp_path / "whole")
    undisturbed = trainer(settings, **method).fit(whole)
    with pytest.raises(KeyboardInterrupt):
        trainer(settings, **method).fit(LocalReporter(tmp_path / "cut", stop_after))
    resumed = trainer(settings, **method).fit(LocalReporter(tmp_path / "cut"))
    assert np.allclose(loss_curve(resumed), loss_curve(undisturbed), rtol=0, atol=1e-12)
    expected, found = read_outcome(whole.latest()), read_outcome(LocalReporter(tmp_path / "cut").latest())
    assert found.epochs == expected.epochs
    for which in ("best", "last"):
        for name, value in expected.weights[which].items():
            assert torch.equal(found.weights[which][name], value), name


def test_the_best_model_is_that_of_its_epoch(tmp_path):
    reporter = LocalReporter(tmp_path)
    history = trainer(config(epochs=4, optimizer={"lr": 0.2})).fit(reporter)
    outcome = read_outcome(reporter.latest())
    values = [record["validation"]["map"] for record in history]
    assert outcome.validation["best"] == max(values)
    assert outcome.epochs["best"] == 1 + int(np.argmax(values))
    best = tmp_path / f"epoch_{outcome.epochs['best']:04d}" / "last.safetensors"
    for name, value in safetensors.torch.load_file(best).items():
        assert torch.equal(outcome.weights["best"][name], value)


def test_validation_every_other_epoch_and_at_the_end(tmp_path):
    history = trainer(config(validation={"every": 2})).fit(LocalReporter(tmp_path))
    assert ["validation" in record for record in history] == [False, True, True]


def test_images_that_do_not_fit_in_memory_train_alike(tmp_path):
    cached = trainer().fit(LocalReporter(tmp_path / "a"))
    decoded = trainer(config(cache_memory="1KiB")).fit(LocalReporter(tmp_path / "b"))
    assert loss_curve(cached) == loss_curve(decoded)


def test_accumulated_parts_give_the_gradient_of_the_batch():
    def gradients(parts):
        made = trainer(config(accumulate=parts, optimizer={"lr": 1e-9}), dtype=torch.float64)
        for layer in made.method.modules():  # batch statistics see one part at a time: leave them out
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.forward = lambda x: x
        rows = np.arange(8)
        made._step(rows, made.train_images.batch(rows))
        return [p.grad for p in made.method.parameters() if p.grad is not None]

    for whole, accumulated in zip(gradients(1), gradients(3), strict=True):
        assert torch.allclose(whole, accumulated, atol=1e-12)


def test_gradients_are_clipped():
    made = trainer(config(clip_norm=0.01))
    rows = np.arange(8)
    made._step(rows, made.train_images.batch(rows))
    norms = [p.grad.norm() for p in made.method.parameters() if p.grad is not None]
    assert torch.stack(norms).norm() == pytest.approx(0.01, rel=1e-3)


def test_fewer_images_than_workers_are_refused():
    with pytest.raises(RecipeError, match=r"train.workers: 3 training images a step for 5 workers"):
        trainer(config(batch_size=10), process=Process(rank=0, world=5), benchmark=coloured_benchmark(3))


def test_step_schedule_drops_after_whole_epochs():
    every = StepSchedule(every=30)
    assert [every.at(Clock(0, epoch=e)) for e in (0, 29, 30, 59, 60)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    with pytest.raises(ValidationError, match="'every', 'every_steps' or 'epochs'"):
        StepSchedule(factor=0.5)
    at = StepSchedule(epochs=(2, 3), factor=0.5)
    assert [at.at(Clock(0, epoch=e)) for e in (1, 2, 3)] == [1, 0.5, 0.25]


def test_what_pairs_images_cannot_be_computed_in_parts():
    with pytest.raises(RecipeError, match=r"train.accumulate: HashNet pairs images across the whole batch"):
        trainer(config(accumulate=2), method="hashnet")


def test_step_schedule_can_count_steps():
    halved = StepSchedule(every_steps=2000, factor=0.5)
    clocks = [Clock(0, epoch=9, step=step) for step in (0, 1999, 2000, 6000)]
    assert [halved.at(clock) for clock in clocks] == [1, 1, 0.5, 0.125]


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop"])
def test_every_optimiser_trains_the_groups_at_their_rates(name):
    made = trainer(config(optimizer={"name": name, "lr": 0.01}), method="hashnet")
    rows = np.arange(8)
    made._step(rows, made.train_images.batch(rows))
    rates = [group["lr"] for group in made.optimizer.param_groups]
    assert rates[1] == pytest.approx(10 * rates[0])
    assert type(made.optimizer).__name__.lower() == name


def test_cosine_schedule_rises_then_falls_to_its_floor():
    schedule = CosineSchedule(warmup=0.1, floor=0.2)
    rates = [schedule.at(Clock(0, step=step, total_steps=100)) for step in range(101)]
    assert rates[0] < 0.1
    assert rates[10] == pytest.approx(1)
    assert rates[55] == pytest.approx(0.2 + 0.8 * 0.5, abs=0.01)
    assert rates[100] == pytest.approx(0.2)
    assert np.all(np.diff(rates[10:]) < 0)


def test_learning_rate_scales_with_the_batch_only_when_asked(tmp_path):
    plain = trainer(config(epochs=1, schedule={"name": "constant"})).fit(LocalReporter(tmp_path / "a"))
    optimizer = {"lr": 0.05, "lr_batch_size": 32}
    scaled = trainer(config(epochs=1, schedule={"name": "constant"}, optimizer=optimizer))
    assert plain[0]["lr"] == 0.05
    assert scaled.fit(LocalReporter(tmp_path / "b"))[0]["lr"] == pytest.approx(0.05 * 8 / 32)


XBM = {"warmup_steps": 1, "images_per_class": 20, "pooling": "gem"}

# name → (several labels an image, the method and its settings)
GROUPS = {
    "greedyhash": (False, {}),
    "greedyhash, labels": (True, {}),
    "unsupervised": (False, {"method": "greedyhash_unsupervised"}),
    "batch": (False, {"method": "hashnet", "pairs": "batch", "class_weights": "dataset"}),
    "cross, labels": (True, {"method": "hashnet", "preset": "official"}),
    "bank, labels": (True, {"method": "hashnet", "preset": "deephash"}),
    "dropout": (False, {"method": "hashnet", "pairs": "batch", "dropout": 0.3}),
    "xbm": (False, {"method": "xbm", **XBM, "memory_size": 100}),
    "xbm, triplet": (
        False,
        {"method": "xbm", **XBM, "loss": {"name": "triplet"}, "same_instance": "exclude"},
    ),
    "xbm, own batch left out": (
        False,
        {"method": "xbm", **XBM, "loss": {"name": "multi_similarity"}, "memory_includes_batch": False},
    ),
    "ring": (False, {"method": "hashnet", "preset": "deephash", "bank_size": 50}),
}


def _train_in_groups(rank, folder):
    """One, two and four processes train the same recipes, in float64: 64 images are 2 × 32 and 4 × 16."""
    torch.set_num_threads(1)
    for group, (several_labels, settings) in GROUPS.items():
        # 190 images make three batches of 64 or 63, so that shares differ in size too.
        benchmark = coloured_benchmark(190, several_labels=several_labels)
        for world in (1, 2, 4):
            if rank >= world:
                continue
            name = f"{group}-{world}"
            if world > 1:
                dist.init_process_group(
                    "gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=world
                )
            made = trainer(
                config(
                    epochs=3 if "xbm" in group else 2, batch_size=60 if "xbm" in group else 64, clip_norm=5.0
                ),
                process=Process(rank, world),
                benchmark=benchmark,
                dtype=torch.float64,
                **settings,
            )
            history = made.fit(LocalReporter(folder / f"checkpoints-{name}-{rank}"))
            found = {
                "gradients": {key: p.grad for key, p in made.method.named_parameters() if p.requires_grad},
                "weights": made.method.state_dict(),
                "memory": made.method.training_state().get("memory", {}),
            }
            torch.save(found, folder / f"{name}-{rank}.pt")
            (folder / f"{name}-{rank}.json").write_text(json.dumps(loss_curve(history)))
            if world > 1:
                dist.destroy_process_group()

    _train_with_uneven_shares(rank, folder)


def _train_with_uneven_shares(rank, folder):
    """Batches of three on two processes, in two parts, with less to validate on than there are processes."""
    if rank >= 2:
        return
    dist.init_process_group("gloo", init_method=f"file://{folder}/uneven", rank=rank, world_size=2)
    benchmark = coloured_benchmark(6)
    benchmark.validation_queries = benchmark.validation_queries.take(np.array([0]))
    made = trainer(
        config(epochs=1, accumulate=2, batch_size=4), process=Process(rank, 2), benchmark=benchmark
    )
    history = made.fit(LocalReporter(folder / f"checkpoints-uneven-{rank}"))
    (folder / f"uneven-{rank}.json").write_text(json.dumps(loss_curve(history)))
    dist.destroy_process_group()


def test_one_two_and_four_workers_train_alike(tmp_path):
    mp.spawn(_train_in_groups, args=(tmp_path,), nprocs=4)

    def left(group, world, rank):
        file = tmp_path / f"{group}-{world}-{rank}"
        state = torch.load(file.with_suffix(".pt"), weights_only=True)
        tensors = {f"{kind} {key}": v for kind, values in state.items() for key, v in values.items()}
        return tensors, json.loads(file.with_suffix(".json").read_text())

    for group in GROUPS:
        single, curve = left(group, 1, 0)
        for world in (2, 4):
            leader, _ = left(group, world, 0)
            for rank in range(world):
                found, other = left(group, world, rank)
                assert np.allclose(other, curve, rtol=0, atol=1e-9), (group, world)
                for name, value in single.items():
                    expected, mine = torch.as_tensor(value), torch.as_tensor(found[name])
                    assert torch.allclose(mine.double(), expected.double(), rtol=0, atol=1e-9), (group, name)
                    if name.startswith("memory"):
                        assert torch.equal(mine, torch.as_tensor(leader[name])), (group, world, rank, name)
        assert not group.startswith(("bank", "ring", "xbm")) or "memory embeddings" in single
    uneven = [json.loads((tmp_path / f"uneven-{rank}.json").read_text()) for rank in range(2)]
    assert uneven[0] == uneven[1]


def test_settings_that_cannot_work_are_refused_before_anything_starts():
    with pytest.raises(ValidationError, match="'batch_size' is 2 or more for each of 5 workers"):
        config(workers=5)
    with pytest.raises(ValidationError, match="'nesterov' needs a 'momentum' above 0"):
        config(optimizer={"nesterov": True, "momentum": 0})


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(RecipeError, match=r"train.optimizer.lr: the loss is not finite in epoch 1"):
        trainer(config(optimizer={"lr": 1e30})).fit(LocalReporter(tmp_path))


def test_one_table_in_several_roles_is_cached_once():
    made = trainer()
    assert made.database is made.train_images
    assert made.queries is not made.train_images
