"""Law 10: losses and gradients are those of the masked model; checkpointing and LoRA
change none.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from tests.families import TABLE
from tests.laws.cases import (
    CASES,
    DROPPING,
    FAMILIES,
    MASKING,
    SAMPLES,
    Spy,
    alive_of,
    cases,
    changed_rows,
    encoding_as,
    greedy,
    inputs_of,
    make,
    model_of,
    noting,
)
from tests.laws.oracle import oracle_loss
from tests.tiny import build, cache_by_prompts, like, make_inputs
from tests.tiny_models import TEXT_IDS
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from vispress import compress_model, compressed, remove_compression
from vispress.adapters.base import find_adapter
from vispress.errors import CompressionStateError
from vispress.methods import DivPrune, FastV
from vispress.methods.base import Compressor
from vispress.registry import get_method
from vispress.runtime.forward import prefill

EXACT = 1e-9
MERGING = sorted({method for _, method in CASES if get_method(method).merges})
MERGES_IN_LLM = ("sparsevlm",)

Gradients = dict[str, Tensor]


def labels_of(inputs: Mapping[str, Any]) -> Tensor:
    """Next-token labels on the answer: the last two tokens of each sample, behind its question."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    place = mask.flip(1).cumsum(1).flip(1)  # 1 is the last token
    answer = mask & (place <= 2) & (ids >= TEXT_IDS[0]) & (ids < TEXT_IDS[1])
    return ids.masked_fill(~answer, -100)  # type: ignore[no-any-return]


def gradients(model: nn.Module, loss: Tensor, *, keep: bool = False) -> Gradients:
    """Gradient of every parameter (zeros where the loss does not depend on it)."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(
        loss, [p for _, p in named], retain_graph=keep, allow_unused=True, materialize_grads=True
    )
    return {name: gradient for (name, _), gradient in zip(named, found, strict=True)}


def backward(model: nn.Module, loss: Tensor) -> Gradients:
    """The same through `loss.backward()`, which reentrant checkpointing needs."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    model.zero_grad(set_to_none=True)
    return found


