"""What a recipe may say.

A recipe is one YAML file that states a whole experiment. Any field can be set from the command line
(`train.optimizer.lr=0.01`), one field can refer to another (`runs/${method.bits}bits`), and paths may use
`~` and environment variables (`$HOME`). An unknown key is an error that names the nearest known one; so is
a key that stands twice.

`method.bits`, `method.dimension` and `seed` may be lists: then the file states a study, one recipe for every
combination.
"""

import copy
import difflib
import itertools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, model_validator

from ray_retrieval.config import Config, ConfigType, validate
from ray_retrieval.data.datasets import DataConfig
from ray_retrieval.data.location import name_of
from ray_retrieval.data.transforms import Augmentation
from ray_retrieval.descriptors import DescriptorKind
from ray_retrieval.encode import EncodeConfig
from ray_retrieval.errors import RecipeError
from ray_retrieval.evaluate import EvaluateConfig
from ray_retrieval.loop import TrainConfig
from ray_retrieval.loop.checks import misfits
from ray_retrieval.methods import METHODS, AnyMethodConfig
from ray_retrieval.search.approximate import ApproximateConfig
from ray_retrieval.search.cells import cells_in
from ray_retrieval.search.faiss_index import check_sample, untrained
from ray_retrieval.search.rerank import AnyRerankConfig, GeometricVerificationConfig
from ray_retrieval.search.votes import LocalSearchConfig
from ray_retrieval.storage import Folder, is_uri, split_query
from ray_retrieval.tuning.config import SHARED, TuneConfig
from ray_retrieval.words import several
from ray_retrieval.yaml_text import read_yaml

# What may differ between two runs that give the same model: how fast it is made, and what comes after.
_NOT_OF_THE_MODEL: dict[str, Any] = {
    "name": True,
    "output": True,
    "train": set(SHARED) - {"start", "validation"},
    "encode": True,
    "index": True,
    "evaluate": True,
    "report": True,
    "published": True,
    "tune": True,
}

_NOT_OF_A_STAGE = {"stages", "encode", "index", "evaluate", "report", "published", "tune"}

_READY_MADE = Path(__file__).parent / "jobs"
"""The recipes of `jobs/`, which the package brings along."""

_LENGTHS = {"train.epochs": "train.steps", "train.steps": "train.epochs"}
"""Either says how long to train: a setting of one takes the place of the other."""

_STUDIED = {"method.bits": "{}bits", "method.dimension": "{}d", "seed": "seed{}"}
"""What may be a list in a study, and what a member's folder is called after its value."""


class IndexConfig(ApproximateConfig):
    """How the database's descriptors are laid out for search, and how vectors are searched."""

    shards: int = Field(default=2, ge=1)
    """Parts that can be searched by different processes."""
    workers: int = Field(default=1, ge=1)
    """Ray tasks that write the parts, one each, and what an approximate search needs beside them; 1: threads
    of this process. The index is the same."""
    keep_images: bool = True
    """Keep the bytes of images that came as bytes (from Parquet), so that hits can be shown. Images that are
    files are referred to by their paths."""
    local: LocalSearchConfig = LocalSearchConfig()
    """How local features are searched."""

    @model_validator(mode="after")
    def _of_use(self) -> "IndexConfig":
        try:
            self.check_of_use()
        except RecipeError as error:
            raise ValueError(f"{error.where}: {error.problem}") from None
        return self


class ReportConfig(Config):
    """What the report shows."""

    examples: int = Field(default=12, ge=0)
    """Example queries, evenly spread over all."""
    hits: int = Field(default=10, ge=1)
    """Hits shown for each."""


