"""Rows that bypass a span of layers: generation modes, what is shown outside, what is refused."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from tests.laws.cases import inputs_of, logits_of, make, model_of, run
from tests.laws.masked import masked_model
from tests.laws.test_law09_generation_modes import MODES, generate, oracle_of
from tests.tiny import Image, Sample, Text, make_inputs

from vispress import compress_model, compressed
from vispress.errors import ConfigError
from vispress.methods import FastV
from vispress.methods.base import Compressor
from vispress.runtime.forward.model_call import MODEL_CALLS
from vispress.runtime.hooks.attention import current_sink
from vispress.types import Placement, Stage, TokenPlan, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Middle(Compressor):
    """The first tokens alone run in layers 2 and 3; nothing is dropped."""

    name: ClassVar[str] = "middle"
    summary: ClassVar[str] = "the first tokens in the middle"
    paper: ClassVar[str] = "control"

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        budget = self.budget(num_layers)
        return (Placement(stage=Stage.SKIP, budget=budget, layer=2, until=4),)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        return TokenPlan(keep=torch.arange(num_keep).expand(tokens.batch, -1))


@pytest.mark.parametrize("mode", ["greedy", "beams", "static", "static_beams"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_generation_equals_the_masked_model(family: str, mode: str) -> None:
    model = model_of(family)
    inputs = make_inputs(
        family, [Sample([Text(5), Image(), Text(4)]), Sample([Text(3)])], padding="left"
    )
    for method in (make(family, "lvlm_csp"), Middle(num_tokens=4)):
        result = run(model, inputs, method, positions="original")
        with masked_model(model, oracle_of(result, inputs)):
            plain = {k: v for k, v in MODES[mode].items() if k != "cache_implementation"}
            expected = generate(model, inputs, **plain)
        with compressed(model, method, positions="original"):
            got = generate(model, inputs, **MODES[mode])
        assert torch.equal(got.sequences, expected.sequences)
        difference = torch.stack(got.logits, 1) - torch.stack(expected.logits, 1)
        assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("padding", ["left", "right"])
def test_all_come_back_and_the_report_says_so(padding: str) -> None:
    model, inputs = model_of("llava"), inputs_of("llava", padding)
    with compressed(model, Middle(num_tokens=4)) as report, torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
        visual = report.visual_per_layer
        (image,) = report.samples[0].images
        alive = [report.alive(layer) for layer in range(6)]
    assert [counts[0] for counts in visual] == [36, 36, 4, 4, 36, 36]
    assert (image.num_kept, image.placements[0].num_kept, image.placements[0].until) == (36, 4, 4)
    bypassing = alive[1] & ~alive[2]
    before, _, after = out.hidden_states[2:5]
    assert torch.equal(before[bypassing], after[bypassing])
    ran = alive[2]
    assert (before[ran] != after[ran]).all(-1).any()


def test_an_error_in_the_span_leaves_nothing_behind(monkeypatch: Any) -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    expected = run(model, inputs, Middle(num_tokens=4)).logits

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("in the layer")

    with compressed(model, Middle(num_tokens=4)):
        with monkeypatch.context() as patch:
            patch.setattr(model.model.language_model.layers[2].mlp, "forward", fail)
            with pytest.raises(RuntimeError, match="in the layer"):
                logits_of(model, inputs)
        assert len(MODEL_CALLS.get()) == 0
        assert current_sink() is None
        assert torch.equal(logits_of(model, inputs), expected)


def test_attention_that_some_tokens_bypassed_is_refused() -> None:
    chain = [Middle(num_tokens=4), FastV(keep_ratio=0.5, layer=4)]
    with pytest.raises(ConfigError, match="fastv reads the attention of decoder layer 3, but some"):
        compress_model(model_of("llava"), chain)
    with pytest.raises(ConfigError, match="acts until layer 4"):
        compress_model(model_of("llava"), [chain[0], FastV(keep_ratio=0.5, layer=3)])
    result = run(model_of("llava"), inputs_of("llava"), [chain[0], FastV(keep_ratio=0.5, layer=5)])
    assert result.report.visual_per_layer[-1][0] == 18
