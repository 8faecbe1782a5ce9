"""Errors: one family, each also a fitting builtin; and configurations that must not raise any."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from vispress import errors, list_methods
from vispress.config import from_mapping, load_config, make_compressor, save_config, to_mapping
from vispress.errors import ConfigError, UnsupportedMethodError, VispressError
from vispress.methods import FastV, PyramidDrop, Random
from vispress.registry import register_method

BUILTIN = {
    "UnsupportedModelError": TypeError,
    "UnsupportedMethodError": ValueError,
    "BudgetError": ValueError,
    "ConfigError": ValueError,
    "CompressionStateError": RuntimeError,
    "UnsupportedVersionError": RuntimeError,
    "CheckpointError": RuntimeError,
}
CONFIGS = Path(__file__).parents[1] / "configs" / "methods"


@pytest.mark.parametrize("name", BUILTIN)
def test_each_error_is_ours_and_a_fitting_builtin(name: str) -> None:
    error = getattr(errors, name)
    assert issubclass(error, VispressError)
    assert issubclass(error, BUILTIN[name])


def test_no_error_is_missing_here() -> None:
    classes = {n for n, c in vars(errors).items() if inspect.isclass(c) and c is not VispressError}
    assert classes == set(BUILTIN)


@pytest.mark.parametrize("name", ["Fast-V", "fast v", "FASTV", "", "1st"])
def test_a_malformed_method_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="lower-case identifier"):
        register_method(name)


def test_a_name_that_is_taken_is_refused_and_the_same_class_again_is_not() -> None:
    class Other(FastV):  # type: ignore[misc]
        pass

    with pytest.raises(ConfigError, match="already registered"):
        register_method("fastv")(Other)
    assert register_method("fastv")(FastV) is FastV


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_packaged_configurations_load_and_come_back_the_same(path: Path, tmp_path: Path) -> None:
    method = load_config(path)
    assert not isinstance(method, list)
    assert method.name == path.stem
    save_config(method, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == method


def test_a_configuration_is_a_name_a_file_or_a_mapping() -> None:
    by_file = load_config(CONFIGS / "fastervlm.yaml")
    assert load_config("fastervlm") == by_file
    assert load_config({"method": "fastv", "keep_ratio": 0.5}) == FastV(keep_ratio=0.5)
    assert isinstance(load_config("vmtc_cmai"), list)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("configs/no/fastervlm.yaml", "config='fastervlm'"),
        ("fastervml", "did you mean 'fastervlm'"),
        ("mine.yaml", "cannot read mine.yaml: no such file"),
        ({"keep_ratio": 0.5}, "config needs a key 'method'"),
    ],
)
def test_what_names_no_configuration_is_refused_with_what_would(source: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(source)


def test_every_method_has_a_packaged_configuration() -> None:
    assert [path.stem for path in sorted(CONFIGS.glob("*.yaml"))] == list_methods()


def test_a_chain_in_yaml_is_a_list_of_compressors(tmp_path: Path) -> None:
    path = tmp_path / "chain.yaml"
    parts = [Random(keep_ratio=0.5, seed=3), PyramidDrop(layers=(2, 3), ratios=(0.5, 0.2))]
    path.write_text(yaml.safe_dump({"chain": [to_mapping(part) for part in parts]}))
    assert load_config(path) == parts


def test_an_error_in_a_chain_names_the_member() -> None:
    with pytest.raises(ConfigError, match=r"chain\[1\]"):
        from_mapping({"chain": [{"method": "random", "keep_ratio": 0.5}, {"keep_ratio": 0.5}]})
    with pytest.raises(UnsupportedMethodError, match="fastv"):
        from_mapping({"chain": [{"method": "fastvv", "keep_ratio": 0.5}]})


def test_lists_of_yaml_become_tuples() -> None:
    assert make_compressor("pyramiddrop", layers=[2, 3], ratios=[0.5, 0.2]) == PyramidDrop(
        layers=(2, 3), ratios=(0.5, 0.2)
    )
