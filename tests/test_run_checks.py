"""What would end a run after its expensive part is refused before anything starts."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from export_parts import made, saved
from samples import coloured_benchmark
from search_parts import draw_local, draw_vectors, write
from test_run import QUICKSTART, run_on

from ray_retrieval import model, recipe, run, search
from ray_retrieval.data import datasets
from ray_retrieval.data.table import ImageTable
from ray_retrieval.errors import ArtefactError, DataError, RecipeError, RetrievalError
from ray_retrieval.history import HISTORY, read_history
from ray_retrieval.methods import build
from ray_retrieval.run import Run, images, timings
from ray_retrieval.run.checks import refuse_codes, refuse_unmeasurable
from ray_retrieval.storage import Folder

DELF = (
    "method={name: delf, backbone: {name: small, weights: none}, image: {size: 24, resize: long_side},"
    " crop: {size: 16}, hidden: 8, dimension: 8}"
)
GEM = (
    "method={name: gem, backbone: {name: small, weights: none}, image: {size: 16}, whitening: {name: none},"
    " loss: {name: contrastive, negatives: 2}}"
)
PLAIN = "train={epochs: 1, batch_size: 8}"
"""As the quickstart, for images of any size."""


@pytest.fixture
def benchmark(monkeypatch):
    """The data of every recipe."""
    made = coloured_benchmark(12)
    monkeypatch.setattr(datasets, "load", lambda *_, **__: replace(made, notes=[]))
    return made


def recipe_of(*settings):
    return recipe.load(QUICKSTART, ["output=unused", PLAIN, *settings])


def verified_by(*folders):
    steps = [f"{{name: geometric_verification, local: {folder}}}" for folder in folders]
    return f"evaluate.rerank=[{', '.join(steps)}]"


def test_a_network_that_is_only_tuned_is_trained_but_not_run(tmp_path, benchmark):
    job = run_on(tmp_path / "out", DELF, PLAIN, "method.stage=tuning")
    with pytest.raises(RecipeError, match=r"method\.stage: .*set it to joint") as caught:
        job.all()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert len(job.prepare().train) == len(benchmark.train)


def test_an_engine_whose_export_is_not_there_is_refused_before_training(tmp_path, benchmark):
    job = run_on(tmp_path / "out", PLAIN, "encode.engine=onnx")
    with pytest.raises(
        RecipeError, match=r"encode\.engine: onnx runs an export .* has none yet.*leave it out"
    ):
        job.all()
    assert not (tmp_path / "out").exists()
    job.prepare()
    saved(tmp_path / "out" / "model", made("greedyhash"))
    with pytest.raises(ArtefactError, match=r"no export of model .* for the engine onnx"):
        job.prepare(measured=True)
    assert len(job.prepare().train) == len(benchmark.train)  # training alone needs none


def test_a_column_that_embeddings_need_is_refused_before_training(tmp_path, benchmark, monkeypatch):
    database = benchmark.database
    named = ImageTable(database.table.append_column("vector", [database.ids]), name="set.parquet")
    monkeypatch.setattr(datasets, "load", lambda *_, **__: replace(benchmark, database=named))
    with pytest.raises(DataError, match=r"set.parquet: column 'vector' of the images has a name that"):
        run_on(tmp_path / "out", PLAIN).all()
    assert not (tmp_path / "out").exists()


def test_galleries_that_are_drawn_are_refused_for_local_features(tmp_path, benchmark, monkeypatch):
    drawn = replace(benchmark, queries=benchmark.database, gallery_draws=(np.arange(4),))
    monkeypatch.setattr(datasets, "load", lambda *_, **__: drawn)
    with pytest.raises(RecipeError, match=r"data: the gallery of coloured is drawn several times"):
        run_on(tmp_path / "out", DELF, PLAIN).all()
    refuse_unmeasurable(recipe_of(GEM), drawn)


@pytest.mark.parametrize("part", ["", "validation_"])
def test_codes_are_refused_where_a_query_is_an_image_of_the_database(benchmark, part):
    database = getattr(benchmark, f"{part}database")
    some = database.take(np.array([4, 0]))  # another table: `queries is database` does not tell
    inside = replace(benchmark, **{f"{part}queries": some})
    role = f"{part}queries".replace("_", " ")
    with pytest.raises(RecipeError, match=f"the {role} of coloured are images of the database"):
        refuse_codes(recipe_of(), inside)
    refuse_codes(recipe_of(GEM), inside)
    refuse_codes(recipe_of(), benchmark)


def test_codes_are_measured_where_published_lists_have_the_queries_in_the_database(benchmark):
    lists = replace(benchmark, queries=benchmark.database.take(np.array([4, 0])), counts_queries=True)
    refuse_codes(recipe_of(), lists)


class TestIndexOfLocalFeatures:
    @pytest.fixture
    def local(self, tmp_path, benchmark):
        """An index of the benchmark's database, beside a model that made it."""
        config = recipe_of(DELF).method
        torch.manual_seed(0)
        model.save(
            Folder(tmp_path / "delf" / "model"),
            config=config.model_dump(mode="json"),
            weights=build(config, classes=3, pretrained=False).state_dict(),
            classes=3,
            class_names=None,
            precision="float32",
            training={},
            metrics={},
        )
        made_by = model.read_model_description(Folder(tmp_path / "delf" / "model"))[1]
        return self.indexed(tmp_path / "delf", benchmark.database.table, draw_local(12, 8, seed=1), made_by)

    @staticmethod
    def indexed(folder, table, descriptors, made_by="model-a"):
        write(folder / "embeddings", descriptors, table, model=made_by)
        search.build(folder / "embeddings", folder / "index", shards=1)
        return folder / "index"

    @pytest.mark.usefixtures("benchmark")
    def test_one_that_is_there_is_taken(self, tmp_path, local):
        run_on(tmp_path / "out", GEM, PLAIN, verified_by(local)).prepare(measured=True)

    def test_one_that_is_not_there_is_named(self, tmp_path, benchmark):
        with pytest.raises(
            RecipeError, match=r"evaluate\.rerank: 'local' names .*nowhere: no index here: no such"
        ):
            run_on(tmp_path / "out", GEM, PLAIN, verified_by(tmp_path / "nowhere")).all()
        assert not (tmp_path / "out").exists()
        # What is only trained may be verified by an index that is still to be made.
        run_on(tmp_path / "out", GEM, PLAIN, verified_by(tmp_path / "nowhere")).prepare()
        with pytest.raises(RecipeError, match=r"evaluate\.rerank"):
            run_on(tmp_path / "out", GEM, PLAIN, verified_by(tmp_path / "nowhere")).encode(benchmark)

    def test_it_needs_the_model_beside_it(self, local, benchmark):
        (local.parent / "model" / "model.json").unlink()
        with pytest.raises(RecipeError, match=r"evaluate\.rerank: .*made by model .* there is none"):
            refuse_unmeasurable(recipe_of(GEM, verified_by(local)), benchmark)

    def test_it_holds_local_features_of_the_same_images(self, tmp_path, local, benchmark):
        vectors = self.indexed(tmp_path / "gem", benchmark.database.table, draw_vectors(12, 8))
        with pytest.raises(RecipeError, match=r"evaluate\.rerank: .*holds vectors.*, not local features"):
            refuse_unmeasurable(recipe_of(GEM, verified_by(vectors)), benchmark)
        other = replace(benchmark, database=coloured_benchmark(12).queries)
        with pytest.raises(RecipeError, match=r"evaluate\.rerank: .*none of the 9 images"):
            refuse_unmeasurable(recipe_of(GEM, verified_by(local)), other)

    def test_there_is_one(self, tmp_path, local, benchmark):
        with pytest.raises(RecipeError, match="one index of local features, got"):
            refuse_unmeasurable(recipe_of(GEM, verified_by(local, tmp_path / "other")), benchmark)


