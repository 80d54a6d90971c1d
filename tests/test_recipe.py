import pickle
from pathlib import Path

import pytest

from ray_retrieval import recipe
from ray_retrieval.data.datasets.gldv2 import Gldv2Config
from ray_retrieval.data.datasets.landmarks import PUBLISHED
from ray_retrieval.data.datasets.sfm import SfmConfig
from ray_retrieval.data.datasets.survey import about
from ray_retrieval.encode import EncodeConfig
from ray_retrieval.errors import QueryError, RecipeError, RetrievalError
from ray_retrieval.yaml_text import read_yaml

JOBS = [Path(__file__).parents[1] / "jobs" / f"{name}.yaml" for name in recipe.ready_made()]
QUICKSTART = Path(__file__).parents[1] / "jobs" / "quickstart.yaml"


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_recipe_in_jobs_is_valid_and_reads_back_the_same(path, tmp_path):
    for loaded in recipe.load_study(path):
        (tmp_path / "again.yaml").write_text(recipe.dump(loaded))
        assert recipe.load(tmp_path / "again.yaml") == loaded


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_published_results_are_of_the_recipes_own_benchmark(path):
    for member in recipe.load_study(path):
        own = {about(member.data).name}
        if isinstance(member.data, SfmConfig | Gldv2Config):
            # Measured on any of these, which `data.test` names.
            own = {published.title for published in PUBLISHED.values()}
        assert {row.benchmark for row in member.published} <= own
        assert all(member.method.form.size in row.values for row in member.published)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_what_was_published_in_float32_is_trained_in_it(path):
    """DELF's port has mixed precision; the recipes of ArcFace differ from what was published anyway."""
    for member in recipe.load_study(path):
        arcface = getattr(getattr(member.method, "loss", None), "name", "") == "arcface"
        if member.published and member.method.name != "delf" and not arcface:
            assert member.train.precision == "float32"


def test_recipes_that_measure_a_model_have_the_network_of_the_recipe_that_trains_it():
    """What describes may differ, what has weights may not."""
    loaded = [member for path in JOBS for member in recipe.load_study(path)]
    trained = {f"{member.output}/model": member for member in loaded if member.train.start is None}
    measured = [member for member in loaded if member.train.start is not None]
    assert measured
    for member in measured:
        whole = trained[member.train.start.replace("_1024/", "/")]  # the same with method.image.size=1024
        maker = whole.method
        free = {"image", "scales", "combine", "describe_with"}
        assert member.train.epochs == 0
        assert member.train.precision == whole.train.precision
        assert maker.form == member.method.form
        if member.method.loss.name == "arcface":
            assert member.method.loss == maker.loss
        else:
            free.add("loss")
        assert member.method.model_dump(exclude=free) == maker.model_dump(exclude=free)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", "unknown key 'train.epoch' (did you mean 'epochs'?)"),
        (
            "train.validation.metric=recall@1",
            r"'train.validation.metric': recall@1 is not measured of the codes that",
        ),
        ("index.search=IVF8,Flat", "'index.search': 'IVF8,Flat' is no search of codes"),
        ("index={search: BIVF64, train_rows: 63}", "'index.search': 'BIVF64' has 64 cells, and there are 63"),
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
        ("train={epochs: 1, steps: 2, epochs: 3}", "line 1 has the key 'epochs' of line 1 again"),
        ("seed=2020-13-45", "'seed': input should be a valid integer"),
        ("seed=0b_", "seed: not valid YAML"),
        ("seed=!!int ''", "seed: not valid YAML"),
        ("seed=" + 999 * "[", "seed: not valid YAML: too deeply nested"),
        ("seed=&a [*a]", "a value is nested too deeply, or in itself"),
        (f"seed={2**64}", "'seed': input should be less than 18446744073709551616"),
        ("name=${nowhere}", "nowhere"),
        ("train.augmentation.random_crop=true", "needs a 'method.image.resize_to' above 24, the size"),
        ("published=[{sorce: a, metric: map@all, values: {16: 0.7}}]", "unknown key 'published.0.sorce'"),
        ("published=[{source: a, metric: map@all, values: {16: 68.7}}]", "'published.0.values.16'"),
        ("published=[{source: a, metric: map@all, values: {}}]", "'published.0.values'"),
        ("method={name: greedyhsh}", "'method': unknown name 'greedyhsh' (did you mean 'greedyhash'"),
        ("method.name=zzz", "'method': unknown name 'zzz' (known here: greedyhash, "),
        ("method={name: hashnet, alpha: ten}", "'method.alpha': a number above 0, or '10/bits', got 'ten'"),
        ("method={name: hashnet, alpha: true}", "'method.alpha'"),
        ("method={name: hashnet, alpha: .inf}", "'method.alpha'"),
        ("method={name: hashnet, preset: oficial}", "'method.preset'"),
        ("method={name: hashnet, penalty: 1}", "unknown key 'method.penalty'"),
    ],
)
def test_mistakes_are_named_with_their_mend(override, message):
    with pytest.raises(RecipeError) as caught:
        recipe.load(QUICKSTART, [override])
    assert message.lower() in str(caught.value).lower()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["index.search=FOO12"], "'index.search': FAISS cannot build 'FOO12'"),
        (["index.search=PQ7x4"], "'index.search': FAISS cannot build 'PQ7x4'"),
        (["index.search=IVF64,Flat", "index.train_rows=63"], "there are 63 rows to train on; take fewer"),
    ],
)
def test_a_search_that_cannot_be_built_is_refused_in_the_recipe(settings, message):
    with pytest.raises(RecipeError) as caught:
        recipe.load("xbm_digits", settings)
    assert message in str(caught.value)
    assert recipe.load("xbm_digits", ["index.search=PQ8x4"]).index.search == "PQ8x4"


