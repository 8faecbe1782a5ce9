"""CoViPAL's first stage: what a deeper layer attends to, from hidden states before some layers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vispress.adapters.base import find_adapter
from vispress.bench.model.loaded_model import LoadedModel
from vispress.bench.tasks.task import Prompt
from vispress.budget import Budget
from vispress.distillation.distil import Curve, learn, padded
from vispress.distillation.lessons import Advance, Lesson, Pupil
from vispress.distillation.targets import listening, show
from vispress.errors import ConfigError
from vispress.methods.base import Compressor, top_indices, upcast
from vispress.types import Placement, Signal, TokenPlan, VisualTokens, full_index

Label = Literal["members", "shares"]


@dataclass(frozen=True, eq=False)
class LayersHeard:
    """One image at several depths, and what was asked about it, on the host.

    Args:
        states: By decoder layer, what enters it: of visual tokens `[N, D]` and of the text behind
            them `[T, D]`, T > 0, in the model's dtype.
        target: `[N]` fp32, share of a deeper layer's attention; they add up to 1.
    """

    states: Mapping[int, tuple[Float[Tensor, "N D"], Float[Tensor, "T D"]]]
    target: Float[Tensor, "N"]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class StateListener(Compressor):
    """Looks at hidden states before some layers and at one layer's attention; keeps everything.

    Args:
        before: Decoder layers, ascending, from 1 on.
        read: The layer whose attention is read, not the last.
        notes: By layer, bucket by bucket: states, and `[B, N]` attention under -1.
    """

    name: ClassVar[str] = "layer_targets"
    summary: ClassVar[str] = "everything"
    paper: ClassVar[str] = "none"
    takes_budget: ClassVar[bool] = False
    reads: ClassVar[frozenset[Signal]] = frozenset(
        {Signal.TEXT_STATES, Signal.QUERY_ATTENTION, Signal.DEPTH}
    )

    before: tuple[int, ...]
    read: int
    notes: dict[int, list[Any]] = field(default_factory=dict)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return listening(self.before, (self.read,))

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        assert tokens.depth is not None
        assert tokens.text_states is not None
        layer, device = tokens.depth[0], tokens.features.device
        if layer in self.before:
            pair = tokens.features.cpu(), tokens.text_states.cpu()
            self.notes.setdefault(layer, []).append(pair)
        if layer == self.read + 1:
            assert tokens.query_attention is not None  # declared in `reads`
            rows = upcast(tokens.query_attention).sum(dim=(1, 2))
            self.notes.setdefault(-1, []).append(rows.cpu())
        return TokenPlan(keep=full_index(tokens.batch, tokens.num_visual, device))


def guide_layer(num_layers: int, last: int) -> int:
    """Choose the layer whose attention is the target: two thirds down, not above what prunes.

    Args:
        num_layers: Of the model.
        last: The deepest layer that is pruned before.

    Raises:
        ConfigError: None is left, as attention is read below the last layer.
    """
    found = max(2 * num_layers // 3, last)
    if min(found, num_layers - 2) < last:
        raise ConfigError(
            f"the target is the attention of layer {last} or a deeper one, below the last of "
            f"{num_layers}; prune earlier"
        )
    return min(found, num_layers - 2)


def listen_at(
    loaded: LoadedModel,
    prompts: Iterable[Prompt],
    layers: Sequence[int],
    *,
    batch_size: int = 8,
    advance: Advance | None = None,
) -> Iterator[LayersHeard]:
    """Show prompts to a model, and give each image's states with what a deeper layer attends to.

    The target is that layer's attention from the words behind the image, summed over heads and
    words, scaled to 1 over the image. Images without words behind them are left out.

    Args:
        loaded: The model, uncompressed; it stays as it is.
        prompts: With pictures; read batch by batch.
        layers: Decoder layers whose input is kept, ascending.
        batch_size: Prompts of a batch.
        advance: Told how many prompts were shown.

    Raises:
        CompressionStateError: The model is compressed.
        ConfigError: No layer's attention is left to be read.
    """
    depth = len(find_adapter(loaded.model).decoder_layers)
    listener = StateListener(before=tuple(layers), read=guide_layer(depth, layers[-1]))
    for _ in show(loaded, prompts, listener, batch_size=batch_size, advance=advance):
        attention = listener.notes.pop(-1, [])
        for number, target in enumerate(attention):
            states = {layer: listener.notes[layer][number] for layer in layers}
            for row, mass in enumerate(target.sum(dim=1).tolist()):
                if mass > 0:
                    own = {k: (x[row].clone(), t[row].clone()) for k, (x, t) in states.items()}
                    yield LayersHeard(own, target[row] / mass)
        listener.notes.clear()


def layer_loss(
    budgets: Mapping[int, Budget],
    label: Label,
    module: nn.Module,
    batch: Sequence[LayersHeard],
) -> Tensor:
    """Average over layers how far scores are from attention.

    Args:
        budgets: Of the pruning layers.
        label: `"members"`: binary cross-entropy of each score as a logit against being among the
            most attended that the budget keeps. `"shares"`: divergence of the softmax from the
            shares.
        module: Called with a layer, features, text and `valid [B, T]`.
        batch: Images of one size.
    """
    device = next(module.parameters()).device
    target = torch.stack([one.target for one in batch]).to(device)
    losses = []
    for layer, budget in budgets.items():
        text, valid = padded([one.states[layer][1] for one in batch], device)
        features = torch.stack([one.states[layer][0] for one in batch]).to(device)
        score: Tensor = module(layer, features, text, valid)
        if label == "shares":
            kl = nn.functional.kl_div(
                score.log_softmax(-1), target.to(score), reduction="batchmean"
            )
            losses.append(kl)
            continue
        best = top_indices(target, budget.resolve(target.shape[1]))
        members = torch.zeros_like(score).scatter(1, best, 1.0)
        losses.append(nn.functional.binary_cross_entropy_with_logits(score, members))
    return torch.stack(losses).mean()


def teach(label: Label, pupil: Pupil) -> Curve:
    """Listen to the model, then move scores towards what was heard."""
    depth = len(find_adapter(pupil.loaded.model).decoder_layers)
    budgets = {one.layer: one.budget for one in pupil.method.placements(depth)}
    advance = pupil.begin("attention", pupil.samples)
    size = pupil.batch_size
    heard = list(
        listen_at(pupil.loaded, pupil.prompts, list(budgets), batch_size=size, advance=advance)
    )
    return learn(pupil, heard, partial(layer_loss, budgets, label))


_SIZES: dict[str, Any] = {"samples": 1200, "steps": 200, "lr": 1e-3}
"""States of every layer are kept: fewer prompts."""
LESSONS = (
    Lesson(
        "covipal", "attention", partial(teach, "members"),
        "cross-entropy against what a deeper layer attends to", **_SIZES,
    ),
    Lesson(
        "covipal", "attention-shares", partial(teach, "shares"),
        "divergence from a deeper layer's attention", **_SIZES,
    ),
)  # fmt: skip
