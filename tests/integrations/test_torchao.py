"""Models whose weights torchao has quantised to int8: encoder, projector, decoder and head.

The oracle is the same quantised model with the dropped tokens masked. Weights alone in int8 change
nothing about the laws: every row meets the same weights, so their fp32 tolerances stay. Activations
in int8 round, and rounding jumps: a last-bit difference in fp32 (sums over fewer keys) sends a
value that lies between two steps to the other one, a difference of 1/127 of the row's largest. So
there the tolerance is what the quantisation itself does, measured on the masked model, no number:

* a scale per token: rows do not know of each other (tested bit for bit), so that rounding is all
  that differs. Pruned and masked differ no more than the masked model differs from itself when
  its embeddings move by a float rounding;
* a scale per tensor: dropped rows take part in the masked model's scale, not in the pruned one's.
  Both are roundings of one model, the masked one with activations left alone; how far that is
  from the masked rounding is measured, and two independent errors of that size differ by sqrt(2)
  of it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from tests.laws import oracle
from tests.laws.cases import (
    Run,
    encoding_as,
    greedy,
    inputs_of,
    logits_of,
    make,
    real_positions,
    run,
)
from tests.laws.oracle import oracle_expand, oracle_forward, oracle_generate
from tests.laws.test_law01_prune_equals_mask import assert_equals_oracle
from tests.laws.test_law03_removal import Snapshot
from tests.laws.test_law07_cache import bytes_of, rows_per_layer, stored
from tests.tiny import build
from torch import Tensor, nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    PerRow,
    PerTensor,
    quantize_,
)
from transformers import AutoModelForImageTextToText, TorchAoConfig

from vispress import compress_model, compressed, remove_compression
from vispress.runtime.kv_cache.hf_compat import cache_of

FP32 = torch.float32
LAW = 1e-3
"""Law 1 in fp32, on logits of scale 20."""

FAMILIES = ("llava", "qwen2_5_vl")
WAYS = ("divprune", "fastv", "visionzip", "zoo_prune", "tome")
"""One method of each way: before the LLM, attention in it, merging, the projector asked anew (all
of these quantised), and merging in the encoder."""

# without torchao's changes to inductor's global settings
KINDS: dict[str, Callable[[], Any]] = {
    "weights": lambda: Int8WeightOnlyConfig(set_inductor_config=False),
    "per_token": lambda: Int8DynamicActivationInt8WeightConfig(
        granularity=PerRow(), set_inductor_config=False
    ),
    "per_tensor": lambda: Int8DynamicActivationInt8WeightConfig(
        granularity=PerTensor(), set_inductor_config=False
    ),
}

cases = pytest.mark.parametrize(
    ("family", "method"), [(family, method) for family in FAMILIES for method in WAYS]
)
kinds = pytest.mark.parametrize("kind", KINDS)


@cache
def quantised(family: str, kind: str) -> Any:
    """One model a family and kind; tests must leave it as they found it."""
    model = build(family, dtype=FP32)
    quantize_(model, KINDS[kind]())
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert linear
    assert all(isinstance(m.weight, Int8Tensor) for m in linear)
    return model


def inputs(family: str) -> dict[str, Any]:
    """Two images and one, a text-only sample, left padding."""
    return inputs_of(family, "left", FP32)


@torch.no_grad()
def masked(family: str, kind: str, result: Run, alive: Sequence[Tensor] | None = None) -> Tensor:
    """The logits that the quantised model gives with these tokens masked."""
    model, given = quantised(family, kind), inputs(family)
    alive = result.alive if alive is None else alive
    with encoding_as(model, result.encoded):
        logits = oracle_forward(model, given, alive, result.positions, result.values)
    return oracle_expand(logits, alive[-1])


@contextmanager
def nudged(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, embeddings are multiplied by 1 +- the rounding of fp32."""
    stack = quantised(family, kind).model.language_model
    generator = torch.Generator().manual_seed(0)

    def nudge(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        embeddings = kwargs["inputs_embeds"]
        signs = torch.randint(2, embeddings.shape, generator=generator) * 2 - 1
        moved = embeddings * (1 + torch.finfo(FP32).eps * signs)
        return args, kwargs | {"inputs_embeds": moved}

    handle = stack.register_forward_pre_hook(nudge, with_kwargs=True)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(oracle, "_check", lambda *_: None)  # it wants a model without hooks
            yield
    finally:
        handle.remove()


def rms(difference: Tensor, family: str, sample: int | None = None) -> float:
    """Root mean square over real positions, of the batch or of one sample."""
    real = inputs(family)["attention_mask"].bool()
    if sample is not None:
        difference, real = difference[sample], real[sample]
    return float(difference[real].pow(2).mean().sqrt())


def one_more(result: Run) -> list[Tensor]:
    """`alive` with one dropped token of sample 0 back in the last layer."""
    image = result.report.samples[0].images[0]
    lost = next(i for i in range(image.num_visual) if i not in image.kept)
    alive = [mask.clone() for mask in result.alive]
    alive[-1][0, image.positions[lost]] = True
    return alive


@cases
def test_int8_weights_law_1_as_without(family: str, method: str) -> None:
    model, given = quantised(family, "weights"), inputs(family)
    result = run(model, given, make(family, method))
    sizes = [i.num_visual for sample in result.report.samples for i in sample.images]
    assert 0 < sum(result.report.visual_per_layer[-1]) < sum(sizes)
    assert_equals_oracle(model, given, result, LAW)
    wrong = masked(family, "weights", result, one_more(result))
    assert rms(result.logits - wrong, family, 0) > 100 * LAW, "the comparison cannot fail"


@cases
def test_int8_weights_every_decode_step(family: str, method: str) -> None:
    model, given = quantised(family, "weights"), inputs(family)
    result = run(model, real_positions(family, given), make(family, method))
    with encoding_as(model, result.encoded):
        tokens, logits = oracle_generate(
            model, given, result.alive, 4, result.positions, result.values
        )
    with compressed(model, make(family, method)):
        sequences, steps = greedy(model, given, 4)
    assert torch.equal(sequences[:, given["input_ids"].shape[1] :], tokens)
    assert (steps - logits).abs().max() < LAW


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scale_per_token_leaves_rows_alone_and_one_per_tensor_does_not(family: str) -> None:
    rows = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0))
    for kind, alone in (("per_token", True), ("per_tensor", False)):
        linear = quantised(family, kind).model.language_model.layers[0].mlp.up_proj
        with torch.no_grad():
            assert torch.equal(linear(rows)[:, 7:20], linear(rows[:, 7:20])) is alone