def test_parts_of_batches_are_refused_where_the_loss_pairs_images():
    pairs = "method={name: hashnet, backbone: {name: small, weights: none}, image: {size: 24}}"
    assert recipe.load(QUICKSTART, [pairs]).method.alpha == "10/bits"
    assert recipe.load(QUICKSTART, [pairs, "method.alpha=1e-1"]).method.alpha == 0.1
    with pytest.raises(
        RecipeError,
        match=r"'train.accumulate': the loss of hashnet pairs images .*: set it to 1",
    ):
        recipe.load(QUICKSTART, [pairs, "train.accumulate=2"])


@pytest.mark.parametrize("setting", ["published.x.tolerance=0.5", "published.x=0.5"])
def test_a_word_is_no_place_in_a_list(setting):
    with pytest.raises(RecipeError, match="has a word where a list has numbers"):
        recipe.load("gem_gl18_resnet101_ap", [setting])


def test_a_repeated_key_is_refused_with_both_its_lines(tmp_path):
    text = QUICKSTART.read_text()
    line = text.splitlines().index("train:") + 1
    again = len(text.splitlines()) + 1
    (tmp_path / "r.yaml").write_text(f"{text}train: {{epochs: 1}}\n")
    told = rf"r.yaml: not valid YAML: line {again} has the key 'train' of line {line} again"
    with pytest.raises(RecipeError, match=told):
        recipe.load(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="has the key 'k1' of line 1 again"):
        recipe.rerank_steps(["{name: k_reciprocal, k1: 20, k1: 30}"])


def test_what_stands_beside_a_merged_mapping_replaces_what_it_brings():
    text = "a: {b: &b {<<: &c {x: 1, y: 1}, x: 2}}\nd: {<<: *b, y: 3}\n"
    found = {"a": {"b": {"x": 2, "y": 1}}, "d": {"x": 2, "y": 3}}
    assert read_yaml(text, where="text") == found


def test_dates_are_text(tmp_path):
    assert recipe.load(QUICKSTART, ["name=2020-10-10"]).name == "2020-10-10"
    assert recipe.load(QUICKSTART, ["name=2020-13-45"]).name == "2020-13-45"
    with pytest.raises(RecipeError, match=r"'rerank.0': unknown name '2020-13-45'"):
        recipe.rerank_steps(["2020-13-45"])