def assert_equal(got: Gradients, expected: Gradients, tolerance: float = EXACT) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        assert (got[name] - gradient).abs().max() < tolerance * scale, name


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Train mode for the length of a block."""
    model.train()
    try:
        yield
    finally:
        model.eval()


def loss_of(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    return model(**inputs, labels=labels_of(inputs)).loss  # type: ignore[no-any-return]


def both(
    model: Any, inputs: Mapping[str, Any], method: Compressor, masked: Any = None
) -> tuple[Tensor, Gradients, Tensor, Gradients]:
    """Loss and gradients of the compressed model, then of the masked one.

    New values of merged tokens are worked out from the plans, on the graph of the compressed
    forward; that they do depend on the parameters is for
    `test_merged_values_carry_the_true_gradient`.

    Args:
        model: What is compressed and called, perhaps wrapped.
        inputs: With padding.
        method: The compressor.
        masked: The model that the oracle runs, if `model` is wrapped.
    """
    spy = Spy()
    masked = model if masked is None else masked
    with training(model):
        with compressed(model, spy.watch(method)) as view:
            with noting(model, [method]) as encoded:
                loss = loss_of(model, inputs)
            report = view.report
        got = gradients(model, loss, keep=True)
        alive = alive_of(report, inputs["attention_mask"].bool())
        prompts = -(labels_of(inputs) != -100).long()  # the answer is not of the prompt
        values = changed_rows(report, spy, inputs["input_ids"].shape, prompts)
        positions: Any = method.default_positions
        positions = "original" if find_adapter(model).mrope else positions
        with encoding_as(masked, encoded):
            expected_loss = oracle_loss(masked, inputs, labels_of(inputs), alive, positions, values)
        expected = gradients(model, expected_loss)
    return loss.detach(), got, expected_loss.detach(), expected


@contextmanager
def checkpointing(model: Any, *, reentrant: bool) -> Iterator[None]:
    """Gradient checkpointing (its name changes between transformers versions) for a block."""
    new = hasattr(model, "activation_checkpointing_enable")
    prefix = "activation" if new else "gradient"
    getattr(model, f"{prefix}_checkpointing_enable")({"use_reentrant": reentrant})
    try:
        yield
    finally:
        getattr(model, f"{prefix}_checkpointing_disable")()


@pytest.mark.parametrize(
    ("family", "method", "padding"), cases(10, DROPPING, turning=("left", "right"))
)
def test_loss_and_gradients_are_those_of_the_masked_model(
    family: str, method: str, padding: str
) -> None:
    model, inputs = model_of(family), inputs_of(family, padding)
    loss, got, expected_loss, expected = both(model, inputs, make(family, method))
    assert abs(loss - expected_loss) < EXACT
    # the oracle's values and its early features (Qwen3-VL), or the hidden states they are made of,
    # come from two runs, whose fp32 rotations and norms round the two gradients one by one
    twice = method in MERGING and (like(family) == "qwen3_vl" or method in MERGES_IN_LLM)
    twice = twice or (family in TABLE and TABLE[family].rounds)
    twice = twice or get_method(method).gates or get_method(method).softens is not None
    assert_equal(got, expected, 1e-6 if twice else EXACT)


@cache_by_prompts
def trained(family: str) -> Any:
    """A model of its own, so that checkpointing leaves no trace on the shared one."""
    return build(family)


@pytest.mark.parametrize(("family", "method"), cases("checkpoints"))
def test_gradient_checkpointing_changes_no_gradient(family: str, method: str) -> None:
    model, inputs = trained(family), inputs_of(family)
    compressor = make(family, method)
    with training(model), compressed(model, compressor) as report:
        plain = loss_of(model, inputs)
        expected, kept = backward(model, plain), report.to_dict()["samples"]
        for reentrant in (True, False):
            soft_keys = compressor.softens == "keys"
            if reentrant and (compressor.gates or soft_keys):  # refused: see their own tests
                continue
            with checkpointing(model, reentrant=reentrant):
                loss = loss_of(model, inputs)
                got = backward(model, loss)
            assert abs(loss - plain) < EXACT
            assert report.to_dict()["samples"] == kept
            assert_equal(got, expected)


def test_a_checkpointing_model_generates_in_train_mode() -> None:
    """As reinforcement learning has it do: without gradients no layer is checkpointed."""
    model, inputs = trained("llava"), inputs_of("llava")

    def agrees() -> bool:
        expected, _ = greedy(model, inputs, 3)
        with training(model), checkpointing(model, reentrant=False), torch.no_grad():
            return torch.equal(greedy(model, inputs, 3)[0], expected)

    transformers_version = tuple(map(int, transformers.__version__.split(".")[:2]))
    # transformers 5.17 takes the cache from such layers, and warns: the untouched model is as wrong
    untouched = agrees()
    assert untouched or transformers_version < (5, 24)
    with compressed(model, make("llava", "fastv")):
        assert agrees() == untouched


@pytest.mark.parametrize("method", ["fastv", "lvlm_csp"])
def test_hooks_of_a_layer_that_run_again_repeat_what_was_decided(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside a checkpoint (transformers 5.17) they run twice, and must save as many tensors."""
    enter = prefill.enter_layer

    def twice(*args: Any) -> Any:
        saved: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            entered, first = enter(*args), len(saved)
            again = enter(*args)
        assert torch.equal(again[0], entered[0])
        assert len(saved) == 2 * first
        return again

    monkeypatch.setattr(prefill, "enter_layer", twice)
    model = model_of("llava")
    with training(model), compressed(model, make("llava", method)) as report:
        model(**inputs_of("llava"), use_cache=False)
        assert report.mean_keep_ratio < 1


