"""Model folders: no code of theirs runs, nothing is asked, nothing is unpickled."""

import ast
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_checkpoints import picture, save_checkpoint
from vispress.bench.model.checkpoints import load_checkpoint
from vispress.bench.model.loaded_model import load_named_model
from vispress.bench.tasks.task import Prompt
from vispress.cli import main
from vispress.errors import CheckpointError, VispressError
from vispress.integrations.options import read_compression
from vispress.reference.folders import SHIPPED
from vispress.reference.model.checkpoint import read

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for place in ("src", "kernels", "examples", "benchmarks")
    for path in (ROOT / place).rglob("*.py")
)
LOADERS = {"from_pretrained", "from_config"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint("llava", tmp_path_factory.mktemp("checkpoint") / "llava")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture(autouse=True)
def no_question(monkeypatch):
    """Who asks is told yes, and fails the test."""

    def answer(*_):
        raise AssertionError("asked on standard input")

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("torch.load was reached"))


def edit(path, change):
    data = json.loads(path.read_text()) if path.exists() else {}
    change(data)
    path.write_text(json.dumps(data))


def add_code(folder):
    """A module that leaves a mark when it is imported."""
    (folder / "theirs.py").write_text(
        f"open({str(folder / 'ran')!r}, 'w').close()\n"
        "class Theirs:\n    @classmethod\n    def from_pretrained(cls, *a, **k): return cls()\n"
    )
    return {
        f"Auto{name}": "theirs.Theirs"
        for name in ("Config", "Model", "ModelForImageTextToText", "Processor", "ImageProcessor")
    } | {"AutoTokenizer": ["theirs.Theirs", None]}


def unknown_type(data, code):
    data.update(model_type="theirs", auto_map=code)


def other_type(data, code):
    data.update(model_type="llama", auto_map=code)


def unknown_decoder(data, code):
    data["text_config"].update(model_type="clip_vision_model", auto_map=code)


def only_code(data, code):
    data.update(auto_map=code)


PLACES = [
    ("config.json", unknown_type),
    ("config.json", other_type),
    ("config.json", unknown_decoder),
    ("processor_config.json", only_code),
    ("preprocessor_config.json", only_code),
    ("video_preprocessor_config.json", only_code),
    ("tokenizer_config.json", only_code),
]


@pytest.mark.parametrize(("file", "change"), PLACES)
def test_code_of_a_folder_is_refused_and_nothing_is_asked(copy, file, change):
    code = add_code(copy)
    edit(copy / file, lambda data: change(data, code))
    with pytest.raises(VispressError, match=r"code|families"):
        load_checkpoint(str(copy))
    with pytest.raises(VispressError):
        read_compression({"method": "fastv", "keep_ratio": 0.5}).check(str(copy))
    assert not (copy / "ran").exists()


def test_a_yes_on_standard_input_runs_nothing(copy, monkeypatch, capsys):
    code = add_code(copy)
    edit(copy / "config.json", lambda data: unknown_type(data, code))
    monkeypatch.undo()  # who asks is answered
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(copy / "modules"))
    command = ["vispress", "bench", "--model", str(copy), "--out", str(copy / "results")]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "no code of a checkpoint is run" in " ".join(capsys.readouterr().err.split())
    assert sys.stdin.read() == "y\n" * 9
    assert not (copy / "ran").exists()


def test_a_known_type_loads_with_transformers_own_code(copy, folder):
    """Checkpoints from before transformers had their type still name their code."""
    code = add_code(copy)
    edit(copy / "config.json", lambda data: only_code(data, code))
    ours, plain = load_checkpoint(str(copy)), load_checkpoint(str(folder))
    prompt = [Prompt((picture(20, 30, 0),), "<image>\nHello?", "")]
    assert ours.answer(prompt, 3) == plain.answer(prompt, 3)
    assert not (copy / "ran").exists()


def test_the_reference_refuses_code_too(tmp_path):
    copy = shutil.copytree(SHIPPED, tmp_path / "copy")
    code = add_code(copy)
    edit(copy / "processor_config.json", lambda data: only_code(data, code))
    with pytest.raises(CheckpointError, match=r"processor_config\.json names code"):
        read(copy)
    assert not (copy / "ran").exists()


def pickle_weights(folder, name):
    torch.save(load_file(folder / "model.safetensors"), folder / name)
    (folder / "model.safetensors").unlink()


def test_weights_in_a_pickle_alone(copy):
    pickle_weights(copy, "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only safetensors are read.*pytorch_model\.bin"):
        load_checkpoint(str(copy))