@pytest.mark.parametrize(
    ("kept", "settings", "refused"),
    [
        (
            {"validation_queries": []},
            ["train.schedule={name: plateau}"],
            "train.schedule: the plateau schedule",
        ),
        (
            {"validation_queries": [0], "validation_database": []},
            [GEM],
            "no validation query has another image",
        ),
        ({"train": [0, 1, 2]}, ["train.workers=4"], "train.workers: 3 training images a step for 4 workers"),
    ],
)
def test_what_a_training_would_refuse_is_found_before_it_starts(
    tmp_path, benchmark, monkeypatch, kept, settings, refused
):
    parts = {role: getattr(benchmark, role).take(np.array(rows, np.int64)) for role, rows in kept.items()}
    other = replace(benchmark, **parts, notes=[])
    monkeypatch.setattr(datasets, "load", lambda *_, **__: other)
    with pytest.raises(RetrievalError, match=refused):
        run_on(tmp_path / "out", PLAIN, *settings).prepare()


def test_images_of_several_classes_are_refused_where_one_is_learned(tmp_path, monkeypatch):
    several = coloured_benchmark(12, several_labels=True)
    monkeypatch.setattr(datasets, "load", lambda *_, **__: several)
    with pytest.raises(DataError, match="DELF learns from one class an image, these have several"):
        run_on(tmp_path / "out", DELF, PLAIN).prepare()


