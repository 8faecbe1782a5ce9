"""The oracle of gated layers: the plain model with all rows in every layer, masks and the formula.

Nothing of the library's runtime is used, nor of the method: what a router gives, which tokens that
lets run, who sees whom, and what becomes of both kinds of tokens is worked out here.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tests.laws.oracle import generate_positions, language_model, taken_off
from torch import Tensor, nn

Weights = Mapping[int, tuple[Tensor, Tensor]]
"""Layer -> weight `[D]` and bias `[1]` of its router."""


@dataclass(frozen=True)
class Gates:
    """What the plain model is to do.

    Args:
        shares: Of each image, by layer, how much runs.
        weights: Of the routers, one a layer (p-MoD).
        scale: Of the weights of tokens.
        placeholders: Token ids of visual tokens.
        shared: `[2, D]`, of the one router of all layers (gamma-MoD), in place of them: it reads
            what a layer's input norm gives, and leaves tokens that do not run as they are.
    """

    shares: Sequence[float]
    weights: Weights
    scale: float
    placeholders: Sequence[int]
    shared: Tensor | None = None

    def count(self, number: int, tokens: int) -> int:
        """How many of an image's tokens run in a layer."""
        share = self.shares[number]
        if self.shared is not None:  # what does not run is rounded down
            return tokens - int(round(1 - share, 9) * tokens)
        return max(1, int(share * tokens))

    def judge(self, layer: Any, number: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What tokens are ranked by, and their weights."""
        if self.shared is not None:
            logits = layer.input_layernorm(hidden) @ self.shared.to(hidden.dtype).T
            share = torch.exp(logits[..., 1]) / torch.exp(logits).sum(-1)
            return share, share
        weight, bias = (each.to(hidden.dtype) for each in self.weights[number])
        logit = (hidden * weight).sum(-1) + bias
        return logit, 1 + self.scale * torch.tanh(logit)


def images_of(visual: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Sample and positions of each run of visual tokens."""
    for sample, row in enumerate(visual):
        run: list[int] = []
        for place in [*row.nonzero()[:, 0].tolist(), -2]:
            if run and place != run[-1] + 1:
                yield sample, torch.tensor(run)
                run = []
            run.append(place)


@contextmanager
def gated(model: Any, inputs: Mapping[str, Any], gates: Gates, prompt: int) -> Iterator[None]:
    """Inside, each routed layer of a model without a cache does as the formula says.

    Args:
        model: Not compressed.
        inputs: Its arguments, left- or right-padded.
        gates: What it does.
        prompt: Tokens that are not generated: these are routed.
    """
    stack, ids = language_model(model), inputs["input_ids"]
    real = inputs["attention_mask"].bool()
    visual = torch.isin(ids, torch.tensor(gates.placeholders)) & real
    visual[:, prompt:] = False
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    own = torch.eye(ids.shape[1], dtype=torch.bool)
    now: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def starts(number: int) -> Any:
        def hook(layer: nn.Module, args: Any, kwargs: Any) -> Any:
            hidden, runs = args[0], real.clone()
            factor = torch.ones(hidden.shape[:2], dtype=hidden.dtype)
            if gates.shares[number] < 1:
                logit, own_factor = gates.judge(layer, number, hidden)
                factor = torch.where(visual, own_factor, factor)
                for sample, places in images_of(visual):
                    count = gates.count(number, len(places))
                    order = logit[sample, places].argsort(descending=True)
                    runs[sample, places[order[count:]]] = False
            now[number] = hidden, factor, runs
            mask = (causal & runs[:, None]) | (own & ~runs[:, :, None])
            return args, kwargs | {"attention_mask": mask[:, None]}

        return hook

    def branch(number: int) -> Any:
        return lambda _, args, out: out * now[number][1][..., None]

    def ends(number: int) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> Any:
            hidden, factor, runs = now[number]
            out = output[0] if isinstance(output, tuple) else output
            still = hidden if gates.shared is not None else hidden * factor[..., None]
            out = torch.where(runs[..., None], out, still)
            return (out, *output[1:]) if isinstance(output, tuple) else out

        return hook

    handles = []
    for number, layer in enumerate(stack.layers):
        handles.append(layer.register_forward_pre_hook(starts(number), with_kwargs=True))
        handles.append(layer.mlp.register_forward_hook(branch(number)))
        handles.append(layer.register_forward_hook(ends(number)))
    with taken_off(model, handles):
        yield


def gated_logits(model: Any, inputs: Mapping[str, Any], gates: Gates) -> Tensor:
    """Logits of every row (differentiable)."""
    with gated(model, inputs, gates, inputs["input_ids"].shape[1]):
        return model(**{**inputs, "use_cache": False}).logits  # type: ignore[no-any-return]


@torch.no_grad()
def gated_steps(model: Any, inputs: Mapping[str, Any], gates: Gates, tokens: Tensor) -> Tensor:
    """Logits that each of some generated tokens `[B, T]` is chosen from, all computed anew."""
    prompt, ids = inputs["input_ids"].shape[1], inputs["input_ids"]
    more = torch.ones_like(tokens[:, :-1])
    grown = dict(inputs) | {
        "input_ids": torch.cat([ids, tokens[:, :-1]], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], more], 1),
    }
    if "mm_token_type_ids" in inputs:
        kinds = inputs["mm_token_type_ids"]
        grown["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(more).to(kinds)], 1)
    grown["position_ids"] = generate_positions(model, grown, prompt)
    with gated(model, grown, gates, prompt):
        logits: Tensor = model(**{**grown, "use_cache": False}).logits
    return logits[:, prompt - 1 :]