def write_index(folder, shard):
    names = list(load_file(folder / "model.safetensors"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "shard", ["pytorch_model.bin", "../other/a.safetensors", "/a.safetensors", 7, None]
)
def test_an_index_names_safetensors_in_the_folder_alone(copy, shard):
    write_index(copy, shard)
    pickle_weights(copy, "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"index\.json names .* for weights"):
        load_checkpoint(str(copy))


def test_an_index_of_safetensors_loads(copy, folder):
    write_index(copy, "one.safetensors")
    (copy / "model.safetensors").rename(copy / "one.safetensors")
    ours, plain = load_checkpoint(str(copy)).model, load_checkpoint(str(folder)).model
    theirs = plain.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("index", [[], {}, {"weight_map": ["a.safetensors"]}])
def test_a_damaged_index(copy, index):
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        load_checkpoint(str(copy))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "sub/a.safetensors", "adapter_model.bin"])
def test_a_configuration_names_safetensors_in_the_folder_alone(copy, file):
    edit(copy / "config.json", lambda data: data.update(transformers_weights=file))
    with pytest.raises(CheckpointError, match=r"config\.json names .* for weights"):
        load_checkpoint(str(copy))


@pytest.mark.parametrize("kind", ["save", "pickle"])
def test_an_adapter_is_refused(copy, kind):
    weights = {"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 2)}
    if kind == "save":
        save_file(weights, copy / "adapter_model.safetensors")
    else:
        torch.save(weights, copy / "adapter_model.bin")
    (copy / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": ""}'
    )
    with pytest.raises(CheckpointError, match=r"adapter_config\.json names a model.*merge"):
        load_checkpoint(str(copy))


@pytest.mark.parametrize("where", ["config.json", "text_config"])
def test_attention_code_from_the_hub_is_refused(copy, where):
    def change(data):
        (data if where == "config.json" else data[where])["attn_implementation"] = "some/kernel"

    edit(copy / "config.json", change)
    with pytest.raises(CheckpointError, match="attention code from the hub"):
        load_checkpoint(str(copy))


def test_a_processor_that_names_another_model_is_refused(copy):
    edit(copy / "processor_config.json", lambda data: data.update(audio_tokenizer={"a": "b/c"}))
    with pytest.raises(CheckpointError, match="a model of its own"):
        load_checkpoint(str(copy))


FILES = [
    "config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
]


@pytest.mark.parametrize("depth", [40, 400, 100_000])
@pytest.mark.parametrize("file", FILES)
def test_deep_json_is_a_named_error(copy, file, depth):
    deep = '{"a":' * depth + "1" + "}" * depth
    (copy / file).write_text(f'{{"model_type": "llava", "deep": {deep}}}')
    with pytest.raises(CheckpointError, match=rf"{file} is damaged: nested too deeply"):
        load_checkpoint(str(copy))


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '"llava"', "\ud800"])
@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_no_json_object(copy, file, text):
    (copy / file).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=rf"{file} is damaged"):
        load_checkpoint(str(copy))


@pytest.mark.parametrize("kind", [None, 7, {}, []])
def test_a_type_that_is_no_word(copy, kind):
    edit(copy / "config.json", lambda data: data.update(model_type=kind))
    with pytest.raises(CheckpointError, match="model_type must be a word"):
        load_checkpoint(str(copy))


def test_a_deep_tokenizer_of_what_may_be_a_reference(copy):
    (copy / "chat_template.jinja").unlink()
    (copy / "tokenizer.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(CheckpointError, match="processor"):
        load_named_model(str(copy))


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% for m in %}", "TemplateSyntaxError"),
        ("{{ messages.nothing.there }}", "UndefinedError"),
        ("{{ raise_exception('alternate') }}", "TemplateError: alternate"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_template_that_fails_is_a_named_error(copy, template, kind):
    (copy / "chat_template.jinja").write_text(template)
    subject = load_checkpoint(str(copy))
    with pytest.raises(CheckpointError, match=rf"chat template of .*copy fails: {kind}"):
        subject.encode([Prompt((), "Hello?", "")])


def loose_loads(source):
    """Lines of calls that load outside `model_folders`, or may unpickle."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in LOADERS | {"load_state_dict_from_url"}:
            found.append(node.lineno)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load"):
            found.append(node.lineno)
        if isinstance(node, ast.Constant) and node.value in LOADERS:  # getattr
            found.append(node.lineno)
    return found


@pytest.mark.slow
def test_everything_loads_through_model_folders():
    own = ROOT / "src" / "vispress" / "model_folders.py"
    # examples load as a user's script does
    others = {path for path in SOURCES if path != own and ROOT / "examples" not in path.parents}
    found = {p.relative_to(ROOT).as_posix(): loose_loads(p.read_text("utf-8")) for p in others}
    assert {name: lines for name, lines in found.items() if lines} == {}
    source = own.read_text(encoding="utf-8")
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in LOADERS
    ]
    trusts = [ast.unparse(word) for call in calls for word in call.keywords if word.arg]
    assert len(loose_loads(source)) == len(calls) == 2
    assert trusts.count("trust_remote_code=False") == len(calls)


@pytest.mark.parametrize(
    "line",
    [
        "AutoModel.from_pretrained(folder, trust_remote_code=False)",
        "load = AutoModel.from_pretrained",
        "getattr(hf, name).from_config(config)",
        "getattr(AutoModel, 'from_pretrained')(folder)",
        "torch.load(file)",
    ],
)
def test_a_loose_load_is_found(line):
    assert loose_loads(line) == [1]
