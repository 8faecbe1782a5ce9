"""The package `datasets`: files, folders, a join of subsets; a run on a Qwen2.5-VL folder."""

import io
import json
import struct
import zlib

import PIL.Image
import pytest
import yaml
from datasets import Dataset, DatasetDict, Features, Image, Sequence, Value
from tests.tiny_checkpoints import picture

from vispress.bench.tasks.task import get_task
from vispress.bench.tasks.yaml_task import parse_yaml_task, task_from_yaml
from vispress.errors import ConfigError

FEATURES = Features({"question": Value("string"), "answer": Value("string"), "image": Image()})


def table(count=3):
    rows = {
        "question": [f"What is {n}?" for n in range(count)],
        "answer": ["red", "green", "blue"][:count],
        "image": [picture(20 + 4 * n, 24, n) for n in range(count)],
    }
    return Dataset.from_dict(rows, features=FEATURES)


def draw(folder, dataset, **keys):
    data = {"name": "mine", "dataset": dataset, "shuffle": False} | keys
    return task_from_yaml(parse_yaml_task(data, "test"), folder).draw(9, 0)


def check(prompts):
    assert [prompt.answer for prompt in prompts] == ["red", "green", "blue"]
    assert [prompt.images[0].size for prompt in prompts] == [(24, 20), (24, 24), (24, 28)]


def test_a_parquet_file(tmp_path):
    table().to_parquet(tmp_path / "rows.parquet")
    check(draw(tmp_path, "rows.parquet"))


def test_pictures_are_read_by_our_own_loader(tmp_path):
    """Bytes reach it as they are: turned once, and a bomb is a named error before it is decoded."""
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    file = io.BytesIO()
    picture(20, 24, 0).save(file, "PNG", exif=turned)
    bomb = bytearray(file.getvalue())
    bomb[16:24] = struct.pack(">II", 2**14, 2**14)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    images = [[{"bytes": data, "path": "n.png"}] for data in (file.getvalue(), bytes(bomb))]
    rows = {"question": ["What?"] * 2, "answer": ["red"] * 2, "image": images}
    features = FEATURES | {"image": Sequence(Image())}
    table = Dataset.from_dict(rows, features=Features(features))
    table.to_parquet(tmp_path / "rows.parquet")
    task = parse_yaml_task({"name": "mine", "dataset": "rows.parquet", "shuffle": False}, "test")
    (prompt,) = task_from_yaml(task, tmp_path).draw(1, 0)
    assert prompt.images[0].size == (20, 24)
    with pytest.raises(ConfigError, match=r"cannot open the picture n\.png: "):
        draw(tmp_path, "rows.parquet")


def test_a_csv_file_with_paths_of_pictures(tmp_path):
    for n in range(3):
        picture(20 + 4 * n, 24, n).save(tmp_path / f"{n}.png")
    lines = [f"What?,{colour},{n}.png" for n, colour in enumerate(["red", "green", "blue"])]
    (tmp_path / "rows.csv").write_text("\n".join(["question,answer,image", *lines]))
    check(draw(tmp_path, "rows.csv"))


def test_folders_as_save_to_disk_leaves_them(tmp_path):
    table().save_to_disk(tmp_path / "one")
    DatasetDict({"test": table(), "train": table(1)}).save_to_disk(tmp_path / "two")
    check(draw(tmp_path, "one"))
    check(draw(tmp_path, "two", split="test"))
    assert len(draw(tmp_path, "two", split="train")) == 1
    with pytest.raises(ConfigError, match="split dev"):
        draw(tmp_path, "two", split="dev")


def test_a_folder_of_files(tmp_path):
    (tmp_path / "set").mkdir()
    table().to_parquet(tmp_path / "set" / "test-00000-of-00001.parquet")
    check(draw(tmp_path, "set"))


def test_pictures_of_another_subset_as_gqa_has_them(tmp_path):
    root = tmp_path / "gqa"
    for name in ("testdev_balanced_instructions", "testdev_balanced_images"):
        (root / name).mkdir(parents=True)
    questions = {"question": ["Q0", "Q1"], "answer": ["a", "b"], "imageId": ["n7", "n5"]}
    file = "testdev-00000-of-00001.parquet"
    Dataset.from_dict(questions).to_parquet(root / "testdev_balanced_instructions" / file)
    pictures = {"id": ["n5", "n7"], "image": [picture(8, 12, 0), picture(16, 20, 0)]}
    features = Features({"id": Value("string"), "image": Image()})
    images = Dataset.from_dict(pictures, features=features)
    images.to_parquet(root / "testdev_balanced_images" / file)
    (root / "README.md").write_text(
        "---\n"
        + yaml.safe_dump(
            {
                "configs": [
                    {
                        "config_name": name,
                        "data_files": [{"split": "testdev", "path": f"{name}/*.parquet"}],
                    }
                    for name in ("testdev_balanced_instructions", "testdev_balanced_images")
                ]
            }
        )
        + "---\n"
    )
    keys = {key: value for key, value in get_task("gqa").source.items() if value is not None}
    keys |= {"dataset": "gqa", "shuffle": False}
    prompts = task_from_yaml(parse_yaml_task(keys, "test"), tmp_path).draw(5, 0)
    assert [prompt.images[0].size for prompt in prompts] == [(20, 16), (12, 8)]
    join = {"images_from": keys["images_from"] | {"key": "number"}}
    with pytest.raises(ConfigError, match="has no column 'number'"):
        task_from_yaml(parse_yaml_task(keys | join, "test"), tmp_path).draw(5, 0)


def test_a_dataset_of_the_hub_that_is_not_cached(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot load the dataset org/name.*HF_HUB_OFFLINE"):
        draw(tmp_path, "org/name")


def test_bench_of_a_qwen_folder(folders, rows, tmp_path, monkeypatch):
    from vispress.cli import app

    task = {"name": "mine", "dataset": str(rows / "rows.jsonl"), "metric": "anls"}
    plan = {
        "tasks": [task],
        "methods": ["divprune"],
        "keep_ratios": [0.25],
        "controls": "none",
        "questions": 2,
        "timing": {"batch": 0},
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    out = tmp_path / "results"
    model = str(folders["qwen2_5_vl"])
    line = ["bench", str(tmp_path / "plan.yaml"), "--model", model, "--out", str(out)]
    app(line, standalone_mode=False)
    none, kept = json.loads((out / "summary.json").read_text())["rows"]
    assert kept["visual_tokens"] == none["visual_tokens"] > 0
    assert kept["kept_mean"] == pytest.approx(none["visual_tokens"] / 4, abs=1)
