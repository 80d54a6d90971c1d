"""The training loop: exact under data parallelism, exact after an interruption."""

import gc
import json
import multiprocessing
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loop_parts import LocalReporter, config, loss_curve, trainer
from pydantic import ValidationError
from samples import coloured_benchmark, coloured_table

from ray_retrieval.data.source import ImageSource
from ray_retrieval.data.transforms import Preprocessing
from ray_retrieval.errors import RecipeError, RetrievalError
from ray_retrieval.loop import Process, read_outcome
from ray_retrieval.loop import trainer as loop_trainer
from ray_retrieval.loop.checkpoints import OPTIMIZER
from ray_retrieval.loop.describing import sources_of
from ray_retrieval.loop.optim import PlateauSchedule
from ray_retrieval.methods.base import Clock


def test_training_learns(tmp_path):
    history = trainer(config(epochs=6)).fit(LocalReporter(tmp_path))
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert history[-1]["validation"]["map"] > 0.9
    assert [record["epoch"] for record in history] == [1, 2, 3, 4, 5, 6]


HASHNET = {"method": "hashnet", "preset": "deephash"}
RING = {"method": "xbm", "images_per_class": 4, "memory_size": 13, "warmup_steps": 2}
ENCODED = {**RING, "memory_size": 40, "warmup_steps": 3, "memory_init": "encoded"}
EVERY_STEP = {"checkpoint": {"min_seconds": 0, "every_steps": 1}}
PLATEAU = {"name": "plateau", "patience": 0, "cooldown": 0, "threshold": 0.5}
GEM = {
    "method": "gem",
    "image": {"size": 20, "resize": "long_side"},
    "projection": True,
    "whitening": {"name": "learned"},
}
MIXED = {"benchmark": coloured_benchmark(60, mixed_sizes=True)}
DELF = {
    "method": "delf",
    "image": {"size": 24, "resize": "long_side"},
    "crop": {"size": 16},
    "hidden": 8,
    "pyramid": {"scales": [0.7071, 1.0], "max_features": 12},
}
MINED = {"name": "contrastive", "negatives": 2, "queries": 24, "pool": 40, "rounds": 2}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Trains without a stop, once for all tests that ask for the same: the history, and the checkpoints."""
    known = {}

    def train(settings, method):
        key = repr((settings, method))
        if key not in known:
            reporter = LocalReporter(tmp_path_factory.mktemp("undisturbed"))
            known[key] = trainer(settings, **method).fit(reporter), reporter
        return known[key]

    return train


@pytest.mark.parametrize(
    ("stop_after", "method", "train"),
    [
        (1, {}, {}),
        (2, {}, {}),
        (4, {}, {}),
        (2, HASHNET, {}),
        (3, {**HASHNET, "bank_size": 20}, {}),
        (3, {"method": "hashnet"}, {}),
        (3, RING, {}),
        # Two steps before the memory is filled, right before it, and after that step and the next.
        (2, ENCODED, EVERY_STEP),
        (3, ENCODED, EVERY_STEP),
        (4, ENCODED, EVERY_STEP),
        (5, ENCODED, EVERY_STEP),
        # The second epoch was no better than the first by half: the third has a lower rate.
        (7, RING, {"epochs": 4, "schedule": PLATEAU}),
        (3, {}, {"epochs": 4, "schedule": PLATEAU, "optimizer": {"name": "adam", "lr": 1e-3}}),
        # In the first round of the first epoch, right after it, in the second round, and after that; a mined
        # round has 6 steps.
        (1, {**GEM, **MIXED, "loss": MINED}, {"augmentation": {}}),
        (2, {**GEM, **MIXED, "loss": MINED}, {"augmentation": {}}),
        (3, {**GEM, **MIXED, "loss": MINED}, {"augmentation": {}}),
        (4, {**GEM, **MIXED, "loss": MINED}, {"augmentation": {}}),
        # Within the first epoch of a network, its attention and its global head.
        (1, {**DELF, "stage": "joint", "global_head": {"dimension": 12}}, {"epochs": 2}),
    ],
)
def test_an_interrupted_run_ends_like_an_undisturbed_one(tmp_path, undisturbed, stop_after, method, train):
    settings = config(**{"checkpoint": {"min_seconds": 0, "every_steps": 3}, **train})
    history, whole = undisturbed(settings, method)
    with pytest.raises(KeyboardInterrupt):
        trainer(settings, **method).fit(LocalReporter(tmp_path / "cut", stop_after))
    resumed = trainer(settings, **method).fit(LocalReporter(tmp_path / "cut"))
    assert np.allclose(loss_curve(resumed), loss_curve(history), rtol=0, atol=1e-12)
    if "schedule" in train:
        assert history[-1]["lr"] < history[0]["lr"]
    expected, found = read_outcome(whole.latest()), read_outcome(LocalReporter(tmp_path / "cut").latest())
    assert found.epochs == expected.epochs
    for which in ("best", "last"):
        for name, value in expected.weights[which].items():
            assert torch.equal(found.weights[which][name], value), name
    states = [
        torch.load(reporter.latest() / OPTIMIZER, weights_only=True)["method"]
        for reporter in (whole, LocalReporter(tmp_path / "cut"))
    ]
    assert tensors_in(states[0]) == tensors_in(states[1])


def tensors_in(state):
    return {name: np.asarray(value).tolist() for name, value in state.get("memory", {}).items()}


def test_the_best_model_is_that_of_its_epoch(tmp_path):
    reporter = LocalReporter(tmp_path)
    history = trainer(config(epochs=4, optimizer={"lr": 0.2})).fit(reporter)
    outcome = read_outcome(reporter.latest())
    values = [record["validation"]["map"] for record in history]
    assert outcome.validation["best"]["map"] == max(values)
    assert outcome.epochs["best"] == 1 + int(np.argmax(values))
    best = tmp_path / f"epoch_{outcome.epochs['best']:04d}" / "last.safetensors"
    for name, value in safetensors.torch.load_file(best).items():
        assert torch.equal(outcome.weights["best"][name], value)


def test_the_best_model_is_no_file_that_another_attempt_has_left(tmp_path):
    reporter = LocalReporter(tmp_path)
    trainer(config(epochs=1)).fit(reporter)
    other = {"weight": torch.zeros(1)}
    safetensors.torch.save_file(other, reporter.latest() / "best.safetensors")
    outcome = read_outcome(reporter.latest())
    assert outcome.weights["best"] is outcome.weights["last"]


def test_validation_every_other_epoch_and_at_the_end(tmp_path):
    history = trainer(config(validation={"every": 2})).fit(LocalReporter(tmp_path))
    assert ["validation" in record for record in history] == [False, True, True]


def test_images_that_do_not_fit_in_memory_train_alike(tmp_path):
    cached = trainer().fit(LocalReporter(tmp_path / "a"))
    decoded = trainer(config(cache_memory="1KiB")).fit(LocalReporter(tmp_path / "b"))
    assert loss_curve(cached) == loss_curve(decoded)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_accumulated_parts_give_the_gradient_of_the_batch(dropout):
    def gradients(parts):
        settings = config(accumulate=parts, optimizer={"lr": 1e-9})
        made = trainer(settings, dtype=torch.float64, dropout=dropout)
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


@pytest.mark.parametrize(
    ("method", "batch_size"),
    [
        ({"method": "xbm", "images_per_class": 4}, 64),
        ({"method": "gem", "projection": True, "loss": {"name": "contrastive"}}, 14),
    ],
)
def test_where_nothing_is_trained_no_batches_need_be_made(tmp_path, method, batch_size):
    """Of three classes neither sixteen nor six different ones are found."""
    with pytest.raises(RetrievalError, match=r"3 training classes|3 clusters"):
        trainer(config(batch_size=batch_size), **method)
    made = trainer(config(batch_size=batch_size, epochs=0), **method)
    before = made.method.state_dict()["backbone.0.weight"].clone()
    assert made.fit(LocalReporter(tmp_path)) == []
    weights = read_outcome(LocalReporter(tmp_path).latest()).weights["last"]
    assert torch.equal(weights["backbone.0.weight"], before)
    assert made.method.warnings(made.benchmark.train, made.total_steps) == []


def test_what_pairs_images_cannot_be_computed_in_parts():
    with pytest.raises(
        RecipeError, match=r"train.accumulate: the loss of hashnet pairs images across the whole batch"
    ):
        trainer(config(accumulate=2), method="hashnet")


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop"])
def test_every_optimiser_trains_the_groups_at_their_rates(name):
    made = trainer(config(optimizer={"name": name, "lr": 0.01}), method="hashnet")
    rows = np.arange(8)
    made._step(rows, made.train_images.batch(rows))
    rates = [group["lr"] for group in made.optimizer.param_groups]
    assert rates[1] == pytest.approx(10 * rates[0])
    assert type(made.optimizer).__name__.lower() == name


def test_learning_rate_scales_with_the_batch_only_when_asked(tmp_path):
    plain = trainer(config(epochs=1, schedule={"name": "constant"})).fit(LocalReporter(tmp_path / "a"))
    optimizer = {"lr": 0.05, "lr_batch_size": 32}
    scaled = trainer(config(epochs=1, schedule={"name": "constant"}, optimizer=optimizer))
    assert plain[0]["lr"] == 0.05
    assert scaled.fit(LocalReporter(tmp_path / "b"))[0]["lr"] == pytest.approx(0.05 * 8 / 32)


XBM = {"warmup_steps": 1, "images_per_class": 10, "pooling": "gem"}

TUPLES = {"negatives": 2, "queries": 24, "pool": 40, "rounds": 2}
# So few pairs leave learned whitening undetermined: rounding would show.
PCA = {**GEM, "whitening": {"name": "pca"}}

# name → (several labels an image, the method and its settings)
GROUPS = {
    "greedyhash": (False, {}),
    "greedyhash, labels": (True, {}),
    "unsupervised": (False, {"method": "greedyhash_unsupervised"}),
    "batch": (False, {"method": "hashnet", "pairs": "batch", "class_weights": "dataset"}),
    "cross, labels": (True, {"method": "hashnet", "preset": "official"}),
    "bank, labels": (True, {"method": "hashnet", "preset": "deephash"}),
    "dropout": (False, {"method": "hashnet", "pairs": "batch", "dropout": 0.3}),
    "xbm": (False, {"method": "xbm", **XBM, "memory_size": 50}),
    "xbm, triplet": (
        False,
        {
            "method": "xbm",
            **XBM,
            "loss": {"name": "triplet", "reduction": "active"},
            "same_instance": "exclude",
        },
    ),
    "xbm, own batch left out": (
        False,
        {"method": "xbm", **XBM, "loss": {"name": "multi_similarity"}, "memory_includes_batch": False},
    ),
    "xbm, encoded": (
        False,
        {
            "method": "xbm",
            **XBM,
            "loss": {"name": "contrastive", "reduction": "pairs"},
            "memory_size": 50,
            "warmup_steps": 2,
            "memory_init": "encoded",
        },
    ),
    "ring": (False, {"method": "hashnet", "preset": "deephash", "bank_size": 25}),
    "gem": (False, {**PCA, "loss": {"name": "contrastive", **TUPLES}}),
    "gem, triplet, regional": (
        False,
        {
            **GEM,
            "whitening": {"name": "none"},
            "loss": {"name": "triplet", **TUPLES},
            "regional": True,
            "scales": [1.0, 0.7071],
        },
    ),
    "gem, listwise": (False, {**PCA, "loss": {"name": "smooth_ap", "images_per_class": 10}}),
    "delf, joint": (False, {**DELF, "stage": "joint", "reduction": {"name": "autoencoder"}}),
    "delf, attention": (False, {**DELF, "stage": "attention"}),
}


PROCESSES = 4
RARELY = (
    *("greedyhash", "batch", "ring", "xbm, triplet", "xbm, own batch left out", "gem, listwise"),
    *("gem, triplet, regional", "delf, attention"),
)
"""Groups that run with the long tests: others of their methods go the same ways."""


def worlds_of(group):
    """One and two processes, and four where they exchange most: to show it of all groups takes minutes."""
    several = group in ("bank, labels", "xbm", "gem")
    return (1, 2, PROCESSES) if several else (1, 2)


def _train_in_groups(rank, folder, groups):
    """Several processes train the same recipes, in float64: 32 images are 2 × 16 and 4 × 8."""
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is not looked through for each group
    for number, group in enumerate(groups):
        if number % PROCESSES == rank:  # alone, each of them another group meanwhile
            _train(group, folder, Process())
            if group in RESUMED:
                _stop(group, folder)
    for group in groups:
        for world in worlds_of(group)[1:]:
            with _group(folder / f"{group}-{world}", rank, world) as process:
                if process is not None:
                    _train(group, folder, process)
    with _group(folder / "uneven", rank, 2) as process:
        if process is not None:
            for group in (one for one in RESUMED if one in groups):
                _train(group, folder, process, folder / f"stopped-{group}")
            _choose_a_precision(folder, process)
            _train_with_uneven_shares(folder, process)


@contextmanager
def _group(meeting, rank, world):
    """A process in a group of so many that meet by a file; None for those that are not in it."""
    if rank >= world:
        yield None
        return
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    yield Process(rank, world)
    # Now, while others can run: a network that outlives the group ends its threads with Python's lock held,
    # and waits for them for ever if they need it.
    gc.collect()
    dist.destroy_process_group()


RESUMED = ("xbm", "gem")
"""Groups that are stopped on one process, amid the first epoch, and go on on two."""


def _made(group, process):
    """What trains the recipe of a group."""
    several_labels, settings = GROUPS[group]
    mixed = group.startswith("gem")
    return trainer(
        config(
            epochs=2,
            batch_size=30 if "xbm" in group or "listwise" in group else 32,
            clip_norm=5.0,
            checkpoint={"min_seconds": 0, "every_steps": 3},
            # At a higher rate the hardest triplets multiply what rounding has left.
            **({"augmentation": {}, "optimizer": {"lr": 0.01}} if mixed else {}),
        ),
        process=process,
        # 94 images make three batches of 32 or 31, so that shares differ in size too.
        benchmark=coloured_benchmark(94, several_labels=several_labels, mixed_sizes=mixed),
        dtype=torch.float64,
        **settings,
    )


def _stop(group, folder):
    """Train the recipe of a group up to its first checkpoint."""
    with pytest.raises(KeyboardInterrupt):
        _made(group, Process()).fit(LocalReporter(folder / f"stopped-{group}", stop_after=1))


def _train(group, folder, process, checkpoints=None):
    """Train the recipe of a group, or go on from the checkpoints in a folder, and keep what it leaves."""
    made = _made(group, process)
    name = f"{group}{'' if checkpoints is None else ' resumed'}-{process.world}-{process.rank}"
    history = made.fit(LocalReporter(checkpoints or folder / f"checkpoints-{name}"))
    found = {
        "gradients": {key: p.grad for key, p in made.method.named_parameters() if p.requires_grad},
        "weights": made.method.state_dict(),
        "memory": made.method.training_state().get("memory", {}),
        "mined": {"tuples": made.method.training_state().get("tuples", torch.zeros(0))},
    }
    torch.save(found, folder / f"{name}.pt")
    (folder / f"{name}.json").write_text(json.dumps(loss_curve(history)))


SUMMED = (np.array([5]), np.array([4, 0, 1, 1, 2]))  # fewer images than workers, and an odd number


def sums_of(method):
    return lambda images: {"sum": next(iter(method(images).values())).double().sum(dim=0)}


def _train_with_uneven_shares(folder, process):
    """Batches of three on two processes, in two parts, with less to validate on than there are processes."""
    benchmark = coloured_benchmark(6)
    benchmark.validation_queries = benchmark.validation_queries.take(np.array([0]))
    made = trainer(config(epochs=1, accumulate=2, batch_size=4), process=process, benchmark=benchmark)
    totals = [made.encode.totals(rows, sums_of(made.method))["sum"] for rows in SUMMED]
    torch.save(totals, folder / f"totals-{process.rank}.pt")
    history = made.fit(LocalReporter(folder / f"checkpoints-uneven-{process.rank}"))
    (folder / f"uneven-{process.rank}.json").write_text(json.dumps(loss_curve(history)))


def _choose_a_precision(folder, process):
    """Where one of two processors has instructions for bfloat16, and where both have."""
    chosen = []
    for capable in ([0], [0, 1]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop_trainer, "uses_bf16", lambda *_, able=capable: process.rank in able)
            chosen.append(trainer(config(precision="auto"), process=process).progress.precision)
    (folder / f"precision-{process.rank}.json").write_text(json.dumps(chosen))


@pytest.mark.parametrize(
    "groups",
    [tuple(sorted(set(GROUPS) - set(RARELY))), pytest.param(RARELY, marks=pytest.mark.long)],
    ids=["often", "rarely"],
)
def test_one_two_and_four_workers_train_alike(tmp_path, groups):
    """Also where one was stopped, and two go on."""
    # What takes long to import is imported once, before the processes part.
    multiprocessing.set_forkserver_preload(["ray_retrieval.loop", "ray_retrieval.methods", "torch._dynamo"])
    mp.start_processes(
        _train_in_groups, args=(tmp_path, groups), nprocs=PROCESSES, daemon=True, start_method="forkserver"
    )

    def left(group, world, rank):
        file = tmp_path / f"{group}-{world}-{rank}"
        state = torch.load(file.with_suffix(".pt"), weights_only=True)
        tensors = {f"{kind} {key}": v for kind, values in state.items() for key, v in values.items()}
        return tensors, json.loads(file.with_suffix(".json").read_text())

    for group in groups:
        single, curve = left(group, 1, 0)
        runs = [(group, world) for world in worlds_of(group)[1:]]
        for run, world in [*runs, (f"{group} resumed", 2)] if group in RESUMED else runs:
            leader, _ = left(run, world, 0)
            for rank in range(world):
                found, other = left(run, world, rank)
                assert np.allclose(other, curve, rtol=0, atol=1e-9), (run, world)
                for name, value in single.items():
                    expected, mine = torch.as_tensor(value), torch.as_tensor(found[name])
                    # Whitening multiplies what rounding has left.
                    close = 1e-6 if "whitening" in name else 0
                    assert torch.allclose(mine.double(), expected.double(), rtol=close, atol=1e-9), (
                        run,
                        name,
                    )
                    if name.startswith(("memory", "mined")):
                        assert torch.equal(mine, torch.as_tensor(leader[name])), (run, world, rank, name)
        assert not group.startswith(("bank", "ring", "xbm")) or "memory embeddings" in single
    uneven = [json.loads((tmp_path / f"uneven-{rank}.json").read_text()) for rank in range(2)]
    assert uneven[0] == uneven[1]
    for rank in range(2):
        assert json.loads((tmp_path / f"precision-{rank}.json").read_text()) == ["float32", "bf16"]
    totals = [torch.load(tmp_path / f"totals-{rank}.pt", weights_only=True) for rank in range(2)]
    alone = trainer(config(epochs=1, batch_size=4), benchmark=coloured_benchmark(6))
    for number, rows in enumerate(SUMMED):
        assert torch.equal(totals[0][number], totals[1][number])
        expected = alone.encode.totals(rows, sums_of(alone.method))["sum"]
        assert torch.allclose(totals[0][number], expected, atol=1e-5)


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


def test_tables_share_the_memory_in_their_order():
    tables = [coloured_table(5), coloured_table(6, seed=1), coloured_table(4, seed=2)]
    image = Preprocessing(size=8)
    sources = sources_of([(table, image) for table in tables], memory_bytes=10 * 3 * 8 * 8, threads=1)
    assert [source.cached for source in sources] == [True, False, True]
    for source in sources:
        source.close()


def test_images_larger_than_those_of_the_training_are_described_fewer_at_a_time():
    describer = trainer(config(batch_size=12))._describer  # 24 of 16 pixels
    sides = (8, 16, 32, 48, 256)
    assert [describer._images_a_pass(Preprocessing(size=side)) for side in sides] == [24, 24, 6, 2, 1]


VECTORS = {"method": "xbm", "images_per_class": 4, "warmup_steps": 2}


@pytest.mark.parametrize(("metric", "best"), [("map", 4), ("map@r", 2), ("recall@1", 3)])
def test_the_best_model_is_best_by_the_metric_that_was_asked_for(tmp_path, monkeypatch, metric, best):
    values = iter(
        {"map": 0.1 * epoch, "map@r": 0.5 - abs(epoch - 2) / 10, "recall@1": 0.5 - abs(epoch - 3) / 10}
        for epoch in (1, 2, 3, 4)
    )
    monkeypatch.setattr(loop_trainer, "measure", lambda *_, **__: next(values))
    reporter = LocalReporter(tmp_path)
    history = trainer(config(epochs=4, validation={"metric": metric}), **VECTORS).fit(reporter)
    outcome = read_outcome(reporter.latest())
    assert outcome.epochs == {"best": best, "last": 4}
    assert outcome.validation["best"] == history[best - 1]["validation"]
    assert outcome.validation["last"] == history[-1]["validation"]
    assert reporter.metrics[-1] == {"epoch": 4.0, metric: history[best - 1]["validation"][metric]}
    weights = safetensors.torch.load_file(tmp_path / f"epoch_{best:04d}" / "last.safetensors")
    assert all(torch.equal(outcome.weights["best"][name], value) for name, value in weights.items())


def without_validation():
    benchmark = coloured_benchmark()
    return replace(benchmark, validation_queries=benchmark.validation_queries.take(np.zeros(0, np.int64)))


def test_what_is_not_measured_selects_no_model_and_drives_no_schedule():
    with pytest.raises(
        RecipeError,
        match=r"train.validation.metric: map@r is not measured of the codes that greedyhash makes",
    ):
        trainer(config(validation={"metric": "map@r"}))
    with pytest.raises(RecipeError, match=r"train.schedule: the plateau schedule follows the validation"):
        trainer(config(schedule={"name": "plateau"}), benchmark=without_validation())


def test_without_validation_queries_nothing_is_measured(tmp_path):
    reporter = LocalReporter(tmp_path)
    trainer(config(epochs=1), benchmark=without_validation()).fit(reporter)
    outcome = read_outcome(reporter.latest())
    assert outcome.validation == {"best": {"map": None}, "last": {"map": None}}


def test_the_plateau_schedule_follows_the_recorded_validations(tmp_path):
    settings = config(epochs=6, schedule=PLATEAU, optimizer={"lr": 0.05}, validation={"every": 2})
    history = trainer(settings).fit(LocalReporter(tmp_path))
    values = [r["validation"]["map"] for r in history if "validation" in r]
    schedule = PlateauSchedule.model_validate(PLATEAU)
    measured_before = [0, 0, 1, 1, 2, 2]
    expected = [0.05 * schedule.at(Clock(0, measured=tuple(values[:count]))) for count in measured_before]
    assert [r["lr"] for r in history] == pytest.approx(expected, rel=1e-12)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize("crop", [False, True])
def test_encoded_training_images_are_not_augmented(crop):
    """The network sees them as it sees validation images, whatever is cut from them in training."""
    augmentation = {"crop_scale": (0.2, 1.0), "flip": True} if crop else {"pad": 2, "flip": True}
    made = trainer(
        config(augmentation=augmentation),
        **{**VECTORS, "memory_init": "encoded"},
        image_settings={"size": 16, "resize_to": 20},
    )
    rows = np.array([7, 3, 3, 50, *range(20)])
    found = made.encode(rows)["embeddings"]
    table, preprocessing = made.benchmark.train, made.method.preprocessing
    with ImageSource(table, preprocessing, memory_bytes=0, threads=1) as source, torch.no_grad():
        expected = made.method.eval()(source.batch(rows))["embeddings"]
    assert torch.allclose(found, expected, atol=1e-6)
    assert (made.encode.known_source() is made.train_images) == (not crop)
    assert not found.requires_grad


def test_the_objective_is_computed_in_float32_outside_autocast(tmp_path):
    made, seen = trainer(config(epochs=1, precision="bf16"), **VECTORS), []
    objective, backbone = made.method.objective, made.method.backbone

    def watched(outputs, batch, clock):
        seen.append((torch.is_autocast_enabled("cpu"), outputs["embeddings"].dtype))
        lengths = outputs["embeddings"].detach().double().norm(dim=1)
        assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-6)
        terms = objective(outputs, batch, clock)
        assert all(term.dtype == torch.float32 for term in terms.values())
        return terms

    made.method.objective = watched
    inside = []
    backbone.register_forward_hook(lambda *_: inside.append(torch.is_autocast_enabled("cpu")))
    made.fit(LocalReporter(tmp_path))
    assert set(seen) == {(False, torch.float32)}
    assert set(inside) == {True}
    assert made.method.memory.embeddings.dtype == torch.float32


def test_what_a_method_observes_is_in_the_record_of_the_epoch(tmp_path):
    history = trainer(config(), **{**VECTORS, "warmup_steps": 10**6}).fit(LocalReporter(tmp_path / "a"))
    assert all("observed" not in record for record in history)
    history = trainer(config(), **VECTORS).fit(LocalReporter(tmp_path / "b"))
    assert set(history[0]["observed"]) == {"memory_age", "active_negatives"}  # nothing was there to drift
    assert set(history[1]["observed"]) == {"memory_age", "active_negatives", "drift"}
    assert 0 < history[1]["observed"]["drift"] < 4
    assert history[-1]["observed"]["memory_age"] > history[0]["observed"]["memory_age"] > 0


def test_a_batch_in_parts_trains_as_in_one_whatever_the_loss_pairs(tmp_path):
    """Through the network twice, in passes of a third of the batch, and at once."""
    settings = {"method": "gem", "projection": True, "loss": {"name": "smooth_ap", "images_per_class": 3}}
    curves = []
    for parts in (1, 3):
        made = trainer(config(batch_size=9, accumulate=parts), dtype=torch.float64, **settings)
        curves.append(loss_curve(made.fit(LocalReporter(tmp_path / str(parts)))))
    assert np.allclose(*curves, rtol=0, atol=1e-9)


def test_images_of_several_sizes_train_alike_from_memory_and_from_files(tmp_path):
    curves = []
    for memory in ("1GiB", "1KiB"):
        settings = config(augmentation={}, epochs=1, cache_memory=memory)
        made = trainer(settings, **GEM, **MIXED, loss=MINED)
        curves.append(loss_curve(made.fit(LocalReporter(tmp_path / memory))))
    assert curves[0] == curves[1]


def test_methods_that_need_one_size_refuse_several():
    with pytest.raises(RecipeError, match=r"method\.image\.resize"):
        trainer(config(augmentation={}), image={"size": 20, "resize": "long_side"})


def test_whitening_is_learned_for_the_best_model_and_for_the_last(tmp_path, monkeypatch):
    """They differ, and each describes the training images as its own whitening makes them."""
    values = iter([0.5, 0.9, 0.9])  # of equals the first is the best
    monkeypatch.setattr(
        loop_trainer, "measure", lambda *_, **__: {"map": next(values), "map@r": 0, "recall@1": 0}
    )
    settings = config(augmentation={}, optimizer={"lr": 0.3}, schedule={"name": "constant"})
    method = {**GEM, **MIXED, "loss": MINED, "whitening": {"name": "pca"}, "projection": False}
    trainer(settings, **method).fit(LocalReporter(tmp_path))
    outcome = read_outcome(LocalReporter(tmp_path).latest())
    assert outcome.epochs == {"best": 2, "last": 3}
    for which, weights in outcome.weights.items():
        epoch = safetensors.torch.load_file(
            tmp_path / f"epoch_{outcome.epochs[which]:04d}" / "last.safetensors"
        )
        assert all(torch.equal(weights[name], epoch[name]) for name in epoch if name.startswith("backbone"))
        again = trainer(settings, **method)
        again.method.load_state_dict(weights)
        again.method.whitening.weight.zero_()
        again.method.after_training(again._training_images(again.method.preprocessing))
        assert int(weights["whitened"]) == 1
        assert torch.allclose(
            again.method.whitening.weight, weights["whitening.weight"], rtol=1e-3, atol=1e-3
        )
    whitenings = [weights["whitening.weight"] for weights in outcome.weights.values()]
    assert not torch.allclose(*whitenings, rtol=1e-2, atol=1e-2)


def test_descriptions_keep_to_the_passes_of_the_training(tmp_path, monkeypatch):
    """Mining, validation and whitening take no more images at a time than twice a part of a batch."""
    sizes = []
    settings = config(batch_size=12, accumulate=4, augmentation={}, epochs=1)
    made = trainer(settings, **GEM, **MIXED, loss=MINED)
    real = made.method.backbone.forward
    monkeypatch.setattr(made.method.backbone, "forward", lambda x: (sizes.append(len(x)), real(x))[1])
    made.fit(LocalReporter(tmp_path))
    assert max(sizes) == 6
