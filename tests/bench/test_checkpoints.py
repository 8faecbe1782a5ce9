"""Real checkpoints: a tiny random one from a folder, its template, its refusals, and a run."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tests.tiny_checkpoints import picture, save_checkpoint

from vispress.bench.model.checkpoints import content_of, load_checkpoint, weights_hash
from vispress.bench.model.loaded_model import load_named_model
from vispress.bench.tasks.task import Prompt
from vispress.errors import CheckpointError, ConfigError, UnsupportedModelError

ROWS = [("What is red?", "A", 20, 30), ("What is green?", "B", 24, 24), ("And blue?", "A", 40, 20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint("llava", tmp_path_factory.mktemp("checkpoint") / "llava")


@pytest.fixture(scope="module")
def checkpoint(folder):
    return load_checkpoint(str(folder))


@pytest.fixture
def copy(folder, tmp_path):
    """The folder's files, to be damaged."""
    target = tmp_path / "copy"
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_answers_are_those_of_the_documented_calls(checkpoint):
    image = picture(20, 30, 0)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hello?"}]}
    text = checkpoint.processor.apply_chat_template([message], add_generation_prompt=True)
    assert text == "USER: <image>\nHello? ASSISTANT:"
    inputs = checkpoint.processor(images=image, text=text, return_tensors="pt")
    out = checkpoint.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :]
    words = checkpoint.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    prompts = [Prompt((image,), "<image>\nHello?", ""), Prompt((), "And a longer one, alone?", "")]
    assert checkpoint.answer(prompts[:1], 5) == [words]
    assert checkpoint.answer(prompts, 5)[0] == words


def test_later_turns_get_the_words_between_turns(checkpoint, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "vispress.bench.model.loaded_model.converse",
        lambda *arguments: seen.append(arguments[3]) or [],
    )
    talk = Prompt((), "First?", "", followups=(("Second?", "b"), ("Third?", "c")))
    checkpoint.converse([talk], None, 1)
    assert seen == [[["</s>USER: Second? ASSISTANT:", "</s>USER: Third? ASSISTANT:"]]]


def test_marks_become_pictures_of_a_message():
    picture, words = {"type": "image"}, {"type": "text", "text": "then"}
    assert content_of("<image>\nthen <image>") == [picture, words, picture]
    assert content_of("then") == [words]


def test_without_a_template_the_text_is_given_as_it_is(tmp_path):
    folder = save_checkpoint("llava", tmp_path / "bare", template=False)
    subject = load_checkpoint(str(folder))
    ids = subject.encode([Prompt((picture(9, 9, 0),), "<image> Hi", "")])["input_ids"]
    assert subject.processor.tokenizer.decode(ids[0]) == "<image>" * 36 + " Hi"


def test_load_subject_knows_which_folder_is_which(folder, tmp_path):
    subject = load_named_model(str(folder), dtype="bf16")
    assert type(subject).__name__ == "Checkpoint"
    assert subject.model.dtype == torch.bfloat16
    assert type(load_named_model("reference")).__name__ == "LoadedModel"
    with pytest.raises(ConfigError, match="a folder with a checkpoint, or a hub id"):
        load_named_model("nowhere")


def test_the_hash_follows_weights_and_template(copy):
    first = weights_hash(copy)
    assert first == weights_hash(copy)
    weights = load_file(copy / "model.safetensors")
    weights[min(weights)] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    second = weights_hash(copy)
    (copy / "chat_template.jinja").write_text("other")
    assert len({first, second, weights_hash(copy)}) == 3


