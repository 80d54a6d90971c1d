"""What a run checks before anything is started; the run itself is in tests/cluster."""

from pathlib import Path

import pytest
from samples import coloured_table

from ray_retrieval import recipe as recipes
from ray_retrieval.errors import ArtefactError, ModelError, RecipeError
from ray_retrieval.run import Run

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
    run.folder.write_json("training.json", {"key": run.training_key(benchmark)})
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
