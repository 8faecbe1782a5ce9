"""Visual tokens go through part of what layers compute (`Stage.COMPUTE`), and others through all.

Laws 1 to 16 meet the slices of FFNs with the masked neurons of `oracle.Sliced`.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tests.laws.cases import FAMILIES, greedy, inputs_of, logits_of, model_of, run
from tests.laws.emulated_flash import NAME, emulating
from tests.laws.headless import without_heads
from tests.laws.oracle import Sliced, oracle_forward, oracle_generate, oracle_loss
from tests.laws.test_law10_training import (
    assert_equal,
    checkpointing,
    gradients,
    labels_of,
    loss_of,
    training,
)
from tests.laws.test_law17_parameters import lora
from tests.tiny import build
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vispress import compress_model, compressed
from vispress.errors import ConfigError, UnsupportedModelError
from vispress.methods import LVLMCSP, SCM, VTW, YOPO, DivPrune, FastV
from vispress.methods.compute_pruner import LayerCompute
from vispress.runtime.kv_cache.hf_compat import CACHE

DEPTH = 6
EXACT = 1e-5
NAMES = ("llava", "qwen2_5_vl")


def real_of(inputs: dict[str, Any]) -> Tensor:
    return inputs["attention_mask"].bool()


@pytest.mark.parametrize("family", FAMILIES)
def test_with_nothing_left_out_it_is_the_untouched_model(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    before = logits_of(model, inputs)
    with compressed(model, YOPO(ffn_ratio=1, layer=DEPTH)) as report:
        assert torch.equal(logits_of(model, inputs), before)
        assert report.flops["mac3"].ratio == 1
    with compressed(model, VTW()):
        withdrawn = logits_of(model, inputs)
    with compressed(model, YOPO(ffn_ratio=1)):
        assert torch.equal(logits_of(model, inputs), withdrawn)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("ratio", [2, 3])
@pytest.mark.parametrize("family", NAMES)
def test_every_row_equals_masked_neurons(family: str, ratio: int, padding: str) -> None:
    """All visual tokens stay, so their own rows are compared as well."""
    model, inputs = model_of(family), inputs_of(family, padding)
    found = run(model, inputs, YOPO(ffn_ratio=ratio, layer=DEPTH))
    assert [type(own) for own in found.values.gates.values()] == [Sliced] * DEPTH
    real = real_of(inputs)
    with torch.no_grad():
        expected = oracle_forward(model, inputs, found.alive, values=found.values)
        other = oracle_forward(model, inputs, found.alive)
    assert (found.logits - expected)[real].abs().max() < EXACT
    assert (found.logits - other)[real].abs().max() > 0.1


def flops_of(model: Any, inputs: dict[str, Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        logits_of(model, inputs)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("family", NAMES)
def test_the_slices_are_saved_not_masked(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    config = model.config.get_text_config()
    with compressed(model, YOPO(ffn_ratio=1, layer=DEPTH)):
        whole = flops_of(model, inputs)
    with compressed(model, YOPO(ffn_ratio=4, layer=DEPTH)) as report:
        part = flops_of(model, inputs)
        visual = sum(image.num_visual for sample in report.samples for image in sample.images)
    less = config.intermediate_size - config.intermediate_size // 4
    assert whole - part == DEPTH * 2 * 3 * visual * config.hidden_size * less


def test_the_report_counts_the_slices() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    with compressed(model, YOPO(ffn_ratio=2)) as report:
        logits_of(model, inputs)
        half = report.flops["mac3"].ratio
        assert any(
            "first 1/2 of the FFN neurons of decoder layers 0 to 2" in n for n in report.notes
        )
    assert 0.25 < half < 0.5


@pytest.mark.parametrize("family", NAMES)
def test_projections_that_are_more_than_their_weights_run_whole(family: str) -> None:
    """Adapters in the MLP, and hooks: neurons are left out all the same."""
    model, inputs = build(family, dtype=torch.float64), inputs_of(family)
    method = YOPO(ffn_ratio=2)
    plain = run(model, inputs, method)
    hook = model_mlp(model, 1).up_proj.register_forward_hook(lambda *_: None)
    hooked = run(model, inputs, method)
    hook.remove()
    assert (plain.logits - hooked.logits).abs().max() < EXACT
    wrapped = lora(model, init_lora_weights=False).double().eval()
    with torch.no_grad():
        with compressed(model, method):
            got = wrapped(**inputs).logits
        expected = oracle_forward(model, inputs, plain.alive, values=plain.values)
    real = real_of(inputs) & plain.alive[-1]
    assert (got - expected)[real].abs().max() < EXACT
    assert (got - plain.logits)[real].abs().max() > 0.1


def model_mlp(model: Any, number: int) -> Any:
    return model.model.language_model.layers[number].mlp


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize(
    "chain",
    [
        [DivPrune(keep_ratio=0.4), YOPO(layer=4)],
        [YOPO(layer=DEPTH), LVLMCSP(keep_ratio=0.5)],
    ],
    ids=["pruned before", "bypassed inside"],
)
def test_chains_slice_the_rows_that_a_layer_runs_on(family: str, chain: list[Any]) -> None:
    model, inputs = model_of(family), inputs_of(family)
    found = run(model, inputs, chain, positions="original")
    with torch.no_grad():
        expected = oracle_forward(model, inputs, found.alive, values=found.values)
    last = found.alive[-1] & real_of(inputs)
    assert (found.logits - expected)[last].abs().max() < EXACT
    assert found.values.gates


# --- what is refused


def test_what_cannot_work_is_refused_by_name() -> None:
    model = build("llava")
    neurons = model.config.get_text_config().intermediate_size
    with pytest.raises(ConfigError, match=f"none of the {neurons} neurons"):
        compress_model(model, YOPO(ffn_ratio=neurons + 1))
    with pytest.raises(ConfigError, match="one of a chain can"):
        compress_model(model, [YOPO(layer=DEPTH), YOPO()])
    with pytest.raises(ConfigError, match=r"scm reads decoder layer 1 in a probe"):
        compress_model(model, [SCM(keep_ratio=0.5), YOPO()])
    model_of_experts = build("llava")
    mlp = model_mlp(model_of_experts, 2)
    mlp.experts = mlp.gate_proj
    del mlp.gate_proj
    with pytest.raises(UnsupportedModelError, match=r"layer 2 .* has no gate_proj.*ffn_ratio=1"):
        compress_model(model_of_experts, YOPO())


def test_fewer_neurons_here_than_the_model_has_are_refused() -> None:
    """As tensor parallelism deals them out."""
    model, inputs = build("llava"), inputs_of("llava", dtype=torch.float32)
    mlp = model_mlp(model, 0)
    for name in ("gate_proj", "up_proj"):
        own = getattr(mlp, name)
        own.weight = nn.Parameter(own.weight[: own.out_features // 2])
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, : mlp.down_proj.in_features // 2])
    with compressed(model, YOPO()), pytest.raises(UnsupportedModelError, match="tensor parallel"):
        logits_of(model, inputs)


def test_shares_say_what_part_is_left() -> None:
    assert LayerCompute().ffn_share == 1
    assert LayerCompute(ffn_ratio=4).ffn_share == 0.25


# --- inactive heads

INACTIVE = ((), (0,), (2, 3), (), (0, 1, 3), ())
HEADS = YOPO(layer=DEPTH, inactive_heads=INACTIVE)


def visual_of(report: Any, shape: Any) -> Tensor:
    marks = torch.zeros(shape, dtype=torch.bool)
    for b, sample in enumerate(report.samples):
        for image in sample.images:
            marks[b, list(image.positions)] = True
    return marks


def by_layer(heads: Any = INACTIVE) -> dict[int, Any]:
    return {number: own for number, own in enumerate(heads) if own}


@pytest.mark.some(cases=5)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", NAMES)
def test_inactive_heads_equal_a_layer_that_is_written_out(
    family: str, padding: str, attn: str
) -> None:
    # eager attention of transformers is no number under padding in fp64
    dtype, most = (torch.float32, 1e-3) if attn == "eager" else (torch.float64, EXACT)
    model, inputs = model_of(family, dtype, attn), inputs_of(family, padding, dtype)
    found, real = run(model, inputs, HEADS), real_of(inputs)
    visual = visual_of(found.report, real.shape)
    with torch.no_grad():
        other = oracle_forward(model, inputs, found.alive, values=found.values)
        with without_heads(model, visual, real, dict.fromkeys((1, 2, 4), ())):
            whole = oracle_forward(model, inputs, found.alive, values=found.values)
        with without_heads(model, visual, real, by_layer()):
            expected = oracle_forward(model, inputs, found.alive, values=found.values)
    assert (whole - other)[real].abs().max() < most, "the attention that is written out is another"
    assert (found.logits - expected)[real].abs().max() < most
    assert (found.logits - other)[real].abs().max() > 0.1


@pytest.mark.parametrize("family", NAMES)
def test_heads_that_share_values_are_zeroed_in_one_pass(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    config = model.config.get_text_config()
    size = config.num_attention_heads // config.num_key_value_heads
    heads = ((), tuple(range(size)), (), (), (), ())
    found, real = run(model, inputs, YOPO(layer=4, inactive_heads=heads)), real_of(inputs)
    visual = visual_of(found.report, real.shape)
    with torch.no_grad(), without_heads(model, visual, real, by_layer(heads)):
        expected = oracle_forward(model, inputs, found.alive, values=found.values)
    rows = real & found.alive[-1]
    assert (found.logits - expected)[rows].abs().max() < EXACT


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("family", NAMES)
def test_what_is_decoded_attends_by_all_heads(family: str, cache: bool) -> None:
    model, inputs = model_of(family), inputs_of(family)
    prompt = inputs["input_ids"].shape[1]
    found, real = run(model, inputs, HEADS), real_of(inputs)
    visual = visual_of(found.report, real.shape)
    with compressed(model, HEADS):
        made = model.generate(
            **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=cache,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    got = torch.stack(made.logits, 1)
    with torch.no_grad(), without_heads(model, visual, real, by_layer()):
        tokens, steps = oracle_generate(model, inputs, found.alive, 4, values=found.values)
    assert torch.equal(made.sequences[:, prompt:], tokens)
    assert (got - steps).abs().max() < EXACT


@pytest.mark.parametrize("family", NAMES)
def test_gradients_are_those_of_the_layer_that_is_written_out(family: str) -> None:
    """Answers are taught as they are decoded: their rows attend by all heads."""
    model, inputs = model_of(family), inputs_of(family)
    found, real, labels = run(model, inputs, HEADS), real_of(inputs), labels_of(inputs)
    visual = visual_of(found.report, real.shape)
    for reentrant in (None, False):
        again = nullcontext() if reentrant is None else checkpointing(model, reentrant=reentrant)
        with training(model):
            with compressed(model, HEADS), again:
                loss = loss_of(model, inputs)
                got = gradients(model, loss)
            with without_heads(model, visual, real & (labels == -100), by_layer()):
                wanted = oracle_loss(model, inputs, labels, found.alive, values=found.values)
                expected = gradients(model, wanted)
        assert abs(loss - wanted) < EXACT
        assert_equal(got, expected, 1e-5)


def test_heads_that_cannot_be_told_apart_are_refused() -> None:
    model, inputs = build("llava"), inputs_of("llava", dtype=torch.float32)
    with pytest.raises(ConfigError, match="layer 1 has heads 0 to 3, got inactive head 4"):
        compress_model(model, YOPO(inactive_heads=((), (4,), (), (), (), ())))
    early = YOPO(layer=DEPTH, inactive_heads=INACTIVE)
    with pytest.raises(ConfigError, match="reads the attention of decoder layer 1, where yopo"):
        compress_model(model, [early, FastV(keep_ratio=0.5, layer=2)])
    with compressed(model, early), torch.no_grad():
        cache = model(**inputs).past_key_values
        grown = torch.cat([inputs["attention_mask"]] * 2, 1)
        with pytest.raises(ConfigError, match=r"the KV cache holds .* in one call"):
            model(**(inputs | {"attention_mask": grown, CACHE: cache}))


@pytest.mark.parametrize("family", NAMES)
def test_heads_are_the_same_on_a_static_cache_and_under_flash(family: str) -> None:
    """A static buffer has room behind the prompt; values are all that a kernel is given."""
    model, inputs = model_of(family), inputs_of(family)
    for heads in (HEADS, YOPO(inactive_heads=(*INACTIVE[:2], (0, 1), *INACTIVE[3:]))):
        with compressed(model, heads):
            tokens, steps = greedy(model, inputs, 3)
            found = logits_of(model, inputs)
            static = model.generate(
                **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False,
                cache_implementation="static", disable_compile=True, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        assert torch.equal(static.sequences, tokens)
        assert (torch.stack(static.logits, 1) - steps).abs().max() < EXACT
        other = build(family, dtype=torch.float64)
        other.model.language_model.config._attn_implementation = NAME
        with emulating(), compressed(other, heads):
            got = logits_of(other, inputs)
        assert (got - found)[real_of(inputs)].abs().max() < EXACT
