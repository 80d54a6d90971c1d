import pickle
from pathlib import Path

import pytest

from ray_retrieval import recipe
from ray_retrieval.encode import EncodeConfig
from ray_retrieval.errors import QueryError, RecipeError, RetrievalError

JOBS = sorted((Path(__file__).parents[1] / "jobs").glob("*.yaml"))
QUICKSTART = Path(__file__).parents[1] / "jobs" / "quickstart.yaml"


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_recipe_in_jobs_is_valid_and_reads_back_the_same(path, tmp_path):
    loaded = recipe.load(path)
    (tmp_path / "again.yaml").write_text(recipe.dump(loaded))
    assert recipe.load(tmp_path / "again.yaml") == loaded


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", "unknown key 'train.epoch' (did you mean 'epochs'?)"),
        ("method.bit=3", "unknown key 'method.bit' (did you mean 'bits'?)"),
        ("method.backbone.nam=small", "unknown key 'method.backbone.nam' (did you mean 'name'?)"),
        ("train.schedule.warm=0.1", "unknown key 'train.schedule.warm' (did you mean 'warmup'?)"),
        ("trian.epochs=3", "unknown key 'trian' (did you mean 'train'?)"),
        ("zzz=3", "unknown key 'zzz' (known here: data, encode, evaluate, index, method"),
        ("method.bits=0", "'method.bits': input should be greater than or equal to 1, got 0"),
        ("method.bits=many", "'method.bits'"),
        ("train.batch_size=[1]", "'train.batch_size'"),
        ("method.backbone.name=lenet", "'method.backbone.name'"),
        ("data.name=mnist", "'data'"),
        ("train.epochs", "not of the form key=value"),
        ("name=${nowhere}", "nowhere"),
        ("train.augmentation.random_crop=true", "needs a 'method.image.resize_to' above 24, the size"),
        ("method={name: hashnet, alpha: ten}", "'method.alpha'"),
        ("method={name: hashnet, preset: oficial}", "'method.preset'"),
        ("method={name: hashnet, penalty: 1}", "unknown key 'method.penalty'"),
    ],
)
def test_mistakes_are_named_with_their_mend(override, message):
    with pytest.raises(RecipeError) as caught:
        recipe.load(QUICKSTART, [override])
    assert message.lower() in str(caught.value).lower()
    assert "\n" not in str(caught.value)


def test_parts_of_batches_are_refused_where_the_loss_pairs_images():
    pairs = "method={name: hashnet, backbone: {name: small, weights: none}, image: {size: 24}}"
    assert recipe.load(QUICKSTART, [pairs]).method.alpha == "10/bits"
    with pytest.raises(RecipeError, match=r"'train.accumulate' is 1 for hashnet, whose loss pairs images"):
        recipe.load(QUICKSTART, [pairs, "train.accumulate=2"])


def test_settings_replace_the_files_values():
    loaded = recipe.load(QUICKSTART, ["train.optimizer.lr=0.5", "method.bits=12", "seed=3"])
    assert (loaded.train.optimizer.lr, loaded.method.bits, loaded.seed) == (0.5, 12, 3)


def test_one_field_can_refer_to_another():
    loaded = recipe.load(QUICKSTART, ["output=runs/${method.bits}bits"])
    assert loaded.output == "runs/32bits"


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "\t"])
def test_files_that_are_no_recipe(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"r.yaml"):
        recipe.load(tmp_path / "r.yaml")


def test_missing_recipe_names_the_path():
    with pytest.raises(RecipeError, match=r"nowhere.yaml: no such recipe"):
        recipe.load("nowhere.yaml")


def test_workers_and_output_do_not_make_another_model():
    base = recipe.load(QUICKSTART).of_the_model()
    assert base == recipe.load(QUICKSTART, ["train.workers=2", "output=x", "index.shards=5"]).of_the_model()
    other = recipe.load(QUICKSTART, ["train.optimizer.lr=0.5"]).of_the_model()
    assert recipe.differences(base, other) == ["train.optimizer.lr: 0.05 → 0.5"]


def test_single_settings_make_a_configuration():
    assert recipe.from_settings(EncodeConfig, ["batch_size=3"]).batch_size == 3
    with pytest.raises(RecipeError, match="unknown key 'batch'"):
        recipe.from_settings(EncodeConfig, ["batch=3"])


def test_errors_survive_the_way_between_processes():
    error = RecipeError("wrong", where="here", mend="mend it")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (RecipeError, "here: wrong (mend it)")
    query = pickle.loads(pickle.dumps(QueryError("large", status=413)))
    assert (query.status, str(query)) == (413, "large")
    assert isinstance(query, RetrievalError)
