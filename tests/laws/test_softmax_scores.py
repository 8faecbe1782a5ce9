"""Scores of layers with sinks or soft caps: the rows that methods read are the model's own."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from tests.laws.cases import Spy
from tests.laws.windows import windowed
from tests.tiny import Image, Sample, Text, build, cache_by_prompts, make_inputs
from torch import Tensor

from vispress import compressed
from vispress.methods.base import Compressor
from vispress.runtime.hooks.attention import Softmax, attention_rows
from vispress.types import Placement, Queries, Signal, Stage, TokenPlan, VisualTokens

SAMPLES = [Sample([Text(5), Image(4, 4), Text(7)])]
IMAGE, TEXT = slice(5, 41), slice(41, 48)
SOFT: dict[str, dict[str, Any]] = {
    "gpt_oss": {},
    "gemma2": {
        "model_type": "gemma2",
        "attn_logit_softcapping": 1.5,
        "query_pre_attn_scalar": 16,
        "sliding_window": 20,
    },
}


@dataclass(frozen=True, kw_only=True)
class Reader(Compressor):
    """Keeps the first tokens and is shown attention."""

    name: ClassVar[str] = "reader"
    summary: ClassVar[str] = "is shown attention"
    paper: ClassVar[str] = "control"
    reads: ClassVar[frozenset[Signal]] = frozenset({Signal.QUERY_ATTENTION, Signal.MEAN_ATTENTION})

    layer: int = 2
    queries: Queries = Queries.LAST
    ahead: bool = False

    def signals(self) -> frozenset[Signal]:
        return self.reads if self.queries is Queries.TEXT_AFTER else self.reads - MEANS

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (
            Placement(
                stage=Stage.IN_LLM,
                budget=self.budget(num_layers),
                layer=self.layer,
                queries=self.queries,
                attention_of="next" if self.ahead else "previous",
            ),
        )

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        return TokenPlan(keep=torch.arange(num_keep).expand(tokens.batch, -1))


MEANS = frozenset({Signal.MEAN_ATTENTION})


@cache_by_prompts
def model_of(name: str) -> Any:
    if name == "gpt_oss":
        return windowed(name, 20)
    return build("llava", attn="eager", text=SOFT[name])


def seen_by(model: Any, method: Compressor) -> tuple[Any, list[Tensor]]:
    """What the method is shown, and the untouched model's attention by layer."""
    inputs, spy = make_inputs("llava", SAMPLES), Spy()
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True, use_cache=False).attentions
        with compressed(model, spy.watch(method)):
            model(**inputs)
    return spy.seen[0][0], list(weights)


@pytest.mark.parametrize("ahead", [False, True], ids=["previous", "next"])
@pytest.mark.parametrize("layer", [1, 2])  # behind a sliding layer, behind a full one
@pytest.mark.parametrize(
    "queries", [Queries.LAST, Queries.LAST_FOUR, Queries.TEXT_AFTER, Queries.ALL]
)
@pytest.mark.parametrize("name", SOFT)
def test_rows_are_the_models(name: str, queries: Queries, layer: int, ahead: bool) -> None:
    method = Reader(keep_ratio=0.5, layer=layer, queries=queries, ahead=ahead)
    tokens, weights = seen_by(model_of(name), method)
    own = weights[layer if ahead else layer - 1]
    expected = {
        Queries.LAST: own[:, :, -1:, IMAGE],
        Queries.LAST_FOUR: own[:, :, -4:, IMAGE],
        Queries.TEXT_AFTER: own[:, :, TEXT, IMAGE],
        Queries.ALL: own[..., IMAGE].mean(dim=2, keepdim=True),
    }[queries]
    assert tokens.query_attention.shape == expected.shape
    assert (tokens.query_attention - expected).abs().max() < 1e-6  # tables of the model are fp32
    if queries is Queries.TEXT_AFTER:
        means = expected.mean(dim=(1, 2))
        assert (tokens.mean_attention - means).abs().max() < 1e-6


def test_a_sink_takes_its_share() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, n, 5, 8, generator=generator).double() for n in (4, 2))
    sinks = torch.randn(4, generator=generator).double()
    allowed = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    allowed[1, :, 0] = False  # a row of padding
    for softcap in (None, 0.7):
        logits = q @ k.repeat_interleave(2, dim=1).mT * 0.3
        logits = logits if softcap is None else (logits / softcap).tanh() * softcap
        logits = logits.masked_fill(~allowed, float("-inf"))
        column = sinks.view(1, 4, 1, 1).expand(2, 4, 5, 1)
        expected = torch.cat([logits, column], dim=-1).softmax(-1)[..., :-1]
        found = attention_rows(q, k, allowed, Softmax(0.3, softcap, sinks))
        assert (found - expected).abs().max() < 1e-14
        assert not found[1, :, 0].any()


def test_huge_sinks_and_logits_stay_finite() -> None:
    q = torch.full((1, 2, 1, 4), 1e4)
    found = attention_rows(
        q, q.expand(1, 2, 1, 4), None, Softmax(1.0, None, torch.tensor([4e8, -4e8]))
    )
    assert found.flatten().tolist() == [0.5, 1.0]
