"""Law 15: half precision changes no choice. Under autocast, and with bf16 or fp16 weights, a method
keeps what fp32 scores of the same signals keep.

The signals are the model's own, computed as it computes; from there on everything is fp32.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from tests.laws.cases import (
    CASES,
    cases,
    greedy,
    inputs_of,
    logits_of,
    make,
    model_of,
)
from tests.laws.test_law10_training import backward, both, checkpointing, loss_of, training
from tests.tiny import build, cache_by_prompts
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import StaticLayer

from vispress import compressed
from vispress.adapters import decoder
from vispress.adapters.base import find_adapter
from vispress.diffusion import LateSteps
from vispress.methods.base import Compressor, upcast
from vispress.methods.encoder_merger import EncoderTokens
from vispress.precision import full_precision
from vispress.runtime.encoder.capture import EncoderSink, projector_function
from vispress.runtime.forward import measuring
from vispress.runtime.forward.attention_reads import AttentionRead
from vispress.types import ATTENTION_SIGNALS, Signal, TokenPlan, VisualTokens

HALVES = (torch.bfloat16, torch.float16)
WAYS = ("autocast bf16", "bf16", "autocast fp16", "fp16")
READ = ATTENTION_SIGNALS | {
    Signal.QUERY_ATTENTION,
    Signal.MEAN_ATTENTION,
    Signal.KEY_NORMS,
    Signal.TRANSITION,
    Signal.UPDATE_NORM,
}
"""What the runtime computes from what modules are called with."""
TRAINED = (
    ("llava", "divprune"),
    ("llava_next", "fastv"),
    ("llava_onevision", "fourier"),
    ("qwen2_vl", "pyramiddrop"),
    ("qwen2_5_vl", "transprune"),
    ("qwen3_vl", "tome"),
    ("internvl", "visionzip"),
    ("llava", "scm"),
    ("qwen2_5_vl", "lvlm_csp"),
    ("qwen3_vl", "dart"),
)


@contextmanager
def in_half(way: str) -> Iterator[torch.dtype]:
    """Autocast to a half type inside, or nothing; gives the dtype of weights and pixels."""
    dtype = HALVES["fp16" in way]
    if "autocast" not in way:
        yield dtype
        return
    with torch.autocast("cpu", dtype):
        yield torch.float32


def widened(value: Any) -> Any:
    """A copy with all half tensors in fp32."""
    if isinstance(value, Tensor):
        return upcast(value) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(map(widened, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: widened(getattr(value, f.name)) for f in fields(value)})
    return value


class Noted:
    """Every plan of a compressor, with what it was made from; merges and pools of the encoder
    likewise.
    """

    def __init__(self, method: Compressor) -> None:
        self.method = method
        self.plans: list[tuple[VisualTokens, int, TokenPlan]] = []
        self.folds: list[tuple[EncoderTokens, Tensor]] = []
        self.pools: list[tuple[tuple[Any, ...], Tensor]] = []

    def watched(self) -> Compressor:
        """A compressor that behaves the same and tells."""
        plans, folds, pools = self.plans, self.folds, self.pools

        class Watched(type(self.method)):  # type: ignore[misc]
            def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
                plan: TokenPlan = super().plan(tokens, num_keep)
                plans.append((tokens, num_keep, plan))
                return plan

            def fold(self, tokens: EncoderTokens) -> Tensor:
                into: Tensor = super().fold(tokens)
                folds.append((tokens, into))
                return into

            def pool(self, *shown: Any) -> Tensor:
                pooled: Tensor = super().pool(*shown)
                pools.append((shown, pooled))
                return pooled

        Watched.__name__ = type(self.method).__name__
        twin = object.__new__(Watched)
        twin.__dict__.update(self.method.__dict__)
        return twin  # type: ignore[no-any-return]

    def assert_exact(self) -> None:
        """Plans are those of fp32 signals."""
        for tokens, num_keep, plan in self.plans:
            exact = self.method.plan(widened(tokens), num_keep)
            assert plan.counts == exact.counts
            for got, expected in zip(plan.keep, exact.keep, strict=True):
                assert torch.equal(got, expected)
            assert (plan.assign is None) == (exact.assign is None)
            if plan.assign is not None and exact.assign is not None:
                assert torch.equal(plan.assign, exact.assign)
        merger = self.method.encoder_merger()
        for seen, into in self.folds:
            assert merger is not None
            assert torch.equal(into, merger.fold(widened(seen)))
        pooler = self.method.encoder_pooler()
        for shown, pooled in self.pools:
            assert pooler is not None
            assert torch.equal(pooled, pooler.pool(*widened(shown)))


class Replayed:
    """Repeats every read of the runtime on widened inputs outside of autocast."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        read, observe, scores = AttentionRead.read, EncoderSink.observe, measuring.transition_scores
        norms, replayed = measuring.update_norms, self

        def read_again(own: AttentionRead, *args: Any) -> None:
            twin = copy(own)
            read(own, *args)
            with full_precision():
                read(twin, *widened(args))
            for name in ("rows", "means", "key_norms"):
                replayed.compare(getattr(own, name), getattr(twin, name))

        def observe_again(
            own: EncoderSink, module: Any, query: Tensor, key: Tensor, *rest: Any
        ) -> None:
            twin = copy(own)
            twin.attention, twin.keys = {}, {}
            before = {at: len(parts) for at, parts in own.attention.items()}
            observe(own, module, query, key, *rest)
            with full_precision():
                observe(twin, module, upcast(query), upcast(key), *rest)
            for at, parts in twin.attention.items():
                new = own.attention[at][before.get(at, 0) :]
                for got, expected in zip(new, parts, strict=True):
                    replayed.compare(got, expected)

        def scores_again(x: Tensor, y: Tensor, **options: Any) -> Any:
            found = scores(x, y, **options)
            with full_precision():
                exact = scores(upcast(x), upcast(y), **options)
            for got, expected in zip(found, exact, strict=True):
                replayed.compare(got, expected)
            return found

        def norms_again(before: Tensor, behind: Tensor) -> Tensor:
            found = norms(before, behind)
            with full_precision():
                replayed.compare(found, norms(upcast(before), upcast(behind)))
            return found

        monkeypatch.setattr(measuring, "update_norms", norms_again)
        monkeypatch.setattr(AttentionRead, "read", read_again)
        monkeypatch.setattr(EncoderSink, "observe", observe_again)
        monkeypatch.setattr(measuring, "transition_scores", scores_again)

    def compare(self, got: Tensor | None, expected: Tensor | None) -> None:
        """The same, in fp32."""
        assert (got is None) == (expected is None)
        if got is not None and expected is not None:
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
            self.count += 1


