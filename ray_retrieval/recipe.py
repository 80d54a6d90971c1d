"""What a recipe may say.

A recipe is one YAML file that states a whole experiment. Any field can be set from the command line
(`train.optimizer.lr=0.01`), one field can refer to another (`runs/${method.bits}bits`), and paths may use
`~` and environment variables (`$HOME`). An unknown key is an error that names the nearest known one.
"""

import os
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, model_validator

from ray_retrieval.config import Config, ConfigType, validate
from ray_retrieval.data.datasets import DataConfig
from ray_retrieval.encode import EncodeConfig
from ray_retrieval.errors import RecipeError
from ray_retrieval.evaluate import EvaluateConfig
from ray_retrieval.loop import TrainConfig
from ray_retrieval.methods import METHODS, AnyMethodConfig

# What may differ between two runs that give the same model: how fast it is made, and what comes after.
_NOT_OF_THE_MODEL: dict[str, Any] = {
    "name": True,
    "output": True,
    "train": {"workers", "cache_memory", "checkpoint", "max_failures"},
    "encode": True,
    "index": True,
    "evaluate": True,
    "report": True,
}


class IndexConfig(Config):
    """How the database's codes are laid out for search."""

    shards: int = Field(default=2, ge=1)
    """Parts that can be searched by different processes."""
    keep_images: bool = True
    """Keep the bytes of images that came as bytes (from Parquet), so that hits can be shown. Images that are
    files are referred to by their paths."""


class ReportConfig(Config):
    """What the report shows."""

    examples: int = Field(default=12, ge=0)
    """Example queries, evenly spread over all."""
    hits: int = Field(default=10, ge=1)
    """Hits shown for each."""


class Recipe(Config):
    """A whole experiment."""

    name: str = Field(min_length=1)
    """What it is called in reports."""
    output: str = Field(min_length=1)
    """The folder that everything is written to: a local path or a URI."""
    seed: int = Field(default=0, ge=0)
    """Determines the splits, the starting weights, and every random draw."""
    data: DataConfig
    """Images and the protocol they are split by."""
    method: AnyMethodConfig
    """The method and its hyperparameters."""
    train: TrainConfig = TrainConfig()
    encode: EncodeConfig = EncodeConfig()
    index: IndexConfig = IndexConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        size = self.method.image.size
        if self.train.augmentation.pad > size:
            raise ValueError(f"'train.augmentation.pad' is at most 'method.image.size' ({size})")
        if self.train.augmentation.random_crop and (self.method.image.resize_to or size) == size:
            raise ValueError(
                f"'train.augmentation.random_crop' needs a 'method.image.resize_to' above {size}, the size"
            )
        if self.train.accumulate > 1 and METHODS[self.method.name][1].whole_batches:
            raise ValueError(
                f"'train.accumulate' is 1 for {self.method.name}, whose loss pairs images across the batch"
            )
        return self

    def of_the_model(self) -> dict[str, Any]:
        """The part that determines the trained model, as plain values."""
        return self.model_dump(mode="json", exclude=_NOT_OF_THE_MODEL)


def load(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file.

    Args:
        path: a YAML file.
        overrides: `dotted.key=value` settings, values in YAML; they come after the file.

    Raises:
        RecipeError: if the file is missing or no YAML, or a key is unknown or has a wrong value.
    """
    file = Path(os.path.expandvars(path)).expanduser()
    if not file.is_file():
        raise RecipeError("no such recipe", where=path, mend="ready-made ones are in jobs/")
    try:
        values = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"not valid YAML: {' '.join(str(error).split())}", where=path) from None
    if not isinstance(values, dict):
        raise RecipeError("a recipe is a mapping of keys to values", where=path)
    return validate(Recipe, _with_settings(values, overrides or [], where=path), where=path)


def from_settings(kind: type[ConfigType], settings: list[str]) -> ConfigType:
    """A configuration of defaults and `dotted.key=value` settings.

    Raises:
        RecipeError: if a setting has another form, an unknown key or a wrong value.
    """
    return validate(kind, _with_settings({}, settings, where="command line"), where="command line")


def _with_settings(values: dict[str, Any], settings: list[str], *, where: object) -> Any:
    for setting in settings:
        if "=" not in setting or setting.startswith("="):
            raise RecipeError("not of the form key=value", where=setting, mend="e.g. train.epochs=10")
    try:
        merged = OmegaConf.create(values)
        for setting in settings:
            key, _, text = setting.partition("=")
            # A whole section replaces the old one: its keys may belong to another kind.
            OmegaConf.update(merged, key, yaml.safe_load(text), merge=False, force_add=True)
        return OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise RecipeError(" ".join(str(error).split()), where=where) from None


def dump(recipe: Recipe) -> str:
    """The resolved recipe, every default included, as YAML that `load` reads back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, each as `key: old → new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{prefix}.{key}")]
    return [] if old == new else [f"{prefix.lstrip('.')}: {old} → {new}"]