def test_numbers_are_decimal():
    """As of `seq -w`, by which the seeds 8 and 10 would be one."""
    seeds = [recipe.load(QUICKSTART, [f"seed={seed}"]).seed for seed in ("008", "010", "0", "00", "0x10")]
    assert seeds == [8, 10, 0, 0, 16]
    assert recipe.load(QUICKSTART, ["name=007"]).name == "007"
    assert recipe.load(QUICKSTART, ["train.optimizer.lr=0.05"]).train.optimizer.lr == 0.05
    with pytest.raises(RecipeError, match=r"'seed': input should be a valid integer.*'1:30'"):
        recipe.load(QUICKSTART, ["seed=1:30"])


def test_settings_replace_the_files_values():
    loaded = recipe.load(QUICKSTART, ["train.optimizer.lr=0.5", "method.bits=12", "seed=3"])
    assert (loaded.train.optimizer.lr, loaded.method.bits, loaded.seed) == (0.5, 12, 3)


def test_a_setting_or_a_step_alone_is_that_one_and_not_its_letters():
    assert recipe.load(QUICKSTART, "method.bits=12").method.bits == 12
    assert [member.seed for member in recipe.load_study(QUICKSTART, "seed=[4, 5]")] == [4, 5]
    assert recipe.rerank_steps("diffusion") == recipe.rerank_steps(["diffusion"])
    assert recipe.rerank_steps("none") == ()


DELF = QUICKSTART.with_name("delf_views_cpu.yaml")  # counts in epochs, and so does its stage
GLDV2 = QUICKSTART.with_name("delf_gldv2_resnet50.yaml")  # counts in steps
DELG = QUICKSTART.with_name("delg_gldv2_resnet50.yaml")  # has a global head, and searches by it


@pytest.mark.parametrize(
    ("path", "settings", "length", "of_stages"),
    [
        (DELF, [], (3, "epochs"), [(3, "epochs")]),
        (DELF, ["train.steps=100"], (100, "steps"), [(100, "steps")]),
        (DELF, ["train.steps=100", "train.epochs=null"], (100, "steps"), [(100, "steps")]),
        (GLDV2, ["train.epochs=2"], (2, "epochs"), [(2, "epochs")]),
        (GLDV2, ["train.epochs=0"], (0, "epochs"), []),
        (DELF, ["train={epochs: 4}", "train.steps=7"], (7, "steps"), [(7, "steps")]),
        (DELF, ["stages=[{name: a, settings: {train.steps: 9}}]"], (3, "epochs"), [(9, "steps")]),
        (GLDV2, ["stages=[{name: a, settings: {train.epochs: 1}}]"], (500000, "steps"), [(1, "epochs")]),
        (
            DELF,
            ["train.steps=5", "stages=[{name: a, settings: {train.epochs: 1}}]"],
            (5, "steps"),
            [(1, "epochs")],
        ),
    ],
)
def test_a_length_replaces_one_in_the_other_unit(path, settings, length, of_stages):
    loaded = recipe.load(path, settings)
    assert loaded.train.length == length
    assert [stage.train.length for stage in loaded.stage_recipes()] == of_stages


def test_two_lengths_at_once_are_refused():
    with pytest.raises(RecipeError, match="got both: set one of them to null"):
        recipe.load(DELF, ["train.steps=100", "train.epochs=2"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("[{name: a, settings: {method.hidden: 8}}, {name: a, settings: {method.hidden: 9}}]", "called 'a'"),
        (
            "[{name: a, settings: {train: {epochs: 1}}}]",
            r"single settings such as 'train\.…', got all of 'train'",
        ),
        ("[{name: a, settings: {method: {name: gem}}}]", "got all of 'method'"),
        (
            "[{name: a, settings: {train.start: elsewhere}}]",
            r"starts from the one before it, got 'train\.start'",
        ),
        ("[{name: a, settings: {index.shards: 3}}]", r"of 'method' and 'train', got 'index\.shards'"),
    ],
)
def test_mistakes_in_stages_are_named(settings, message):
    with pytest.raises(RecipeError, match=message):
        recipe.load(DELF, [f"stages={settings}"])


