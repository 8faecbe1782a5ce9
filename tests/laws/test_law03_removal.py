"""Law 3: after removal nothing is left: same outputs, same hooks, same attributes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.laws.cases import (
    FAMILIES,
    cases,
    greedy,
    inputs_of,
    logits_of,
    model_of,
    settings,
)
from tests.tiny import cache_by_prompts
from torch import Tensor, nn

from vispress import compress_model, compressed, compression_report, remove_compression
from vispress.errors import CompressionStateError
from vispress.methods import DivPrune, FastV, TransPrune
from vispress.registry import get_method

OWN_OF_TRANSFORMERS = frozenset({"rope_deltas"})
"""Qwen models keep the last prompt's position offset on the module, compressed or not."""


class Snapshot:
    """Every attribute of every submodule, by identity; holds what it saw, so that ids
    stay unique.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen = self._look()
        self.configs = self._configs()

    def _look(self) -> dict[tuple[str, str], Any]:
        found: dict[tuple[str, str], Any] = {}
        for path, module in self.model.named_modules():
            found[path, "class"] = type(module)
            for name, value in module.__dict__.items():
                if name in OWN_OF_TRANSFORMERS:
                    continue
                found[path, name] = value
                if isinstance(value, dict):  # parameters, buffers, submodules, hooks
                    found |= {(path, f"{name}[{key}]"): item for key, item in value.items()}
        return found

    def _configs(self) -> list[str]:
        configs = [m.config for m in self.model.modules() if hasattr(m, "config")]
        return [str(c.to_dict()) + str(c._attn_implementation) for c in configs]

    def differences(self) -> list[tuple[str, str]]:
        """Where the model is no longer what it was."""
        now = self._look()
        missing = object()
        return [
            key
            for key in sorted(self.seen.keys() | now.keys())
            if self.seen.get(key, missing) is not now.get(key, missing)
        ]

    def assert_same(self) -> None:
        assert self.differences() == []
        assert self._configs() == self.configs


@cache_by_prompts
def plain(family: str) -> tuple[Tensor, Tensor, list[str]]:
    """What a family's model gives (transformers leaves hooks of its own at the first forward)."""
    model, inputs = model_of(family), inputs_of(family)
    logits, (sequences, _) = logits_of(model, inputs), greedy(model, inputs, 2)
    return logits, sequences, list(model.state_dict())


def before(family: str) -> Snapshot:
    """The warmed-up model as it is now: others share it, and transformers leaves marks on it."""
    plain(family)
    return Snapshot(model_of(family))


def assert_as_before(family: str, snapshot: Snapshot) -> None:
    model, inputs = model_of(family), inputs_of(family)
    logits, sequences, names = plain(family)
    snapshot.assert_same()
    assert list(model.state_dict()) == names
    assert torch.equal(logits_of(model, inputs), logits)
    assert torch.equal(greedy(model, inputs, 2)[0], sequences)
    snapshot.assert_same()


