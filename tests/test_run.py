"""What a run checks before anything is started; the run itself is in tests/cluster."""

from contextlib import nullcontext
from pathlib import Path

import pytest
from samples import coloured_table

from ray_retrieval import recipe as recipes
from ray_retrieval import run
from ray_retrieval.data.source import check_images, read_errors
from ray_retrieval.errors import ArtefactError, ClusterError, ModelError, RecipeError, RetrievalError
from ray_retrieval.run import Run, images
from ray_retrieval.run.training import Training
from ray_retrieval.storage import Folder, write_description
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


def run_on(folder, *settings, fresh=False):
    return Run(recipes.load(QUICKSTART, [f"output={folder}", *settings]), fresh=fresh)


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


@pytest.mark.parametrize(("begun", "counted"), [(False, 11), (True, 10)])
def test_broken_images_that_are_mended_count_unless_something_was_trained_without_them(
    tmp_path, begun, counted
):
    database, train = write_images(tmp_path / "database", 60), write_images(tmp_path / "train", seed=1)
    whole, files = (train / "a" / "00.png").read_bytes(), [train / "a" / "00.png", train / "b" / "01.png"]
    for file in files:
        file.write_bytes(b"no image")
    run = run_on(tmp_path / "out", f"data={{name: images, database: {database}, train: {train}}}")
    assert len(run.prepare().train) == 10
    if begun:
        run.folder.write_text("training.json", "{}")
    files[0].write_bytes(whole)
    for _ in range(2):
        assert len(run.prepare().train) == counted
        errors = read_errors(run.folder / "errors", "train.parquet")
        assert [error.id for error in errors][-1] == "b/01.png"
        assert len(errors) == 12 - counted


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


def test_a_folder_that_holds_something_else_is_left_as_it_is(tmp_path):
    mine = ["errors/mine.log", "split/train.txt", "data.json", "timings.json", "keep.txt"]
    for name in mine:
        Folder(tmp_path).write_text(name, "mine")
    for fresh in (False, True):
        with pytest.raises(
            RecipeError, match=r"holds something that is no run \(data.json, errors, keep.txt, …\)"
        ):
            run_on(tmp_path, "data={name: images, database: /nowhere}", fresh=fresh).prepare()
    assert list(Folder(tmp_path).files()) == sorted(mine)


def test_nor_is_a_recipe_of_the_users_written_over(tmp_path):
    (tmp_path / "recipe.yaml").write_text("# mine\nname: mine\n")
    for fresh in (False, True):
        with pytest.raises(RecipeError, match=r"no run \(recipe.yaml\).*choose another output"):
            run_on(tmp_path, fresh=fresh).prepare()
    assert (tmp_path / "recipe.yaml").read_text().startswith("# mine")


def test_a_run_of_another_version_is_refused_and_can_be_deleted(tmp_path):
    write_description(Folder(tmp_path), "run.json", kind="run", version=2, body={})
    with pytest.raises(ArtefactError, match="run has format version 2"):
        run_on(tmp_path)
    run_on(tmp_path, fresh=True)
    (tmp_path / "run.json").write_text('{"format": "of somebody else"}')
    with pytest.raises(RecipeError, match=r"holds a run.json that no run wrote, so `fresh` does not"):
        run_on(tmp_path, fresh=True)


class TestFresh:
    """What an earlier run left is deleted once it is clear that the new one can begin."""

    @pytest.fixture
    def out(self, tmp_path):
        """A run that has a model, with a file of the user's."""
        out = Folder(tmp_path / "out")
        run_on(out).prepare()
        out.write_text("model/model.json", "{}")
        out.write_text("letter.txt", "dear")
        return out

    @pytest.mark.parametrize(
        ("setting", "refused"),
        [
            ("stages=[{name: a, settings: {train.epoks: 3}}]", "epoks"),
            ("encode.engine=onnx", "has none yet .leave it out; then export its model"),
            ("train.start=${output}/model", r"train.start: `fresh` would delete .*/model"),
            (
                "evaluate.rerank=[{name: geometric_verification, local: '${output}/index'}]",
                r"evaluate.rerank: `fresh` would delete .*/index",
            ),
            ("data={name: images, database: /nowhere}", "nowhere: nothing is there"),
            ("method.backbone={name: resnet18, weights: nowhere.pth}", "nowhere.pth"),
            ("name=again", "Ray did not start"),
        ],
    )
    def test_nothing_is_deleted_for_a_run_that_cannot_begin(self, out, setting, refused, monkeypatch):
        def connect():
            raise ClusterError("Ray did not start")

        monkeypatch.setattr(run, "connect", connect)
        gem = (
            ["method={name: gem, image: {size: 16}, whitening: {name: none}}"] if "rerank" in setting else []
        )
        before = {name: out.read_bytes(name) for name in out.files()}
        with pytest.raises(RetrievalError, match=refused):
            run_on(out, *gem, setting, fresh=True).all()
        assert {name: out.read_bytes(name) for name in out.files()} == before

    def test_what_no_run_writes_stays_and_images_are_checked_once(self, out, tmp_path, monkeypatch):
        photos = write_images(tmp_path / "photos", 60)
        (photos / "a" / "00.png").write_bytes(b"no image")
        looked = []

        def check(table, **settings):
            looked.append(table.name)
            return check_images(table, **settings)

        monkeypatch.setattr(images, "check_images", check)
        monkeypatch.setattr(run, "connect", nullcontext)
        monkeypatch.setattr(run, "worker_resources", lambda _: {})
        job = run_on(out, f"data={{name: images, database: {photos}}}", "seed=3", fresh=True)
        monkeypatch.setattr(
            job, "train", lambda benchmark: looked.append(f"trained on {len(benchmark.train)}")
        )
        with pytest.raises(ArtefactError, match="no model here"):
            job.only_train()
        assert looked[-1].startswith("trained on")
        assert len(looked) == len(set(looked))
        assert recipes.load(f"{out}/recipe.yaml").seed == 3
        assert {"letter.txt", "run.json", "split", "errors"} <= set(out.names())


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
    trained = Folder(tmp_path / "a")
    trained.write_json("training.json", {"key": "k", "start": None, "notes": noted})
    trained.write_json("model/model.json", {})
    again = run_on(tmp_path / "a", *settings, XBM.format("warmup_steps: 1000")).prepare().notes
    assert again == noted  # so that `train` and then `evaluate` say what one `run` says
    noted = run_on(tmp_path / "b", *settings, XBM.format("warmup_steps: 2")).prepare().notes
    assert not any("memory" in note for note in noted)