@pytest.mark.parametrize(
    ("path", "setting", "message"),
    [
        (DELF, "index.local.shortlist=global", r"'index\.local\.shortlist' is global.*'method\.global_head'"),
        (DELG, "method.global_head=null", r"'index\.local\.shortlist' is global"),
        (
            DELF,
            "index.local={shortlist: exact, factory: Flat}",
            r"'index\.local\.factory' is for .* not for exact",
        ),
        (DELG, "index.local.factory=Flat", r"'index\.local\.factory' is for .* not for global: leave it out"),
        (DELF, "method.dimension=97", r"'method': 'dimension' is at most 96, the channels of mobilenet_v2"),
        (DELF, "method.backbone.name=vgg16", r"'method': 'backbone\.name': vgg16 is not cut .*choose one of"),
    ],
)
def test_what_an_index_of_local_features_would_refuse_is_refused_in_the_recipe(path, setting, message):
    with pytest.raises(RecipeError, match=message):
        recipe.load(path, [setting])


def test_stages_are_not_held_to_what_is_done_with_the_final_model():
    tuning = "stages=[{name: tuning, settings: {method.stage: tuning, method.reduction: {name: pca},"
    (stage,) = recipe.load(DELG, [f"{tuning} method.global_head: null}}}}]"]).stage_recipes()
    assert (stage.method.stage, stage.method.global_head) == ("tuning", None)
    assert stage.index == recipe.IndexConfig()
    assert recipe.load(DELF, ["index.local={factory: Flat}"]).index.local.factory == "Flat"


def test_one_field_can_refer_to_another():
    loaded = recipe.load(QUICKSTART, ["output=runs/${method.bits}bits"])
    assert loaded.output == "runs/32bits"
    assert recipe.load(QUICKSTART, ["output=runs/${seed}"]).output == "runs/0"


def outputs(*settings):
    return [member.output for member in recipe.load_study(QUICKSTART, list(settings))]


def test_a_study_has_a_recipe_for_every_combination():
    members = recipe.load_study(QUICKSTART, ["method.bits=[32,16]", "seed=[0,7]"])
    assert [(member.method.bits, member.seed) for member in members] == [(32, 0), (32, 7), (16, 0), (16, 7)]
    assert members[3].output == "runs/quickstart/16bits/seed7"
    assert len({member.of_the_model()["method"]["bits"] for member in members}) == 2
    assert recipe.load_study(QUICKSTART) == [recipe.load(QUICKSTART)]


def test_references_are_resolved_with_each_members_own_values():
    name = "name=n-${method.bits}-${seed}"
    members = recipe.load_study(QUICKSTART, ["method.bits=[16,32]", "seed=[1,2]", name])
    assert [member.name for member in members] == ["n-16-1", "n-16-2", "n-32-1", "n-32-2"]


def test_a_folder_is_added_only_for_what_the_output_does_not_refer_to():
    bits, seeds = "method.bits=[16,32]", "seed=[0,1]"
    assert outputs(bits, "output=x/${method.bits}") == ["x/16", "x/32"]
    assert outputs(bits, seeds, "output=x/${method.bits}")[:2] == ["x/16/seed0", "x/16/seed1"]
    assert outputs(bits, seeds, "output=x/${seed}")[:2] == ["x/0/16bits", "x/1/16bits"]
    assert outputs("seed=[3]", "output=x/") == ["x/seed3"]
    assert outputs(bits, "output=s3://b/x?region=y") == [
        "s3://b/x/16bits?region=y",
        "s3://b/x/32bits?region=y",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["method.bits=[]"], "'method.bits' is an empty list"),
        (["seed=[]"], "'seed' is an empty list"),
        (["method.bits=[16, 32, 16]"], "'method.bits' has 16 more than once"),
        (["method.bits=[16, many]"], "'method.bits' takes a list of whole numbers, got 'many'"),
        (["method.bits=[16.0]"], "'method.bits' takes a list of whole numbers, got 16.0"),
        (["seed=[true]"], "'seed' takes a list of whole numbers, got True"),
        (["method.bits=[[16]]"], "'method.bits' takes a list of whole numbers"),
        (["method.bits=[16, 0]"], "'method.bits': input should be greater than or equal to 1, got 0"),
        (["seed=[0, -1]"], "'seed': input should be greater than or equal to 0, got -1"),
        (
            ["method.bits=[1, 11]", "seed=[1, 11]", "output=x/${method.bits}${seed}"],
            "x/111: two runs of the study would write there",
        ),
    ],
)
def test_mistakes_in_a_study_are_named(settings, message):
    with pytest.raises(RecipeError) as caught:
        recipe.load_study(QUICKSTART, settings)
    assert message.lower() in str(caught.value).lower()