@pytest.mark.slow(cases=2)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", sorted(MASKING))
def test_removal_before_a_backward_that_needs_the_masks_is_refused(
    method: str, reentrant: bool
) -> None:
    """Layers would run again without them: silently, where the checkpoint is reentrant."""
    model, inputs = trained("llava"), inputs_of("llava")
    with training(model), checkpointing(model, reentrant=reentrant):
        refusal = pytest.raises(CompressionStateError, match=r"call loss\.backward\(\) before")
        with refusal, compressed(model, make("llava", method)):
            loss = loss_of(model, inputs)
        got = backward(model, loss)
        remove_compression(model)
        with compressed(model, make("llava", method)):
            expected = backward(model, loss_of(model, inputs))
        assert_equal(got, expected)
        with compressed(model, make("llava", method)):
            dropped = loss_of(model, inputs)
            del dropped  # no backward can come
    with training(model), compressed(model, make("llava", method)):
        loss = loss_of(model, inputs)  # without checkpoints nothing runs again
    assert_equal(backward(model, loss), expected)


@pytest.mark.parametrize(("family", "method"), cases("reached"))
def test_gradients_reach_encoder_and_projector(family: str, method: str) -> None:
    """Wherever a token enters a decoder layer; with no image in any nothing may come back."""
    model, inputs = model_of(family), inputs_of(family)
    with training(model), compressed(model, make(family, method)) as report:
        found = gradients(model, loss_of(model, inputs))
        entered = sum(map(sum, report.visual_per_layer))
    projector = {id(p) for p in find_adapter(model).projector.parameters()}
    vision = [n for n, p in model.named_parameters() if id(p) in projector]
    encoder = [n for n in found if "vision_tower" in n or "visual." in n]
    for names in (vision, encoder):
        reached = sum(float(found[name].abs().sum()) for name in names)
        assert names
        assert (reached > 0) == (entered > 0)


# inside the LLM the choice itself moves with the projector, and the loss jumps
@pytest.mark.parametrize(
    ("family", "method"),
    cases(
        "true gradient",
        [case for case in CASES if case[1] in MERGING and case[1] not in MERGES_IN_LLM],
    ),
)
def test_merged_values_carry_the_true_gradient(family: str, method: str) -> None:
    assert_true_gradient(model_of(family), inputs_of(family), make(family, method))


def assert_true_gradient(model: Any, inputs: Mapping[str, Any], method: Compressor) -> None:
    """Along the projector's weights, the loss moves as its gradient says (central difference).

    The loss is taken in fp64 here (transformers' own is fp32), and the step is large against the
    fp32 rounding of its norms.
    """
    parameters = [p for p in find_adapter(model).projector.parameters() if p.dim() == 2]
    generator = torch.Generator().manual_seed(0)
    ways = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    step = 1e-2 / math.sqrt(sum(way.numel() for way in ways))

    def fine_loss() -> Tensor:
        logits, targets = model(**inputs).logits[:, :-1], labels_of(inputs)[:, 1:]
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def move(distance: float) -> None:
        with torch.no_grad():
            for parameter, way in zip(parameters, ways, strict=True):
                parameter.add_(way, alpha=distance)

    with training(model), compressed(model, method):
        found = torch.autograd.grad(fine_loss(), parameters)
        slope = sum(float((g * way).sum()) for g, way in zip(found, ways, strict=True))
        saved = [p.detach().clone() for p in parameters]
        losses = []
        for distance in (step, -2 * step):
            move(distance)
            with torch.no_grad():
                losses.append(float(fine_loss()))
        with torch.no_grad():
            for parameter, value in zip(parameters, saved, strict=True):
                parameter.copy_(value)
    measured = (losses[0] - losses[1]) / (2 * step)
    assert measured == pytest.approx(slope, rel=0.03, abs=0.02)


@pytest.mark.some(cases=7)
@pytest.mark.parametrize(
    ("family", "method"),
    cases(
        10,
        [
            (f, m)
            for f in FAMILIES
            for m in (
                "fastv",
                "divprune",
                "visionzip",
                "transprune",
            )
        ],
    ),
)
def test_two_forwards_then_one_backward_add_up(family: str, method: str) -> None:
    model = model_of(family)
    batches = [inputs_of(family, "left"), make_inputs_again(family)]
    with training(model), compressed(model, make(family, method)):
        single = [gradients(model, loss_of(model, inputs)) for inputs in batches]
        first, second = (loss_of(model, inputs) for inputs in batches)
        together = gradients(model, first + second)
    expected = {name: single[0][name] + single[1][name] for name in together}
    assert_equal(together, expected)