@pytest.mark.parametrize(("family", "method"), cases(3))
def test_forward_and_generate_leave_nothing_behind(family: str, method: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    snapshot = before(family)
    assert compress_model(model, method, **settings(family, method)) is model
    names = list(model.state_dict())
    logits_of(model, inputs)
    greedy(model, inputs, 2)
    assert remove_compression(model) is model
    own = [name for name in names if ".vispress_modules." not in name]
    assert own == plain(family)[2]
    assert (own != names) == get_method(method).trained  # its parameters are the model's
    assert_as_before(family, snapshot)


@pytest.mark.parametrize("family", FAMILIES)
def test_chains_and_repeated_rounds_leave_nothing_behind(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    snapshot = before(family)
    chain = [DivPrune(keep_ratio=0.6), FastV(keep_ratio=0.5, layer=2), TransPrune(layers=(3, 4, 5))]
    for _ in range(2):
        with compressed(model, chain):
            logits_of(model, inputs)
        with compressed(model, chain[1]):
            pass
    assert_as_before(family, snapshot)


def raise_in_decoder(model: Any) -> Callable[[], None]:
    """Make decoder layer 3 raise; returns the undo."""

    def fail(*_: Any) -> None:
        raise ArithmeticError("in the decoder")

    handle = model.model.language_model.layers[3].mlp.register_forward_hook(fail)
    return handle.remove  # type: ignore[no-any-return]


def raise_in_encoder(model: Any) -> Callable[[], None]:
    """Make the vision encoder raise; returns the undo."""

    def fail(*_: Any) -> None:
        raise ArithmeticError("in the encoder")

    encoder = getattr(model.model, "vision_tower", None) or model.model.visual
    handle = encoder.register_forward_hook(fail)
    return handle.remove  # type: ignore[no-any-return]


def decoder_alone(model: Any) -> Tensor:
    """What the decoder gives for embeddings that belong to no prompt."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(3, 7, 64, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return model.model.language_model(inputs_embeds=embeddings).last_hidden_state  # type: ignore[no-any-return]


@pytest.mark.some(cases=10)
@pytest.mark.parametrize("place", [raise_in_decoder, raise_in_encoder])
@pytest.mark.parametrize("method", ["fastv", "visionzip", "transprune", "pyramiddrop"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exception_inside_the_forward_leaves_nothing_behind(
    family: str, method: str, place: Callable[[Any], Callable[[], None]]
) -> None:
    model, inputs = model_of(family), inputs_of(family)
    snapshot = before(family)
    expected = decoder_alone(model)
    with compressed(model, method, **settings(family, method)):
        good = logits_of(model, inputs)
        undo = place(model)
        try:
            with pytest.raises(ArithmeticError):
                logits_of(model, inputs)
            with pytest.raises(ArithmeticError):
                greedy(model, inputs)
        finally:
            undo()
        # and the compressed model goes on as if nothing had happened, as does its decoder by itself
        assert torch.equal(decoder_alone(model), expected)
        assert torch.equal(logits_of(model, inputs), good)
    assert_as_before(family, snapshot)


@pytest.mark.parametrize("family", FAMILIES)
def test_removal_after_a_failed_forward_needs_no_good_one(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    snapshot = before(family)
    compress_model(model, "fastv", keep_ratio=0.4)
    undo = raise_in_decoder(model)
    with pytest.raises(ArithmeticError):
        logits_of(model, inputs)
    undo()
    remove_compression(model)
    assert_as_before(family, snapshot)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exception_inside_the_with_block_removes_the_compression(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    snapshot = before(family)

    def interrupted() -> None:
        with compressed(model, "fastv", keep_ratio=0.4):
            logits_of(model, inputs)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert_as_before(family, snapshot)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_refused_call_attaches_nothing(family: str) -> None:
    model = model_of(family)
    snapshot = before(family)
    for bad in ({"layer": 99}, {"positions": "sideways"}, {"nonsense": 1}, {"backend": "quantum"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            compress_model(model, "fastv", keep_ratio=0.4, **bad)  # type: ignore[arg-type]
    assert_as_before(family, snapshot)


def test_a_second_compression_names_the_way_out_and_changes_nothing() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    snapshot = before("llava")
    compress_model(model, "fastv", keep_ratio=0.4)
    good = logits_of(model, inputs)
    with pytest.raises(CompressionStateError, match=r"fastv.*remove_compression"):
        compress_model(model, "divprune", keep_ratio=0.4)
    with pytest.raises(CompressionStateError, match="remove_compression"):
        compressed(model, "divprune", keep_ratio=0.4).__enter__()
    assert torch.equal(logits_of(model, inputs), good)
    remove_compression(model)
    assert_as_before("llava", snapshot)


def test_removal_twice_and_reports_after_it_are_refused() -> None:
    model = model_of("llava")
    compress_model(model, "fastv", keep_ratio=0.4)
    remove_compression(model)
    with pytest.raises(CompressionStateError, match="not compressed"):
        remove_compression(model)
    with pytest.raises(CompressionStateError, match="not compressed"):
        compression_report(model)


def test_two_compressed_models_do_not_meet() -> None:
    first, second = model_of("llava"), model_of("llava_onevision")
    snapshot = before("llava")
    inputs = {name: inputs_of(name) for name in ("llava", "llava_onevision")}
    with compressed(first, "fastv", keep_ratio=0.4):
        alone = logits_of(first, inputs["llava"])
        with compressed(second, "divprune", keep_ratio=0.6) as other:
            logits_of(second, inputs["llava_onevision"])
            assert torch.equal(logits_of(first, inputs["llava"]), alone)
            kept = [i.num_kept / i.num_visual for s in other.samples for i in s.images]
            assert min(kept) > 0.5
        assert torch.equal(logits_of(first, inputs["llava"]), alone)
    snapshot.assert_same()


def test_a_remnant_is_noticed() -> None:
    model = model_of("llava")
    snapshot = before("llava")
    layer = model.model.language_model.layers[1]
    handle = layer.register_forward_pre_hook(lambda *_: None)
    path = "model.language_model.layers.1"
    assert snapshot.differences() == [(path, f"_forward_pre_hooks[{handle.id}]")]
    handle.remove()
    layer.__dict__["left"] = 1
    assert snapshot.differences() == [(path, "left")]
    del layer.__dict__["left"]
    assert snapshot.differences() == []