class PublishedConfig(Config):
    """Results that a paper or a repository reports, which a run is held against."""

    source: str = Field(min_length=1)
    """Where they stand, with what a reader has to know of them."""
    benchmark: str | None = None
    """What they were measured on, as our results name it (`COCO 2014 (hashnet)`): with another benchmark they
    are not shown. Unset: with any."""
    metric: str = Field(min_length=1)
    """The metric of ours that they are compared with, e.g. `map@5000`."""
    values: dict[Annotated[int, Field(ge=1)], Annotated[float, Field(ge=0, le=1)]] = Field(min_length=1)
    """Number of bits, or dimension: the value, between 0 and 1."""
    tolerance: float = Field(default=0.01, ge=0, le=1)
    """A result that is lower by no more than this has reached it."""


class StageConfig(Config):
    """A training that comes before the recipe's own, which starts from the model it leaves."""

    name: str = Field(pattern="^[a-z0-9_-]+$")
    """Of its folder, in `stages/`."""
    settings: dict[str, Any] = Field(min_length=1)
    """What differs from the recipe, by dotted keys of `method` and `train`: `{method.stage: tuning}`. One of
    `train.epochs` and `train.steps` takes the place of the other."""

    @model_validator(mode="after")
    def _check(self) -> "StageConfig":
        for key in self.settings:
            section, _, field = key.partition(".")
            if section not in ("method", "train"):
                raise ValueError(f"a stage has settings of 'method' and 'train', got '{key}'")
            if not field:  # a whole section would take the recipe's own settings away
                raise ValueError(f"a stage has single settings such as '{section}.…', got all of '{key}'")
            if key == "train.start":
                raise ValueError("a stage starts from the one before it, got 'train.start'")
        return self


class Recipe(Config):
    """A whole experiment."""

    name: str = Field(min_length=1)
    """What it is called in reports."""
    output: str = Field(min_length=1)
    """The folder that everything is written to: a local path or a URI."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Determines the splits, the starting weights, and every random draw."""
    data: DataConfig
    """Images and the protocol they are split by."""
    method: AnyMethodConfig
    """The method and its hyperparameters."""
    train: TrainConfig = TrainConfig()
    stages: tuple[StageConfig, ...] = ()
    """Trainings before, one after another; the first starts where `train.start` says. None where
    `train.epochs` is 0, so that nothing is trained."""
    encode: EncodeConfig = EncodeConfig()
    index: IndexConfig = IndexConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()
    published: tuple[PublishedConfig, ...] = ()
    """What the results are compared with."""
    tune: TuneConfig | None = None
    """The search for hyperparameters that `ray-retrieval tune` makes; the other verbs leave it out."""

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        image = self.method.training_image
        size = image.size
        if self.train.augmentation.pad > size:
            raise ValueError(f"'train.augmentation.pad' is at most 'method.image.size' ({size})")
        if self.train.augmentation.random_crop and (image.resize_to or size) == size:
            raise ValueError(
                f"'train.augmentation.random_crop' needs a 'method.image.resize_to' above {size}, the size"
            )
        for misfit in misfits(self.method, METHODS[self.method.name][1], self.train):
            raise ValueError(f"'{misfit.where}': {misfit.problem}: {misfit.mend}")
        kind = self.method.form.kind
        if self.tune is not None:
            self.tune.check_metrics(kind, self.train.validation.metric)
        self._check_reranking(kind)
        self._check_local_features()
        self._check_stages()
        if self.method.needs_start and self.train.start is None and not self.stages:
            raise ValueError(
                f"{self.method.name} leaves untrained what it describes with: state 'train.start' or 'stages'"
            )
        self._check_search(kind)
        if not image.square and self.train.augmentation != Augmentation():
            raise ValueError("'train.augmentation' is for squares, not for images of several sizes")
        return self

    def _check_search(self, kind: DescriptorKind) -> None:
        """What building the index would refuse after models were trained, as far as it is known before."""
        search = self.index.search
        if search != "exact" and kind is DescriptorKind.LOCAL:
            raise ValueError(f"'index.search' is exact for {self.method.name}, which makes {kind.value}")
        if search in ("exact", "auto"):
            return
        try:
            if kind is DescriptorKind.CODES:
                check_sample(search, cells_in(search), self.index.train_rows)
            else:
                untrained(search, self.method.form.size, self.index.train_rows)
        except RecipeError as error:
            raise ValueError(f"'index.search': {error.problem}; {error.mend}") from None

    def _check_reranking(self, kind: DescriptorKind) -> None:
        for step in self.evaluate.rerank:
            fits = kind is DescriptorKind.VECTORS or (
                kind is DescriptorKind.LOCAL and isinstance(step, GeometricVerificationConfig)
            )
            if not fits:
                raise ValueError(
                    f"'evaluate.rerank' has {step.name}, which is not for the {kind.value} of "
                    f"{self.method.name}"
                )

    def _check_local_features(self) -> None:
        """What building the index would refuse after models were trained."""
        form, config = self.method.form, self.index.local
        if form.kind is not DescriptorKind.LOCAL:
            return
        if config.shortlist == "global" and not form.vectors:
            raise ValueError(
                "'index.local.shortlist' is global, and the model has no global vectors: set it to votes, or "
                "give the method a 'method.global_head'"
            )
        if config.factory is not None and config.shortlist not in ("auto", "votes"):
            raise ValueError(
                f"'index.local.factory' is for the shortlist votes, not for {config.shortlist}: leave it out"
            )

    def _check_stages(self) -> None:
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two of the 'stages' are called '{name}', and each has a folder of its own")

    def stage_recipes(self) -> "list[Recipe]":
        """The trainings before, each a recipe of its own whose output lies in `stages/`.

        They only train: what is said of embeddings, index and measurement is not theirs.

        Raises:
            RecipeError: if a stage has an unknown key or a wrong value.
        """
        found: list[Recipe] = []
        for number, stage in enumerate(self.stages if self.train.epochs != 0 else ()):
            values = self.model_dump(mode="json", exclude=_NOT_OF_A_STAGE)
            values["name"] = f"{self.name}-{stage.name}"
            values["output"] = _below(self.output, f"stages/{stage.name}")
            if number:
                values["train"]["start"] = _below(found[-1].output, "model")
            settings = [f"{key}={yaml.safe_dump(value)}" for key, value in stage.settings.items()]
            where = f"stages.{stage.name}"
            resolved = _resolved(_with_settings(values, settings, where=where), where=where)
            found.append(validate(Recipe, resolved, where=where))
        return found

    def of_the_model(self) -> dict[str, Any]:
        """The part that determines the trained model, as plain values."""
        return self.model_dump(mode="json", exclude=_NOT_OF_THE_MODEL)


