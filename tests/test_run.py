"""What a run checks before anything is started; the run itself is in tests/cluster."""

from pathlib import Path

import pytest
from samples import coloured_table

from ray_retrieval import recipe as recipes
from ray_retrieval.errors import ArtefactError, ModelError, RecipeError
from ray_retrieval.run import Run
from ray_retrieval.run.training import Training
from ray_retrieval.train import train as train_model

QUICKSTART = Path(__file__).parents[1] / "jobs" / "quickstart.yaml"


def write_images(folder, count=12, *, seed=0):
    """Class folders a, b, c with images named alike whatever the seed."""
    table = coloured_table(count, seed=seed)
    for row in range(count):
        path = folder / "abc"[row % 3] / f"{row:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(table.image_bytes(row))
    return folder


def run_on(folder, *settings):
    return Run(recipes.load(QUICKSTART, [f"output={folder}", *settings]))


def test_an_image_that_is_broken_leaves_others_of_that_name_alone(tmp_path):
    database = write_images(tmp_path / "database", 60)
    train = write_images(tmp_path / "train", seed=1)
    (train / "a" / "00.png").write_bytes(b"no image")
    data = f"data={{name: images, database: {database}, train: {train}}}"
    benchmark = run_on(tmp_path / "out", data).prepare()
    assert len(benchmark.train) == 11
    assert len(benchmark.queries) + len(benchmark.validation_queries) + len(benchmark.database) == 60
    listed = (tmp_path / "out" / "errors").iterdir()
    assert {path.name for path in listed} >= {"train.parquet", "validation_queries.parquet"}


def test_a_run_goes_on_with_the_images_it_was_begun_with_or_not_at_all(tmp_path):
    database = write_images(tmp_path / "database", 60)
    train = write_images(tmp_path / "train", seed=1)
    data = f"data={{name: images, database: {database}, train: {train}}}"
    run = run_on(tmp_path / "out", data)
    benchmark = run.prepare()
    run.folder.write_json(
        "training.json", {"key": Training(run.recipe, train_model, run.display).key(benchmark)}
    )
    (train / "b" / "99.png").write_bytes((train / "b" / "01.png").read_bytes())
    again = run_on(tmp_path / "out", data)
    with pytest.raises(RecipeError, match="not those that this run was begun with"):
        again.train(again.prepare())


def test_after_a_first_failure_the_corrected_command_runs(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ModelError, match=r"nowhere.pth"):
        run_on(out, "method.backbone={name: resnet18, weights: nowhere.pth}").prepare()
    assert list(out.iterdir()) == []
    run_on(out).prepare()


def test_selecting_the_other_model_is_another_run(tmp_path):
    run_on(tmp_path).prepare()
    with pytest.raises(RecipeError, match=r"train.select: best → last"):
        run_on(tmp_path, "train.select=last")


def test_a_section_is_replaced_as_a_whole():
    recipe = recipes.load(QUICKSTART, ["train.schedule={name: step, every: 5}"])
    assert recipe.train.schedule.every == 5


def test_an_output_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtefactError, match="the store refuses") as caught:
        run_on(tmp_path / "file" / "out").prepare()
    assert "\n" not in str(caught.value)


def write_classes(folder, classes, each=6):
    """So many class folders of images."""
    table = coloured_table(classes * each, classes=classes)
    for row in range(classes * each):
        path = folder / f"class-{row % classes:02d}" / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(table.image_bytes(row))
    return folder


XBM = "method={{name: xbm, image: {{size: 16}}, backbone: {{name: small, weights: none}}, {}}}"


def test_codes_are_refused_where_queries_are_searched_in_themselves(tmp_path):
    photos = write_classes(tmp_path / "photos", 12)
    data = f"data={{name: images, database: {photos}, split: classes}}"
    with pytest.raises(RecipeError, match="greedyhash makes codes, whose measures would count each"):
        run_on(tmp_path / "out", data).prepare()
    assert not (tmp_path / "out").exists()
    run_on(tmp_path / "out", data, XBM.format("images_per_class: 2"), "train.batch_size=4").prepare()


def test_batches_that_the_classes_cannot_fill_are_refused_before_anything_starts(tmp_path):
    photos = write_classes(tmp_path / "photos", 12)
    data = f"data={{name: images, database: {photos}, split: classes}}"
    refused = r"train.batch_size: a batch of 64 images takes 16 classes of 4 images, 4 .*lower it to 16"
    with pytest.raises(RecipeError, match=refused):
        run_on(tmp_path / "out", data, XBM.format("images_per_class: 4"), "train.batch_size=64").prepare()
    with pytest.raises(RecipeError, match="6 images are not a multiple of the 4"):
        run_on(tmp_path / "out", data, XBM.format("images_per_class: 4"), "train.batch_size=6").prepare()


def test_a_memory_that_never_begins_is_noted(tmp_path):
    photos = write_classes(tmp_path / "photos", 12)
    data = f"data={{name: images, database: {photos}, split: classes}}"
    settings = (data, "train.batch_size=8", "train.epochs=2", "train.augmentation={}")
    noted = run_on(tmp_path / "a", *settings, XBM.format("warmup_steps: 1000")).prepare().notes
    assert any("the memory never begins" in note for note in noted)
    noted = run_on(tmp_path / "b", *settings, XBM.format("warmup_steps: 2")).prepare().notes
    assert not any("memory" in note for note in noted)