def test_validation_images_of_no_trained_class_are_noted(tmp_path, benchmark, monkeypatch):
    kept = np.flatnonzero(np.asarray(benchmark.train.labels) != 1)
    lacking = replace(benchmark, train=benchmark.train.take(kept), notes=[])
    monkeypatch.setattr(datasets, "load", lambda *_, **__: lacking)
    chosen = "train.validation.metric=accuracy"
    notes = run_on(tmp_path / "out", DELF, PLAIN, chosen).prepare().notes
    assert any("the accuracy leaves out" in note for note in notes)


@pytest.mark.parametrize("decoded", [False, True])
def test_images_that_were_decoded_before_are_not_looked_at_again(tmp_path, benchmark, monkeypatch, decoded):
    looked = []
    monkeypatch.setattr(datasets, "load", lambda *_, **__: replace(benchmark, decoded=decoded))
    monkeypatch.setattr(images, "check_images", lambda table, **_: looked.append(table.name) or [])
    made = run_on(tmp_path / "out", PLAIN).prepare()
    assert looked == ([] if decoded else ["database", "validation"])
    assert len(made.train) == len(benchmark.train)


class Clock:
    """Stands for the time, which passes when somebody says so."""

    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(timings, "time", made)
    return made


def seconds_of(folder, stage):
    return Folder(folder).read_json("timings.json")["stages"][stage]


def test_images_that_were_checked_before_add_no_time(tmp_path, benchmark, clock, monkeypatch):
    def load(*_, **__):
        clock.now += 2
        return replace(benchmark, notes=[])

    def check(_table, **_):
        clock.now += 5
        return []

    monkeypatch.setattr(datasets, "load", load)
    monkeypatch.setattr(images, "check_images", check)
    for _ in range(2):
        run_on(tmp_path, PLAIN).prepare()
        assert seconds_of(tmp_path, "data") == 12  # two tables are looked at
    benchmark.train = benchmark.train.take(np.arange(11))
    run_on(tmp_path, PLAIN).prepare()
    assert seconds_of(tmp_path, "data") > 12


def test_a_training_that_goes_on_after_a_kill_adds_the_epochs_that_it_goes_on_from(
    tmp_path, benchmark, clock
):
    history = Folder(tmp_path / "run")

    def train(*_, until, again=0, **__):
        """From the second epoch on again: the checkpoint is of the first."""
        kept = read_history(history)[: 1 if again else 0]
        for epoch in range(len(kept) + 1, until + 1):
            clock.now += 10
            kept.append({"epoch": epoch, "seconds": 10 + again})
            history.write_text(HISTORY, "".join(json.dumps(record) + "\n" for record in kept))
        if until < 3:
            raise KeyboardInterrupt

    recipe = recipe_of(f"output={tmp_path / 'run'}")
    killed, again = Run(recipe, training=partial(train, until=2)), partial(train, until=3, again=1)
    with pytest.raises(KeyboardInterrupt):
        killed.train(killed.prepare())
    Run(recipe, training=again).train(benchmark)
    assert seconds_of(tmp_path / "run", "train") == 30


def test_encoding_that_goes_on_after_a_kill_adds_to_its_time(tmp_path, benchmark, clock, monkeypatch):
    job, parts = Run(recipe_of(f"output={tmp_path / 'run'}")), []
    saved(tmp_path / "run" / "model", made("greedyhash"))

    def encode(jobs, _config, advance, *, until=3):
        began = len(parts)
        for _ in parts:
            advance(1, "")
        for number in range(began, until):
            clock.now += 20
            jobs[0].out.write_text(f"part-{number}", "")
            parts.append(number)
            advance(1, "")
        if until < 3:
            raise KeyboardInterrupt
        return len(parts) - began

    monkeypatch.setattr(run, "encode", partial(encode, until=2))
    with pytest.raises(KeyboardInterrupt):
        job.encode(benchmark)
    monkeypatch.setattr(run, "encode", encode)
    for _ in range(2):
        job.encode(benchmark)
        assert seconds_of(tmp_path / "run", "encode") == 60