def load(path: str | Path, overrides: str | list[str] | None = None) -> Recipe:
    """Read a recipe file.

    Args:
        path: a YAML file, by its path or URI, or the name of a ready-made recipe, such as `quickstart`.
        overrides: `dotted.key=value` settings, one or several, values in YAML; they come after the file.

    Raises:
        ArtefactError: if a store does not answer.
        RecipeError: if the file is missing or no YAML, if a key is unknown or has a wrong value, or if the
            file states a study of several runs.
    """
    return template(path, overrides)({})


def template(
    path: str | Path, overrides: str | list[str] | None = None
) -> Callable[[Mapping[str, Any]], Recipe]:
    """A recipe file, read once, of which recipes are made that differ in some values.

    Args:
        path: as for `load`.
        overrides: as for `load`.

    Returns:
        Gives the recipe with values for dotted keys in place of the file's; raises as `load`.

    Raises:
        RecipeError: if the file is missing or no YAML.
    """
    read = read_values(path)

    def made(values: Mapping[str, Any]) -> Recipe:
        settings = [
            *several(overrides),
            *(f"{key}={yaml.safe_dump(value)}" for key, value in values.items()),
        ]
        merged = _with_settings(read, settings, where=path)
        for key, listed in _studied(merged, where=path).items():
            raise RecipeError(
                f"'{key}' is a list: this is a study of several runs",
                where=path,
                mend=f"read it with ray_retrieval.recipe.load_study, or choose one, e.g. {key}={listed[0]}",
            )
        return validate(Recipe, _resolved(merged, where=path), where=path)

    return made