def test_the_hash_of_large_files_reads_blocks_of_all_of_it(tmp_path):
    data = bytearray(2**23)
    hashes = {weights_hash(tmp_path)}
    # the last of the 64 blocks ends where the file ends
    for place in (0, 32 * (2**23 - 2**16) // 63, 2**23 - 1):
        data[place] = 1
        (tmp_path / "model.safetensors").write_bytes(data)
        hashes.add(weights_hash(tmp_path))
    assert len(hashes) == 4


def test_a_folder_without_configuration(copy):
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_checkpoint(str(copy))


def test_a_damaged_configuration(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        load_checkpoint(str(copy))


@pytest.mark.parametrize("kind", ["llama", "no_such_type"])
def test_a_model_of_another_kind(copy, kind):
    edit(copy / "config.json", model_type=kind)
    with pytest.raises(UnsupportedModelError, match=rf"(?s)'{kind}'.*families: .*internvl, llava"):
        load_checkpoint(str(copy))


def test_an_architecture_without_adapter_is_refused_before_its_weights_are_read(tmp_path):
    from transformers import PaliGemmaConfig

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    PaliGemmaConfig(
        vision_config=small
        | {"model_type": "siglip_vision_model", "num_attention_heads": 2, "patch_size": 4},
        text_config=small | {"model_type": "gemma", "vocab_size": 32, "num_attention_heads": 2},
    ).save_pretrained(tmp_path)
    with pytest.raises(
        UnsupportedModelError, match=r"no adapter for PaliGemma.*supported families"
    ):
        load_checkpoint(str(tmp_path))


def test_missing_and_misfitting_weights(copy):
    weights = load_file(copy / "model.safetensors")
    del weights[min(weights)]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"do not fit.*missing_keys"):
        load_checkpoint(str(copy))
    (copy / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="cannot load the weights"):
        load_checkpoint(str(copy))
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot load the weights"):
        load_checkpoint(str(copy))


def test_a_missing_processor(copy):
    (copy / "processor_config.json").unlink()
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="processor"):
        load_checkpoint(str(copy))


def test_a_hub_id_that_is_not_cached_is_refused_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"cannot fetch org/name at v1.*HF_HUB_OFFLINE"):
        load_checkpoint("org/name@v1")


def test_a_device_that_is_not_there(folder):
    with pytest.raises(ConfigError, match="cannot use the device 'cuda:99'"):
        load_checkpoint(str(folder), device="cuda:99")


def write_task(folder):
    folder.mkdir()
    rows = []
    for number, (question, answer, height, width) in enumerate(ROWS):
        picture(height, width, number).save(folder / f"{number}.png")
        rows.append({"q": question, "a": answer, "picture": f"{number}.png", "options": ["x", "y"]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "dataset": "rows.jsonl",
        "question": "q",
        "answer": "a",
        "images": "picture",
        "choices": "options",
        "metric": "choice",
        "prompt": "{question}\n{options}",
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(task))


@pytest.mark.slow
def test_bench_runs_a_folder_on_a_local_dataset(folder, tmp_path, monkeypatch, capsys):
    from vispress.cli import app

    write_task(tmp_path / "data")
    plan = {
        "tasks": ["data/mine.yaml"],
        "methods": ["fastv"],
        "keep_ratios": [0.5],
        "controls": "none",
        "questions": 3,
        "timing": {"batch": 0},
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    monkeypatch.chdir(tmp_path)
    arguments = ["bench", "plan.yaml", "--model", str(folder), "--out", "results"]
    app(arguments, standalone_mode=False)
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    assert summary["plan"]["sources"]["mine"]["fingerprint"]
    none, fastv = summary["rows"]
    assert (none["group"], fastv["group"]) == ("none", "fastv")
    assert none["visual_tokens"] == fastv["visual_tokens"] == 36
    assert fastv["kept_mean"] == pytest.approx(18, abs=1)
    assert set(fastv["tasks"]) == {"mine"}
    # another dataset is another plan
    (tmp_path / "data" / "rows.jsonl").write_text(
        (tmp_path / "data" / "rows.jsonl").read_text().replace("red", "grey")
    )
    with pytest.raises(OSError, match="another run: plan"):
        app(arguments, standalone_mode=False)
