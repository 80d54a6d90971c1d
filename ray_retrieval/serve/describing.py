"""What clients are told of an index and of the model that made it."""

import itertools
from typing import Any

import pyarrow as pa

from ray_retrieval.errors import RetrievalError
from ray_retrieval.model_folder import read_model_description
from ray_retrieval.search import Index
from ray_retrieval.search.manifest import backwards
from ray_retrieval.serve.answers import METRICS, IndexAnswer, Version
from ray_retrieval.serve.config import ServeConfig
from ray_retrieval.serve.rerankings import Rerankings
from ray_retrieval.serve.versions import share
from ray_retrieval.storage import Folder, is_uri

_VERSIONS = 10
_MEASURED = "metrics.json"


def describe(
    name: str, index: Index, rerankings: Rerankings, config: ServeConfig, model: Folder
) -> IndexAnswer:
    """What is known of a version, but for the memory that is measured while it is served."""
    manifest = index.manifest
    groups = max(1, config.shard_groups)
    of_shard = {
        number: group for group in range(groups) for number in share(len(manifest.shards), group, groups)
    }
    shards = [
        {"rows": entry.rows, "bytes": entry.bytes, "group": of_shard[number]}
        for number, entry in enumerate(manifest.shards)
    ]
    return IndexAnswer(
        name=name,
        rows=index.rows,
        deleted=index.deleted,
        kind=index.form.kind.value,
        bits=manifest.bits,
        dimension=manifest.dimension,
        metric=METRICS[index.form.kind],
        search=_search(index),
        version=manifest.number,
        versions=_versions(index),
        model=index.model,
        shards=shards,
        shard_groups=groups,
        memory={
            "mapped": float(manifest.bytes),
            "private": 0.0,
            "per_row": manifest.bytes / max(1, manifest.next_row),
        },
        class_names=index.class_names,
        columns={
            field.name: _type(field.type) for field in index.schema if field.name not in ("row", "path")
        },
        rerankings=rerankings.described(),
        writable=config.writable,
        card=card(model),
    )


def card(model: Folder) -> dict[str, Any]:
    """What a model is and how good, as its folder and the run that it lies in say.

    `method`, `training` and `validation` are of the model; `measured` are the metrics of the run, each with
    its policy, where the run was evaluated.
    """
    description, fingerprint = read_model_description(model)
    method = dict(description.get("method") or {})
    found: dict[str, Any] = {
        "fingerprint": fingerprint,
        "method": method.pop("name", None),
        "settings": method,
        "precision": description.get("precision"),
        "classes": description.get("classes"),
        "training": description.get("training") or {},
        "validation": (description.get("metrics") or {}).get("validation") or {},
        "measured": _measured(model),
    }
    plain: dict[str, Any] = _without_places(found)
    return plain


def _measured(model: Folder) -> list[dict[str, Any]]:
    """Name, value and policy of each metric of the run's evaluation of this model."""
    try:
        if not model.parent.exists(_MEASURED):
            return []
        said = model.parent.read_json(_MEASURED)
        test = said["models"][said["selected"]]["test"]
        return [{key: one[key] for key in ("name", "value", "policy")} for one in test]
    except (RetrievalError, KeyError, TypeError):
        return []  # of another release, or half-written: the card does without


def _without_places(value: Any) -> Any:
    """Plain values in which paths of this machine are the names of their files."""
    if isinstance(value, dict):
        return {key: _without_places(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_places(one) for one in value]
    if isinstance(value, str) and (value.startswith(("/", "~", ".", "$")) or is_uri(value)):
        return value.rstrip("/").rpartition("/")[2]
    return value


def _search(index: Index) -> str:
    """How it is searched, in words."""
    manifest = index.manifest
    said = manifest.approximate or manifest.local
    if said is None:
        return "exact"
    about = said.info()
    kind = about.get("factory") or about.get("shortlist")
    recall = "".join(f", {key} {value:.3f}" for key, value in about.items() if key.startswith("recall@"))
    return f"{'shortlist ' if manifest.local else 'approximate '}{kind}{recall}"


def _versions(index: Index) -> list[Version]:
    try:
        last = list(itertools.islice(backwards(index.folder, index.manifest), _VERSIONS))
    except RetrievalError:
        last = [index.manifest]
    return [Version(number=one.number, operation=one.operation, rows=one.rows) for one in last]


def _type(kind: pa.DataType) -> str:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return str(kind).replace("large_string", "string")