@cache_by_prompts
def make_inputs_again(family: str) -> dict[str, Any]:
    """Another batch: other content, other lengths."""
    return make_inputs(family, SAMPLES[::-1][:2], padding="right", seed=5)


@pytest.mark.some(cases=2)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_checkpointed_forwards_then_one_backward_add_up(family: str) -> None:
    """The recompute of the first forward finds its own decisions, not those of the second."""
    model = trained(family)
    batches = [inputs_of(family, "left"), make_inputs_again(family)]
    chain = [DivPrune(keep_ratio=0.6), FastV(keep_ratio=0.5, layer=2), make(family, "pyramiddrop")]
    with training(model), compressed(model, chain):
        single = [backward(model, loss_of(model, inputs)) for inputs in batches]
        expected = {name: single[0][name] + single[1][name] for name in single[0]}
        for reentrant in (True, False):
            with checkpointing(model, reentrant=reentrant):
                first, second = (loss_of(model, inputs) for inputs in batches)
                together = backward(model, first + second)
            assert_equal(together, expected)


def with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules=r".*language_model.*(q|v|up)_proj"
    )
    wrapped = get_peft_model(model, config).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:  # zero at the start: then LoRA would change nothing
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.3 * noise)
            elif "lora_A" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(noise / math.sqrt(parameter.shape[1]))
    return wrapped


@pytest.mark.some(cases=4)
@pytest.mark.parametrize(
    ("family", "method"),
    cases(
        10,
        [
            (f, m)
            for f in FAMILIES
            for m in (
                "fastv",
                "divprune",
                "visionzip",
                "transprune",
                "pyramiddrop",
            )
        ],
    ),
)
def test_lora_before_and_after_compression_gives_the_masked_gradients(
    family: str, method: str
) -> None:
    compressor = make(family, method)
    inputs = inputs_of(family)
    wrapped = with_lora(build(family))
    loss, got, expected_loss, expected = both(wrapped, inputs, compressor, wrapped.get_base_model())
    assert abs(loss - expected_loss) < EXACT
    assert any("lora_A" in name for name in got)
    assert all(float(g.abs().sum()) > 0 for name, g in got.items() if "layers.5" in name)
    assert_equal(got, expected)

    later = with_lora(compress_model(build(family), compressor))
    with training(later):
        late_loss = loss_of(later, inputs)
        assert abs(late_loss - expected_loss) < EXACT
        assert_equal(gradients(later, late_loss), expected)
        remove_compression(later)
        plain = loss_of(later, inputs)
        assert abs(plain - loss_of(wrapped, inputs)) < EXACT


@pytest.mark.some(cases=5)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_with_gradient_checkpointing_gives_the_same_gradients(
    family: str, reentrant: bool
) -> None:
    wrapped, inputs = with_lora(build(family)), inputs_of(family)
    with training(wrapped), compressed(wrapped, make(family, "pyramiddrop")):
        expected = backward(wrapped, loss_of(wrapped, inputs))
        wrapped.enable_input_require_grads()
        with checkpointing(wrapped.get_base_model(), reentrant=reentrant):
            got = backward(wrapped, loss_of(wrapped, inputs))
    assert_equal(got, expected)


@pytest.mark.some(cases=10)
@pytest.mark.parametrize("method", [method for family, method in CASES if family == "llava"])
def test_an_optimiser_step_moves_what_it_should(method: str) -> None:
    """A training loop of three steps: losses fall, and the model is still compressed."""
    model, inputs = build("llava"), inputs_of("llava")
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    with training(model), compressed(model, make("llava", method)) as report:
        for _ in range(3):
            loss = loss_of(model, inputs)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(float(loss.detach()))
        whole = method in MASKING or get_method(method).softens is not None
        assert (report.mean_keep_ratio == 1.0) == whole
    assert losses[2] < losses[1] < losses[0]


def test_a_detached_value_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from vispress.runtime.forward import apply_placement

    values = apply_placement._values
    monkeypatch.setattr(apply_placement, "_values", lambda *a: values(*a).detach())
    with pytest.raises(AssertionError):
        test_merged_values_carry_the_true_gradient("llava", "avg_pool")
