import pytest
from pydantic import TypeAdapter, ValidationError

from ray_retrieval.data.datasets import (
    _LOADERS,
    CONFIGS,
    Cifar10Config,
    DataConfig,
    DigitsConfig,
    ImagesConfig,
)
from ray_retrieval.data.transforms import Augmentation, Preprocessing


def test_name_tells_the_benchmark() -> None:
    adapter: TypeAdapter[object] = TypeAdapter(DataConfig)
    assert isinstance(adapter.validate_python({"name": "digits"}), DigitsConfig)
    assert isinstance(adapter.validate_python({"name": "cifar10", "protocol": "II"}), Cifar10Config)
    assert isinstance(adapter.validate_python({"name": "images", "database": "x"}), ImagesConfig)
    with pytest.raises(ValidationError, match="union_tag_invalid"):
        adapter.validate_python({"name": "other"})
    with pytest.raises(ValidationError, match="extra_forbidden"):
        adapter.validate_python({"name": "digits", "colour": 1})


def test_every_configuration_has_a_loader() -> None:
    assert set(_LOADERS) == set(CONFIGS)
    assert len(CONFIGS) == 21


def test_every_field_is_documented() -> None:
    for kind in (*CONFIGS.values(), Preprocessing, Augmentation):
        for name, field in kind.model_fields.items():
            assert field.description, f"{kind.__name__}.{name}"
