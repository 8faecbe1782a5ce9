"""Visual tokens go through part of what layers compute (`Stage.COMPUTE`), and others through all.

Laws 1 to 16 meet the slices of FFNs with the masked neurons of `oracle.Sliced`.
"""

from typing import Any

import pytest
import torch
from tests.laws.cases import FAMILIES, inputs_of, logits_of, model_of, run
from tests.laws.oracle import Sliced, oracle_forward
from tests.laws.test_law17_parameters import lora
from tests.tiny import build
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vispress import compress_model, compressed
from vispress.errors import ConfigError, UnsupportedModelError
from vispress.methods import LVLMCSP, SCM, VTW, YOPO, DivPrune
from vispress.methods.compute_pruner import LayerCompute

DEPTH = 6
EXACT = 1e-6
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