SLICES = {decoder.run_neurons.__code__, decoder._first_rows.__code__}
"""Code that runs part of the model's own MLP: as the whole of it, in the model's precision."""


class HalfProducts(TorchDispatchMode):
    """Notes matrix products of half types that code of ours asked for."""

    PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "convolution", "_convolution")

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.PRODUCTS and any(
            isinstance(x, Tensor) and x.dtype in HALVES for x in args
        ):
            self.found |= {caller for caller in [_caller()] if caller is not None}
        return func(*args, **(kwargs or {}))


def _caller() -> str | None:
    """File and line of ours that asked for an operation; None if the model's code did."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if frame.f_code in SLICES:
            return None
        if "/vispress" in path:
            return f"{path}:{frame.f_lineno}"
        if "/transformers/" in path:
            return None
        frame = frame.f_back  # type: ignore[assignment]
    return None


@pytest.mark.parametrize(("family", "method", "way"), cases(15, CASES, turning=WAYS))
def test_a_method_keeps_what_fp32_scores_of_its_signals_keep(
    family: str, method: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compressor = make(family, method)
    noted, replayed = Noted(compressor), Replayed(monkeypatch)
    with in_half(way) as dtype:
        model, inputs = model_of(family, dtype), inputs_of(family, dtype=dtype)
        with compressed(model, noted.watched()), HalfProducts() as seen:
            logits_of(model, inputs)
    noted.assert_exact()
    reads = bool(compressor.signals() & READ) or compressor.cache_evictor() is not None
    assert (replayed.count > 0) == reads
    assert not seen.found


# --- the model computes as it does: training and decoding


@pytest.mark.parametrize(("family", "method"), TRAINED)
def test_gradients_under_autocast_are_those_of_the_masked_model(family: str, method: str) -> None:
    """Within what bf16 resolves; a gradient that is lost on the way would be off by all of it."""
    model, inputs = model_of(family, torch.float32), inputs_of(family, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, got, expected_loss, expected = both(model, inputs, make(family, method))
    assert float(loss) == pytest.approx(float(expected_loss), rel=0.01)
    whole = float(torch.stack([g.norm() for g in expected.values()]).norm())
    for name, gradient in expected.items():
        off = float((got[name] - gradient).norm())
        assert off < max(0.2 * float(gradient.norm()), 1e-3 * whole), name


@pytest.mark.some(cases=2)
@pytest.mark.parametrize(("family", "method"), [*TRAINED[:7], ("llava", "cmai")])
def test_checkpointing_under_autocast_changes_no_gradient(family: str, method: str) -> None:
    model, inputs = build(family, dtype=torch.float32), inputs_of(family, dtype=torch.float32)
    with training(model), compressed(model, make(family, method)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, inputs)
        expected = backward(model, loss)
        for reentrant in (True, False):
            with checkpointing(model, reentrant=reentrant):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = loss_of(model, inputs)
                got = backward(model, loss)
            for name, gradient in expected.items():
                torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-3)


@cache_by_prompts
def static_layers_take_two_dtypes() -> bool:
    """Whether values keep their dtype beside wider keys, as rotary keys under autocast are.

    In transformers 5.17 they do not, and its own generation fails.
    """
    keys, layer = torch.ones(1, 1, 1, 2), StaticLayer(max_cache_len=1)
    layer.lazy_initialization(keys, keys.bfloat16())
    return bool(layer.values.dtype == torch.bfloat16)


STATIC = {"cache_implementation": "static"}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("chain", [("divprune", "fastv"), ("lvlm_csp",), ("flashvlm",)])
def test_generation_under_autocast_is_that_of_the_whole_model_within_bf16(
    family: str, chain: tuple[str, ...]
) -> None:
    model, inputs = model_of(family, torch.float32), inputs_of(family, dtype=torch.float32)
    methods = [make(family, name) for name in chain]
    with compressed(model, methods):
        again, exact = greedy(model, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            found = [greedy(model, inputs)]
            if static_layers_take_two_dtypes():
                found.append(greedy(model, inputs | STATIC))
    for tokens, logits in found:
        assert tokens.shape == again.shape
        assert (logits[:, 0] - exact[:, 0]).abs().mean() < 0.3 * exact[:, 0].std()
    torch.testing.assert_close(found[0][1], found[-1][1])


@pytest.mark.parametrize("chain", [(), ("divprune",), ("fastv",)])
def test_a_static_cache_works_under_autocast_where_it_does_without_us(
    chain: tuple[str, ...],
) -> None:
    model, inputs = model_of("llava", torch.float32), inputs_of("llava", dtype=torch.float32)
    fails = pytest.raises(RuntimeError, match="expected to have the same dtype")
    ends = nullcontext() if static_layers_take_two_dtypes() else fails
    methods = [make("llava", name) for name in chain]
    attached = compressed(model, methods) if methods else nullcontext()
    with attached, torch.autocast("cpu", torch.bfloat16), ends:
        greedy(model, inputs | STATIC)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_projector_computes_under_autocast_as_the_model_has_it(dtype: torch.dtype) -> None:
    model = model_of("llava", torch.float32).model
    inputs = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = projector_function(find_adapter(model))(inputs)
        assert torch.equal(found, model.multi_modal_projector(inputs))


def test_late_steps_of_a_diffusion_model_choose_in_fp32() -> None:
    states = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = LateSteps().select(states, 10)
    assert torch.equal(found, LateSteps().select(states, 10))
