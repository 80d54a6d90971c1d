"""What a training measures on the way: each image is looked at once, as often as was asked for."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loop_parts import LocalReporter, config, trainer
from samples import coloured_benchmark, coloured_table
from search_parts import draw_vectors
from threadpoolctl import threadpool_info

from ray_retrieval.data.table import ImageTable
from ray_retrieval.errors import RecipeError
from ray_retrieval.loop import Process, validation
from ray_retrieval.loop.validation import (
    has_an_answer,
    measure,
    notes_on_accuracy,
    rows_of_accuracy,
    rows_of_queries,
)
from ray_retrieval.metrics import retrieval

DELF = {
    "method": "delf",
    "image": {"size": 24, "resize": "long_side"},
    "crop": {"size": 16},
    "hidden": 8,
    "stage": "joint",
}
METHODS = {
    "codes": {},
    "vectors": {"method": "xbm", "images_per_class": 4},
    "several sizes": {
        "method": "gem",
        "image": {"size": 20, "resize": "long_side"},
        "projection": True,
        "loss": {"name": "contrastive", "negatives": 2, "queries": 24, "pool": 40},
    },
    "classes": DELF,
}
ROWS = np.array([30, 2, 59, 7, 8])


def benchmark_of(queries, mixed=False):
    made = coloured_benchmark(60, mixed_sizes=mixed)
    return replace(made, validation_queries=made.validation_database.take(ROWS) if queries else made.queries)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("inside", [True, False])
def test_each_validation_image_is_decoded_and_described_once(monkeypatch, name, inside):
    mixed = name == "several sizes"
    settings = config(augmentation={}, cache_memory="1KiB")
    made = trainer(settings, benchmark=benchmark_of(inside, mixed), **METHODS[name])
    decoded, compared = [], []
    for source in {made.queries, made.database}:
        prepared = source._prepared
        monkeypatch.setattr(
            source, "_prepared", lambda row, p=prepared, s=source: (decoded.append((s, row)), p(row))[1]
        )
    inner = made.method.compared
    made.method.compared = lambda images: (compared.append(len(images)), inner(images))[1]
    found = made.validate()
    expected = 60 if inside else 69
    assert len(decoded) == len(set(decoded)) == sum(compared) == expected
    assert ("accuracy" in found) == (name == "classes")


@pytest.mark.parametrize("name", METHODS)
def test_rows_of_the_database_are_measured_like_the_same_images_elsewhere(name):
    mixed = name == "several sizes"
    made = trainer(config(augmentation={}), benchmark=benchmark_of(True, mixed), **METHODS[name])
    found = made.validate()
    queries, database = made.benchmark.validation_queries, made.benchmark.validation_database
    described, _ = made._describer.describe(made.database)
    expected = measure(described.take(ROWS), queries, described, database, k=None, threads=1)
    assert {key: found[key] for key in expected} == expected
    if name == "classes":
        made.method.eval()
        with torch.no_grad():
            guesses = made.method.class_probabilities(made.database.batch(np.arange(60))).argmax(dim=1)
        assert found["accuracy"] == float((guesses.numpy() == database.labels).mean())


@pytest.mark.parametrize("name", ["codes", "vectors"])
def test_the_threads_of_a_worker_measure(monkeypatch, name):
    asked = []

    def watched(function):
        return lambda *given, **options: (asked.append(options["threads"]), function(*given, **options))[1]

    monkeypatch.setattr(validation, "mean_average_precision", watched(validation.mean_average_precision))
    monkeypatch.setattr(retrieval, "evaluate", watched(retrieval.evaluate))
    trainer(config(), process=Process(threads=3), **METHODS[name]).validate()
    assert asked == [3]


def test_the_threads_of_a_worker_learn_whitening(tmp_path):
    def threads():
        return {one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"}

    made, seen, before = (
        trainer(config(epochs=0), process=Process(threads=1), **METHODS["vectors"]),
        [],
        threads(),
    )
    made.method.after_training = lambda _: seen.append(threads())
    made.fit(LocalReporter(tmp_path))
    assert seen == [{1}]
    assert threads() == before


def without_class(benchmark, *labels):
    """The benchmark without the training images of some classes."""
    kept = np.flatnonzero(~np.isin(benchmark.train.labels, labels))
    return replace(benchmark, train=benchmark.train.take(kept), notes=[])


def test_accuracy_is_that_of_the_images_whose_class_is_trained():
    settings = config(augmentation={}, validation={"metric": "accuracy"})
    made = trainer(settings, benchmark=without_class(benchmark_of(True), 1), **METHODS["classes"])
    database = made.benchmark.validation_database
    rows = np.flatnonzero(database.labels != 1)
    assert rows_of_accuracy(made.method, made.benchmark).tolist() == rows.tolist()
    found = made.validate()
    with torch.no_grad():
        guesses = made.method.class_probabilities(made.database.batch(np.arange(60))).argmax(dim=1)
    assert found["accuracy"] == float((guesses.numpy() == database.labels)[rows].mean())
    (note,) = notes_on_accuracy(made.method, made.benchmark)
    assert "leaves out 20 of 60 validation images" in note
    assert notes_on_accuracy(made.method, benchmark_of(True)) == []


def test_accuracy_is_refused_where_no_validation_image_is_of_a_trained_class():
    made = benchmark_of(True)
    rows = np.flatnonzero(made.validation_database.labels == 1)
    made = replace(made, validation_database=made.validation_database.take(rows))
    settings = config(augmentation={}, validation={"metric": "accuracy"})
    with pytest.raises(RecipeError, match="the validation queries are of other classes than are trained"):
        trainer(settings, benchmark=without_class(made, 1), **METHODS["classes"])


@given(st.booleans(), st.lists(st.integers(0, 11), max_size=3), st.lists(st.integers(0, 11), max_size=4))
def test_a_query_is_no_answer_to_itself(several_labels, asked, searched):
    table = coloured_table(12, classes=5, several_labels=several_labels)
    asked, searched = (np.unique(rows).astype(np.int64) for rows in (asked, searched))

    def relevant(query, row):
        one, other = (np.atleast_1d(table.labels[which]) for which in (query, row))
        return query != row and ((one & other).any() if several_labels else (one == other).all())

    expected = not len(asked) or any(relevant(query, row) for query in asked for row in searched)
    assert has_an_answer(table.take(asked), table.take(searched)) == expected


DATABASE = coloured_table(12)


@given(rows=st.lists(st.integers(0, 11), unique=True))
def test_queries_are_found_where_they_were_taken_from(rows):
    found = rows_of_queries(DATABASE.take(np.array(rows, np.int64)), DATABASE)
    assert found is not None
    assert found.tolist() == rows


def changed(table, **columns):
    for name, values in columns.items():
        place = table.table.column_names.index(name) if name in table.table.column_names else None
        column = pa.array(values, table.table[name].type if place is not None else None)
        rows = table.table
        rows = rows.set_column(place, name, column) if place is not None else rows.append_column(name, column)
        table = ImageTable(rows, name="changed", classes=table.classes)
    return table


def test_other_images_of_the_same_ids_are_not_taken_for_them():
    some = DATABASE.take(np.arange(3))
    images = [{"bytes": some.image_bytes(row), "path": None} for row in range(3)]
    assert rows_of_queries(changed(some, image=images), DATABASE).tolist() == [0, 1, 2]
    turned = bytes(reversed(images[1]["bytes"]))  # of the same length
    assert (
        rows_of_queries(
            changed(some, image=[images[0], {"bytes": turned, "path": None}, images[2]]), DATABASE
        )
        is None
    )
    assert rows_of_queries(changed(some, id=["image-0000", "image-0001", "else"]), DATABASE) is None
    assert rows_of_queries(changed(some, label=[1, 1, 2]), DATABASE) is None
    assert rows_of_queries(changed(some, box=[None, [0.0, 0.0, 4.0, 4.0], None]), DATABASE) is None


def test_another_image_of_the_same_id_counts():
    """Two folders may call different images the same; what is in both is left out of its own results."""
    queries = coloured_table(6, seed=1)
    other, database = coloured_table(6, seed=2), coloured_table(12, seed=1)
    assert queries.ids == other.ids == database.ids[:6]
    vectors = draw_vectors(12, 6)
    asked = vectors.take(np.arange(6))
    found = measure(asked, queries, vectors.take(np.arange(6)), other, k=None, threads=1)
    assert found["recall@1"] == 1  # each finds the other image that is described alike
    apart = retrieval.evaluate(asked.data, queries.labels, asked.data.copy(), other.labels)
    assert found == {name: apart[name].value for name in found}
    inside = measure(asked, queries, vectors, database, k=None, threads=1)
    own = {"query_ids": queries.ids, "database_ids": database.ids}
    left_out = retrieval.evaluate(asked.data, queries.labels, vectors.data, database.labels, **own)
    assert inside == {name: left_out[name].value for name in inside}


@pytest.mark.parametrize(
    ("validation", "measured"),
    [
        ({"every": None}, [20]),
        ({"every": None, "every_steps": 7}, [7, 14, 20]),
        ({"every_steps": 7}, [7, 8, 14, 16, 20]),
        ({"every": 2}, [16, 20]),
    ],
)
def test_measured_is_when_it_was_asked_for_and_at_the_end(tmp_path, validation, measured):
    settings = config(epochs=None, steps=20, validation=validation, checkpoint={"min_seconds": 1e9})
    made = trainer(settings)  # epochs of 8 steps
    made.fit(LocalReporter(tmp_path))
    assert [one["step"] for one in made.progress.validations] == measured
