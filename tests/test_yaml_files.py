"""YAML: one reader, whose errors name the file and the reason."""

from dataclasses import dataclass

import pytest

from vispress.errors import ConfigError
from vispress.yaml_files import check_keys, parse_yaml, read_yaml, shipped_files


@dataclass
class Settings:
    layer: int = 1
    keep_ratio: float = 0.5


def test_a_file_is_read(tmp_path):
    (tmp_path / "a.yaml").write_text("layer: 3\nlist: [1, two]\n", encoding="utf-8")
    assert read_yaml(tmp_path / "a.yaml") == {"layer": 3, "list": [1, "two"]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"a: [", "the plan .*bad.yaml is not valid YAML: while parsing"),
        (b"\xff\xfe\xff", "bad.yaml is not valid YAML: 'utf-8' codec"),
        (b"[" * 5000, "bad.yaml is not valid YAML: nested too deep"),
        (b"day: 2020-13-45", "bad.yaml is not valid YAML: month must be in"),
    ],
)
def test_a_bad_file_is_named_with_the_reason(tmp_path, data, reason):
    (tmp_path / "bad.yaml").write_bytes(data)
    with pytest.raises(ConfigError, match=reason):
        read_yaml(tmp_path / "bad.yaml", "the plan")


def test_a_missing_file_and_a_folder_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere.yaml: No such file"):
        read_yaml(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match=r"cannot read the task .*: Is a directory"):
        read_yaml(tmp_path, "the task")


def test_a_value_is_parsed():
    assert parse_yaml("[3, 7]", "--set layers") == [3, 7]
    with pytest.raises(ConfigError, match="--set layers is not valid YAML"):
        parse_yaml("{", "--set layers")


def test_keys_are_those_of_the_dataclass():
    assert check_keys(data := {"layer": 2}, Settings, "here") == data
    with pytest.raises(ConfigError, match="here: unknown key 'layr'; did you mean 'layer'"):
        check_keys({"layr": 2}, Settings, "here")
    with pytest.raises(ConfigError, match="here must be a mapping with the keys layer, keep_ratio"):
        check_keys([1], Settings, "here")


def test_shipped_files_are_found_by_name():
    assert {"demo", "offline"} <= set(shipped_files("bench"))
    assert shipped_files("methods")["fastv"].is_file()
    assert shipped_files("nothing") == {}