def test_one_run_is_not_read_from_a_study():
    with pytest.raises(RecipeError, match=r"'seed' is a list.*load_study, or choose one, e.g. seed=4"):
        recipe.load(QUICKSTART, ["seed=[4, 5]"])


def test_what_is_published_is_not_of_the_model():
    row = "published=[{source: a, metric: map@all, values: {16: 0.7, 32: 0.8}}]"
    loaded = recipe.load(QUICKSTART, [row])
    assert loaded.published[0].values == {16: 0.7, 32: 0.8}
    assert loaded.published[0].tolerance == 0.01
    assert loaded.of_the_model() == recipe.load(QUICKSTART).of_the_model()


def test_what_is_missing_is_said_last_and_is_to_be_stated(tmp_path):
    (tmp_path / "r.yaml").write_text("name: r\nseed: many\n")
    with pytest.raises(RecipeError, match=r"'seed': .* got 'many'; and \d more$"):
        recipe.load(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("name: r\n")
    with pytest.raises(RecipeError, match=r"field required; and \d more \(state it\)$"):
        recipe.load(tmp_path / "r.yaml")


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "\t"])
def test_files_that_are_no_recipe(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"r.yaml"):
        recipe.load(tmp_path / "r.yaml")


def test_a_folder_is_no_recipe_but_may_hold_one(tmp_path):
    with pytest.raises(RecipeError, match=r"a folder, no recipe \(give a file of YAML in it\)"):
        recipe.load(tmp_path)
    (tmp_path / "recipe.yaml").write_text("name: r\n")
    with pytest.raises(RecipeError, match=r"a folder, no recipe \(give .*/recipe.yaml\)"):
        recipe.load(tmp_path)


def test_a_recipe_may_lie_in_a_store(tmp_path):
    place = f"file://{tmp_path}"
    (tmp_path / "recipe.yaml").write_text(QUICKSTART.read_text())
    assert recipe.load(f"{place}/recipe.yaml", ["seed=3"]) == recipe.load(QUICKSTART, ["seed=3"])
    with pytest.raises(RecipeError, match=rf"no such recipe \(give {place}/recipe.yaml\)"):
        recipe.load(place)
    with pytest.raises(RecipeError, match=rf"{place}/r.yaml: no such recipe"):
        recipe.load(f"{place}/r.yaml")
    (tmp_path / "recipe.yaml").write_bytes(b"\xff")
    with pytest.raises(RecipeError, match=rf"{place}/recipe.yaml: not valid YAML"):
        recipe.load(f"{place}/recipe.yaml")


def test_missing_recipe_names_the_path():
    with pytest.raises(RecipeError, match=r"nowhere.yaml: no such recipe"):
        recipe.load("nowhere.yaml")


@pytest.mark.parametrize("path", ["x" * 300, "~nobody-is-called-so/r.yaml"])
def test_a_path_that_cannot_be_is_no_recipe(path):
    with pytest.raises(RecipeError, match="no such recipe"):
        recipe.load(path)


def test_a_recipe_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "r.yaml").touch()
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(RecipeError, match=r"r.yaml: cannot be read: Permission denied"):
        recipe.load(tmp_path / "r.yaml")


def test_ready_made_recipes_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {"quickstart", "xbm_sop"} < set(recipe.ready_made())
    assert "serve" not in recipe.ready_made()
    assert recipe.load("quickstart", ["seed=3"]) == recipe.load(QUICKSTART, ["seed=3"])
    with pytest.raises(RecipeError, match=r"quikstart: no such recipe \(did you mean 'quickstart'\?\)"):
        recipe.load("quikstart")
    (tmp_path / "quickstart").write_text("- a file of that name comes first")
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        recipe.load("quickstart")


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