def load_study(path: str | Path, overrides: str | list[str] | None = None) -> list[Recipe]:
    """Read a recipe file in which `method.bits`, `method.dimension` and `seed` may be lists.

    Every member is a recipe of its own, its references resolved with its own values. Where `output` does not
    refer to a listed key, its members lie below it, in `16bits/`, `seed0/` or `16bits/seed0/`.

    Args:
        path: as for `load`.
        overrides: as for `load`; lists may be given here too, e.g. `method.bits=[16,32]`.

    Returns:
        One recipe for every combination, in the order of the lists, bits first; a plain recipe gives one.

    Raises:
        RecipeError: as for `load`, and if a list is empty or has anything but different whole numbers.
    """
    merged = _with_settings(read_values(path), several(overrides), where=path)
    lists = _studied(merged, where=path)
    members: dict[str, Recipe] = {}
    for values in itertools.product(*lists.values()):
        chosen = dict(zip(lists, values, strict=True))
        recipe = validate(Recipe, _resolved(_with_values(merged, chosen), where=path), where=path)
        output = recipe.output
        for key, value in chosen.items():
            other = _resolved(_with_values(merged, {**chosen, key: value + 1}), where=path)
            if other["output"] == recipe.output:
                output = _below(output, _STUDIED[key].format(value))
        if output in members:
            raise RecipeError("two runs of the study would write there", where=output, mend="set output=…")
        members[output] = recipe.model_copy(update={"output": output})
    return list(members.values())


def from_settings(kind: type[ConfigType], settings: list[str]) -> ConfigType:
    """A configuration of defaults and `dotted.key=value` settings.

    Raises:
        RecipeError: if a setting has another form, an unknown key or a wrong value.
    """
    where = "command line"
    return validate(kind, _resolved(_with_settings({}, settings, where=where), where=where), where=where)


def rerank_steps(texts: str | list[str]) -> tuple[AnyRerankConfig, ...] | None:
    """Steps of re-ranking, each a name or a YAML mapping with a `name`; `none` alone for no step.

    Without texts None: what the index has by default.

    Raises:
        RecipeError: if one is unknown or has a wrong setting.
    """
    where = "`rerank`"
    if not texts:
        return None
    if several(texts) == ["none"]:
        return ()
    given = [read_yaml(text, where=where) for text in several(texts)]
    steps = [{"name": step} if isinstance(step, str) else step for step in given]
    return validate(EvaluateConfig, {"rerank": steps}, where=where).rerank


def ready_made() -> list[str]:
    """The names of the recipes that the package brings along; `serve.yaml` beside them is a server's file."""
    return sorted(file.stem for file in _READY_MADE.glob("*.yaml") if file.stem != "serve")


def _file_of(path: str | Path) -> Path:
    """The file of a recipe that is named by its path, or by the name of a ready-made one."""
    file = Path(os.path.expanduser(os.path.expandvars(path)))
    if os.path.isfile(file):  # unlike Path's, it takes a name that is too long for one of no file
        return file
    if str(path) in ready_made():
        return _READY_MADE / f"{path}.yaml"
    if os.path.isdir(file):
        inside = file / "recipe.yaml"
        mend = f"give {inside}" if inside.is_file() else "give a file of YAML in it"
        raise RecipeError("a folder, no recipe", where=path, mend=mend)
    near = difflib.get_close_matches(file.stem, ready_made(), n=1, cutoff=0.7)
    known = f"did you mean '{near[0]}'?" if near else "ready-made ones are in jobs/"
    raise RecipeError("no such recipe", where=path, mend=known)


def _stored(uri: str) -> str:
    """The text of a recipe in a store, such as the one that a run has written there."""
    place = Folder(uri)
    if not place.is_file():
        mend = f"give {place.uri_of('recipe.yaml')}" if place.exists("recipe.yaml") else "check the URI"
        raise RecipeError("no such recipe", where=uri, mend=mend)
    return place.parent.read_bytes(name_of(place.uri)).decode()