@cases
def test_int8_activations_per_token_differ_by_rounding(
    family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(quantised(family, "per_token"), inputs(family), make(family, method))
    expected = masked(family, "per_token", result)
    with nudged(family, "per_token", monkeypatch):
        moved = masked(family, "per_token", result)
    allowed = rms(moved - expected, family)
    assert rms(result.logits - expected, family) <= allowed
    wrong = masked(family, "per_token", result, one_more(result))
    assert rms(result.logits - wrong, family, 0) > 2 * allowed, "the comparison cannot fail"


@cases
def test_int8_activations_per_tensor_differ_by_the_quantisation(family: str, method: str) -> None:
    result = run(quantised(family, "per_tensor"), inputs(family), make(family, method))
    expected = masked(family, "per_tensor", result)
    allowed = 2**0.5 * rms(masked(family, "weights", result) - expected, family)
    assert rms(result.logits - expected, family) <= allowed
    wrong = masked(family, "per_tensor", result, one_more(result))
    assert rms(result.logits - wrong, family, 0) > allowed, "the comparison cannot fail"


@kinds
@cases
def test_keeping_all_changes_no_bit(family: str, method: str, kind: str) -> None:
    model, given = quantised(family, kind), inputs(family)
    logits, (sequences, steps) = logits_of(model, given), greedy(model, given, 2)
    with compressed(model, make(family, method, keep_ratio=1.0)):
        assert torch.equal(logits_of(model, given), logits)
        got, got_steps = greedy(model, given, 2)
    assert torch.equal(got, sequences)
    assert torch.equal(got_steps, steps)


@kinds
@cases
def test_generation_is_short_and_removal_leaves_nothing(
    family: str, method: str, kind: str
) -> None:
    model, given = quantised(family, kind), inputs(family)
    logits, names = logits_of(model, given), list(model.state_dict())
    greedy(model, given, 2)
    snapshot = Snapshot(model)
    compressor = make(family, method)
    with compressed(model, compressor) as view:
        with torch.no_grad():
            out = model(**given)
        report = view.report
        sequences, steps = greedy(model, given, 3)
        assert list(model.state_dict()) == names
    first = min(place.layer for place in compressor.placements(report.num_layers))
    rows = rows_per_layer(model, report, first)
    assert stored(cache_of(out)) == rows
    assert report.kv_bytes == bytes_of(rows, len(logits), FP32.itemsize)
    assert rows[-1] < logits.shape[1]
    assert sequences.shape[1] == logits.shape[1] + 3
    assert steps.isfinite().all()
    snapshot.assert_same()
    assert torch.equal(logits_of(model, given), logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_quantising_a_compressed_model_is_the_same(family: str) -> None:
    given, method = inputs(family), make(family, "fastv")
    expected = run(quantised(family, "weights"), given, method).logits
    model = compress_model(build(family, dtype=FP32), method)
    quantize_(model, KINDS["weights"]())
    assert torch.equal(logits_of(model, given), expected)
    remove_compression(model)
    assert torch.equal(logits_of(model, given), logits_of(quantised(family, "weights"), given))


@pytest.mark.parametrize("kind", ["weights", "per_token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_quantises_while_it_loads(family: str, kind: str, tmp_path: Any) -> None:
    build(family, dtype=FP32).save_pretrained(tmp_path / "plain")
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "plain", quantization_config=TorchAoConfig(KINDS[kind]()), dtype=FP32
    )
    assert isinstance(model.model.language_model.layers[0].mlp.up_proj.weight, Int8Tensor)
    given = inputs(family)
    plain = logits_of(model, given)
    with compressed(model, make(family, "fastv")):
        logits, (sequences, _) = logits_of(model, given), greedy(model, given, 2)
        model.save_pretrained(tmp_path / "quantised")
    assert not torch.equal(logits, plain)
    if kind == "weights":
        assert_equals_oracle(model, given, run(model, given, make(family, "fastv")), LAW)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "quantised")
    assert torch.equal(logits_of(again, given), plain)
    with compressed(again, make(family, "fastv")):
        assert torch.equal(logits_of(again, given), logits)
        assert torch.equal(greedy(again, given, 2)[0], sequences)
