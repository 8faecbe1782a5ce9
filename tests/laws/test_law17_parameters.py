"""Law 17: parameters of methods are the model's: saved and loaded they give the same, they follow
it wherever it goes, whoever wraps it, and its own folder stays clean.
"""

import copy
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.laws.cases import FAMILIES, METHODS, fits, inputs_of, logits_of, make, model_of
from tests.laws.test_law10_training import backward, loss_of, training
from tests.laws.test_law15_precision import HALVES, Noted
from tests.tiny import build
from torch import nn

from vispress import (
    compress_model,
    compressed,
    remove_compression,
    save_compression,
    update_compression,
)
from vispress import compression_report as report_of
from vispress.adapters.base import find_adapter
from vispress.config import load_config
from vispress.errors import CompressionStateError, ConfigError
from vispress.methods import DivPrune, PMoD
from vispress.precision import full_precision
from vispress.registry import get_method
from vispress.runtime.modules import MODULES, held, make_modules

TRAINED = [name for name in METHODS if get_method(name).trained]
FITTING = [(method, family) for method in TRAINED for family in FAMILIES if fits(family, method)]
ROOT = Path(__file__).parents[2]


def own(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of methods, by name."""
    return {name: p for name, p in model.named_parameters() if f"{MODULES}." in name}


def draw(model: nn.Module, seed: int = 0) -> None:
    """Give them random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in own(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def compressed_anew(family: str, method: Any, **options: Any) -> Any:
    """A model of its own, compressed, with drawn parameters."""
    model = compress_model(build(family), method, **options)
    draw(model)
    return model


def seen(model: Any, family: str) -> str:
    """A digest of what is kept and of the logits."""
    logits = logits_of(model, inputs_of(family))
    digest = hashlib.sha256(logits.numpy().tobytes())
    digest.update(repr([vars(s) for s in report_of(model).samples]).encode())
    return digest.hexdigest()


# --- folders


LOADS = """
import sys, torch
torch.set_num_threads(1)
from tests.laws.test_law17_parameters import seen
from tests.tiny import build
from vispress import compress_model
folder, family = sys.argv[1:]
print(seen(compress_model(build(family), config=folder), family))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED)
def test_saved_and_loaded_in_a_new_process_it_keeps_the_same(method: str, tmp_path: Path) -> None:
    family = ("llava", "qwen2_5_vl")[TRAINED.index(method) % 2]
    family = family if fits(family, method) else "llava"
    chain = [DivPrune(keep_ratio=0.7), make(family, method)]
    if chain[1].whole or chain[1].changes_encoder():  # it acts first
        chain.reverse()
    model = compressed_anew(family, chain)
    save_compression(model, tmp_path / family, data={"what": "nothing"})
    paths = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(tmp_path / family), family],
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout.split() == [seen(model, family)], done.stderr


@pytest.mark.some(cases=12)
@pytest.mark.parametrize(("method", "family"), FITTING)
def test_a_folder_is_a_method_and_its_parameters(method: str, family: str, tmp_path: Path) -> None:
    model = compressed_anew(family, make(family, method))
    save_compression(model, tmp_path, data={"set": "drawn", "steps": 3})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "compressor.yaml", "modules.safetensors", "vispress.json",
    ]  # fmt: skip
    assert load_config(tmp_path) == make(family, method)
    card = json.loads((tmp_path / "vispress.json").read_text())
    assert (card["methods"], card["family"]) == ([method], family)
    assert card["data"] == {"set": "drawn", "steps": 3}
    assert set(card["versions"]) == {"vispress", "torch", "transformers"}
    again = compress_model(build(family), config=tmp_path)
    assert seen(again, family) == seen(model, family)
    assert not any("untrained" in note for note in report_of(again).notes)


def test_a_method_without_parameters_has_a_folder_too(tmp_path: Path) -> None:
    model = compress_model(build("llava"), ["divprune", "fastv"], mean_keep_ratio=0.4)
    save_compression(compressed_anew("llava", PMoD()), tmp_path)
    save_compression(model, tmp_path)  # over what was there
    assert not (tmp_path / "modules.safetensors").exists()
    again = compress_model(build("llava"), config=tmp_path)
    assert seen(again, "llava") == seen(model, "llava")


def test_positions_are_those_it_was_saved_with(tmp_path: Path) -> None:
    chain = [DivPrune(keep_ratio=0.5), PMoD()]
    model = compressed_anew("llava", chain, positions="original")
    save_compression(model, tmp_path)
    assert seen(compress_model(build("llava"), config=tmp_path), "llava") == seen(model, "llava")
    other = compress_model(build("llava"), config=tmp_path, positions="compact")
    assert seen(other, "llava") != seen(model, "llava")


def damage(folder: Path, **changes: Any) -> None:
    """Change tensors of a folder (None takes one out), and let the card agree."""
    path = folder / "modules.safetensors"
    tensors = load_file(path) | {name.replace("_", "."): v for name, v in changes.items()}
    save_file({name: v for name, v in tensors.items() if v is not None}, path)
    write_card(folder, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def write_card(folder: Path, **changes: Any) -> None:
    path = folder / "vispress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BROKEN: dict[str, tuple[Any, str]] = {
    "another width": (
        lambda f: damage(f, **{"0_3_weight": torch.zeros(7)}),
        r"0\.3\.weight has the shape \(7,\), and this model wants \(64,\)",
    ),
    "a name is missing": (
        lambda f: damage(f, **{"0_3_weight": None}), r"lacks 0\.3\.weight, which does not fit",
    ),
    "a name too many": (
        lambda f: damage(f, **{"0_9_weight": torch.zeros(64)}), r"has 0\.9\.weight, which does",
    ),
    "fields of another depth": (
        lambda f: (f / "compressor.yaml").write_text("method: pmod\nbeta: 0.9\n"),
        r"has 0\.2\.bias, 0\.2\.weight, which does not fit .*compressor\.yaml",
    ),
    "another method": (
        lambda f: (f / "compressor.yaml").write_text("method: fastv\nkeep_ratio: 0.5\n"),
        r"compressor\.yaml is of fastv, and the parameters beside it are of \['pmod'\]",
    ),
    "another family": (
        lambda f: write_card(f, family="internvl"),
        "was saved of a internvl model, and this one is llava",
    ),
    "a pickle": (
        lambda f: torch.save({}, f / "modules.pt"), r"modules\.pt is a pickle, which can run code",
    ),
    "a pickle by another name": (
        lambda f: (torch.save({}, f / "modules.safetensors"), write_card(
            f, sha256=hashlib.sha256((f / "modules.safetensors").read_bytes()).hexdigest())),
        "is not in the safetensors format",
    ),
    "changed since": (
        lambda f: save_file({"0.2.bias": torch.ones(1)}, f / "modules.safetensors"),
        r"modules\.safetensors is not what vispress\.json says \(sha256\)",
    ),
    "no parameters": (
        lambda f: (f / "modules.safetensors").unlink(), "do not belong together: there is none",
    ),
    "parameters of nothing": (lambda f: write_card(f, sha256=None), "it names none"),
    "no card": (lambda f: (f / "vispress.json").unlink(), "what save_compression writes"),
    "no JSON": (lambda f: (f / "vispress.json").write_text("{"), "is not valid JSON"),
    "JSON without an end": (
        lambda f: (f / "vispress.json").write_text("[" * 100_000), "is not valid JSON",
    ),
    "another format": (lambda f: write_card(f, format=2), "format must be 1, got 2"),
    "a list": (lambda f: (f / "vispress.json").write_text("[]"), "format must be 1, got 'list'"),
    "no method": (lambda f: (f / "compressor.yaml").unlink(), r"cannot read .*compressor\.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_named_and_nothing_is_attached(case: str, tmp_path: Path) -> None:
    save_compression(compressed_anew("llava", PMoD()), tmp_path)
    change, match = BROKEN[case]
    change(tmp_path)
    model = model_of("llava")
    before = list(model.state_dict())
    with pytest.raises(ConfigError, match=match):
        compress_model(model, config=tmp_path)
    assert list(model.state_dict()) == before
    with pytest.raises(CompressionStateError, match="not compressed"):
        remove_compression(model)


@pytest.mark.parametrize("name", ["llava-hf/llava-1.5-7b-hf", "", "/home/somebody/models/own"])
def test_a_card_names_the_model_and_no_ones_folders(name: str, tmp_path: Path) -> None:
    model = compressed_anew("llava", PMoD())
    model.model.config._name_or_path = name
    save_compression(model, tmp_path)
    card = json.loads((tmp_path / "vispress.json").read_text())
    assert card["base_model"] == name.removeprefix("/home/somebody/models/")


def test_saving_refuses_what_could_not_be_loaded(tmp_path: Path) -> None:
    model = compressed_anew("llava", PMoD())
    with pytest.raises(ConfigError, match="data must be plain values"):
        save_compression(model, tmp_path, data={"what": object()})
    assert not list(tmp_path.iterdir())
    (tmp_path / "training_args.bin").touch()
    with pytest.raises(ConfigError, match=r"training_args\.bin is a pickle, beside which nothing"):
        save_compression(model, tmp_path)
    with pytest.raises(CompressionStateError, match="not compressed"):
        save_compression(build("llava"), tmp_path)


def test_a_save_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compressed_anew("llava", PMoD())
    save_compression(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    draw(model, seed=5)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save", full)
        with pytest.raises(ConfigError, match=r"cannot write .*: No space left on device"):
            save_compression(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    save_compression(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(before)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # who reads one reads all
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write"):
        save_compression(model, tmp_path / "file")


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_models_own_folder_is_as_ever(family: str, tmp_path: Path) -> None:
    plain = build(family, dtype=torch.float32)
    model = compress_model(build(family, dtype=torch.float32), PMoD())
    draw(model)
    for name, one in (("plain", plain), ("head", model), ("base", model.model)):
        one.save_pretrained(tmp_path / name)
    wanted = load_file(tmp_path / "plain" / "model.safetensors")
    found = load_file(tmp_path / "head" / "model.safetensors")
    assert wanted.keys() == found.keys()
    assert not any(MODULES in name for name in load_file(tmp_path / "base" / "model.safetensors"))
    again, told = type(model).from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not told["unexpected_keys"]
    assert not told["missing_keys"]
    assert own(model)
    remove_compression(model)
    assert not own(model)
    assert not own(again)


# --- wherever the model goes


def test_they_are_parameters_once_in_fp32_and_follow_the_model() -> None:
    model = build("llava", dtype=torch.bfloat16)
    before = sum(1 for _ in model.parameters())
    compress_model(model, PMoD())
    names = own(model)
    assert len(names) == 8  # layers 2 to 5
    assert sum(1 for _ in model.parameters()) == before + len(names)
    assert len({id(p) for p in model.parameters()}) == before + len(names)
    assert {p.dtype for p in names.values()} == {torch.float32}
    assert all(name in model.state_dict() for name in names)
    assert model.training == model.get_submodule(f"model.{MODULES}").training
    for dtype in (torch.float64, torch.bfloat16):
        assert {p.dtype for p in own(model.to(dtype)).values()} == {dtype}
    assert {p.device.type for p in own(model.to("meta")).values()} == {"meta"}


@pytest.mark.parametrize("method", TRAINED)
def test_fresh_ones_do_not_hang_on_the_users_seed(method: str) -> None:
    """A seed of their own, and the user's goes on as if nothing had been drawn."""
    adapter, made = find_adapter(model_of("llava")), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(make_modules(adapter, [make("llava", method)])["0"].state_dict())
        drawn = torch.rand(3)
        torch.manual_seed(seed)
        assert torch.equal(torch.rand(3), drawn)
    assert made[0]
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())


def test_a_deep_copy_has_its_own() -> None:
    model = compressed_anew("llava", PMoD())
    expected = seen(model, "llava")
    twin = copy.deepcopy(model)
    assert seen(twin, "llava") == expected
    draw(twin, seed=1)
    moved = seen(twin, "llava")
    assert moved != expected
    assert seen(model, "llava") == expected
    remove_compression(twin)
    assert not own(twin)
    assert seen(model, "llava") == expected
    remove_compression(model)
    assert torch.equal(logits_of(model, inputs_of("llava")), logits_of(twin, inputs_of("llava")))


def test_gradients_go_where_the_module_is_now() -> None:
    """Another child may stand there by now (PEFT, FSDP): it is called, and trained."""
    model, inputs = compressed_anew("llava", PMoD()), inputs_of("llava")
    other = copy.deepcopy(model.model.get_submodule(MODULES))
    model.model.add_module(MODULES, other)
    draw(model, seed=1)
    with training(model):
        found = backward(model, loss_of(model, inputs))
    assert all(found[name].any() for name in own(model) if ".5." not in name)


@pytest.mark.some(cases=18)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("method", TRAINED)
def test_half_precision_moves_no_ranking(method: str, autocast: bool, dtype: torch.dtype) -> None:
    """Drawn parameters rank the hidden states as in fp32, whatever the model computes in."""
    compressor = make("llava", method)
    noted = Noted(compressor)
    model = build("llava", dtype=torch.float32 if autocast else dtype)
    inputs = inputs_of("llava", dtype=torch.float32 if autocast else dtype)
    with compressed(model, noted.watched()):
        draw(model)
        with torch.autocast("cpu", dtype, enabled=autocast):
            logits_of(model, inputs)
        for tokens, _, plan in noted.plans:
            assert tokens.features.dtype in (torch.float32, dtype)
            assert plan.gate is None or plan.gate.dtype == torch.float32
        assert noted.plans
        assert bool(noted.pools) == (compressor.encoder_pooler() is not None)
        with full_precision():
            noted.assert_exact()


# --- PEFT


def lora(model: Any, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    options = {"target_modules": "all-linear"} | options
    return get_peft_model(model, LoraConfig(r=2, **options))


@pytest.mark.slow
def test_peft_around_a_compressed_model_trains_and_saves_them(tmp_path: Path) -> None:
    from peft import PeftModel

    inputs = inputs_of("llava", dtype=torch.float32)
    model = compress_model(build("llava", dtype=torch.float32), PMoD())
    draw(model)
    expected = logits_of(model, inputs)
    wrapped = lora(model, modules_to_save=[MODULES])
    assert torch.equal(logits_of(wrapped, inputs), expected)
    names = {n for n, p in wrapped.named_parameters() if MODULES in n and p.requires_grad}
    assert len(names) == 8
    assert not any("lora" in name for name in names)
    draw(wrapped, seed=1)
    moved = logits_of(wrapped, inputs)
    assert not torch.equal(moved, expected)
    with training(wrapped):
        found = backward(wrapped, loss_of(wrapped, inputs))
    assert all(found[name].any() for name in names if ".5." not in name)
    wrapped.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(MODULES in name for name in saved) == 8
    save_compression(wrapped, tmp_path / "compressor")
    fresh = compress_model(build("llava", dtype=torch.float32), PMoD())
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(logits_of(again, inputs), moved)
    plain = compress_model(build("llava", dtype=torch.float32), config=tmp_path / "compressor")
    assert torch.equal(logits_of(plain, inputs), moved)
    remove_compression(wrapped)
    assert not own(wrapped)


def test_compressed_behind_peft_they_are_trained(tmp_path: Path) -> None:
    inputs = inputs_of("llava", dtype=torch.float32)
    wrapped = lora(build("llava", dtype=torch.float32))
    compress_model(wrapped, PMoD())
    draw(wrapped)
    expected = logits_of(wrapped, inputs)
    with training(wrapped):
        found = backward(wrapped, loss_of(wrapped, inputs))
    assert all(found[name].any() for name in own(wrapped) if ".5." not in name)
    save_compression(wrapped, tmp_path)
    again = compress_model(build("llava", dtype=torch.float32), config=tmp_path)
    assert torch.equal(logits_of(again, inputs), expected)
    remove_compression(wrapped)
    assert not own(wrapped)


@pytest.mark.parametrize("method", TRAINED)
def test_the_usual_targets_of_lora_are_no_names_of_theirs(method: str) -> None:
    """PEFT takes layers by the ends of their names, and refuses those of another kind."""
    model = compress_model(build("llava", dtype=torch.float32), make("llava", method))
    usual = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    usual += ["fc1", "fc2", "linear_1", "linear_2", "out_proj", "qkv", "proj", "lm_head"]
    wrapped = lora(model, target_modules=usual)
    names = [name for name, _ in wrapped.named_parameters() if "lora" in name]
    assert names
    assert not any(MODULES in name for name in names)


# --- updates


def test_an_update_keeps_what_is_trained_and_adds_what_is_missing(tmp_path: Path) -> None:
    model = compressed_anew("llava", PMoD())
    before = {name: p.detach().clone() for name, p in own(model).items()}
    update_compression(model, scale=0.1)
    assert {n: id(p) for n, p in own(model).items()}.keys() == before.keys()
    update_compression(model, keep_ratio=0.3)  # layers 0 and 1 are routed, too
    now = own(model)
    assert len(now) == 12
    assert all(torch.equal(now[name], value) for name, value in before.items())
    assert not any(p.any() for name, p in now.items() if name not in before)
    assert logits_of(model, inputs_of("llava")).isfinite().all()
    model.save_pretrained(tmp_path)
    assert not any(MODULES in name for name in load_file(tmp_path / "model.safetensors"))
    wrapped = lora(model, modules_to_save=[MODULES])
    update_compression(wrapped, keep_ratio=0.6)
    assert held(model.model) is not model.model.get_submodule(MODULES)


def test_an_update_that_needs_more_behind_a_wrapper_is_refused() -> None:
    model = compressed_anew("llava", PMoD())
    wrapped = lora(model, modules_to_save=[MODULES])
    expected = logits_of(model, inputs_of("llava"))
    with pytest.raises(CompressionStateError, match=r"need the parameter 0\.0\.weight.*ModulesTo"):
        update_compression(wrapped, keep_ratio=0.3)
    assert torch.equal(logits_of(model, inputs_of("llava")), expected)


# --- several processes


def test_parameters_that_come_after_ddp_are_refused() -> None:
    from torch.nn.parallel import DistributedDataParallel

    model = build("llava")
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    with pytest.raises(CompressionStateError, match=r"pmod has parameters.*call compress_model"):
        compress_model(wrapped, PMoD())
    compress_model(wrapped, DivPrune(keep_ratio=0.5))