def read_values(path: str | Path) -> dict[str, Any]:
    """The values of a recipe's file, before settings and references.

    Args:
        path: of the file, its URI, or the name of a ready-made recipe.

    Raises:
        RecipeError: if it cannot be read, or is no mapping.
    """
    try:
        text = _stored(str(path)) if is_uri(str(path)) else _file_of(path).read_text()
    except UnicodeDecodeError as error:
        raise RecipeError(f"not valid YAML: {error}", where=path) from None
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=path) from None
    values = read_yaml(text, where=path)
    if not isinstance(values, dict):
        raise RecipeError("a recipe is a mapping of keys to values", where=path)
    return {"seed": 0, **values}  # the default, for others to refer to


def _with_settings(values: dict[str, Any], settings: list[str], *, where: object) -> DictConfig:
    """The values and the settings after them, references still in place."""
    given: list[tuple[str, Any]] = []
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise RecipeError("not of the form key=value", where=setting, mend="e.g. train.epochs=10")
        given.append((key, read_yaml(text, where=key)))
    try:
        merged = OmegaConf.create(values)
        for key, value in given:
            _update(merged, key, value, where=where)
        return _with_one_length(merged, {key for key, value in given if value is not None})
    except OmegaConfBaseException as error:
        raise RecipeError(" ".join(str(error).split()), where=where) from None
    except RecursionError:
        raise RecipeError("a value is nested too deeply, or in itself", where=where) from None


def _update(merged: DictConfig, key: str, value: Any, *, where: object) -> None:
    """Put a value in its place. A whole section replaces the old one: its keys may be of another kind."""
    try:
        OmegaConf.update(merged, key, value, merge=False, force_add=True)
    except OmegaConfBaseException:
        raise
    except (TypeError, ValueError):
        raise RecipeError(
            f"'{key}' has a word where a list has numbers", where=where, mend="count its entries from 0"
        ) from None


def _with_one_length(merged: DictConfig, given: set[str]) -> DictConfig:
    """Without the length of training in epochs where the settings give it in steps, and the other way."""
    for key, other in _LENGTHS.items():
        if key in given and other not in given:
            OmegaConf.update(merged, other, None, merge=False, force_add=True)
    return merged


def _resolved(merged: DictConfig, *, where: object) -> Any:
    try:
        return OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise RecipeError(" ".join(str(error).split()), where=where) from None


def _with_values(merged: DictConfig, chosen: dict[str, int]) -> DictConfig:
    member = copy.deepcopy(merged)
    for key, value in chosen.items():
        OmegaConf.update(member, key, value, merge=False)
    return member


def _studied(merged: DictConfig, *, where: object) -> dict[str, list[int]]:
    """The keys that are lists, with their values."""
    found: dict[str, list[int]] = {}
    for key in _STUDIED:
        try:
            node = OmegaConf.select(merged, key)
        except OmegaConfBaseException:
            continue  # `method` is no mapping: validation says so
        if not OmegaConf.is_list(node):
            continue
        values = _resolved(node, where=where)
        if not values:
            raise RecipeError(f"'{key}' is an empty list", where=where, mend="give one number or several")
        for value in values:
            if type(value) is not int:
                raise RecipeError(f"'{key}' takes a list of whole numbers, got {value!r}", where=where)
            if values.count(value) > 1:
                raise RecipeError(f"'{key}' has {value} more than once", where=where)
        found[key] = values
    return found


def _below(output: str, name: str) -> str:
    """A folder inside an output folder; a URI's `?options` stay at its end."""
    base, options = split_query(output)
    return f"{base.rstrip('/')}/{name}{options}"


def dump(recipe: Recipe) -> str:
    """The resolved recipe, every default included, as YAML that `load` reads back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, each as `key: old → new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{prefix}.{key}")]
    return [] if old == new else [f"{prefix.lstrip('.')}: {old} → {new}"]


def in_few_words(changed: list[str]) -> str:
    """The first three of what `differences` found, and how many more there are."""
    more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f"{'; '.join(changed[:3])}{more}"
