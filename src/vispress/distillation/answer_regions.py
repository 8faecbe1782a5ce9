"""SD-RPN's lesson: cells that the model looks at while it answers, and cells that it does not.

Reconstructed where the authors' choices belong to their models: attention is that of the three
heads that look at the fewest tokens (they list a few heads of each model, by hand), in the rows
that say the answer's words; sinks are tokens of three times the median norm (they have thresholds).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vispress.adapters.base import find_adapter
from vispress.api import compress_model, remove_compression
from vispress.bench.model.loaded_model import LoadedModel
from vispress.bench.tasks.task import Prompt
from vispress.distillation.distil import Curve, learn
from vispress.distillation.lessons import Lesson, Pupil
from vispress.distillation.own_answers import IGNORED, answered, with_answers
from vispress.distillation.targets import listening
from vispress.errors import ConfigError
from vispress.methods._parts.geometry.coordinates import coordinates, geometry_of
from vispress.methods.base import Compressor, upcast
from vispress.types import Placement, Signal, TokenPlan, VisualTokens, full_index

FOREGROUND, BACKGROUND = 0.2, 0.1
"""Of the highest attention: above, and below outside of the box."""
LARGEST = 0.5
"""Share of the image from which on a box says nothing."""
SINK = 3.0
"""Times the median norm."""
HEADS, SOME = 3, 64
"""How many heads are asked, and how many prompts choose them."""
Head = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Region:
    """One image that was asked about, on the host.

    Args:
        features: `[N, D]`, normalised hidden states of its tokens in front of the layer.
        asking: `[D]`, that of the last prompt token.
        target: `[N]` fp32: 1 foreground, 0 background, -100 neither.
    """

    features: Float[Tensor, "N D"]
    asking: Float[Tensor, "D"]
    target: Float[Tensor, "N"]


@dataclass(eq=False)
class Looked:
    """What one forward over an answer showed of its image.

    Args:
        tokens: In front of the layer.
        features: `[N, D]`, the same behind the layer's norm.
        asking: `[D]`, the last prompt token's state behind it.
        attention: By decoder layer, `[H, N]`: what the rows that say the answer attend to, a mean.
    """

    tokens: VisualTokens | None = None
    features: Tensor | None = None
    asking: Tensor | None = None
    attention: dict[int, Tensor] = field(default_factory=dict)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerListener(Compressor):
    """Looks at states before one layer, and at what an answer attends to; keeps everything.

    Args:
        layer: Before which states are read, from 1 on.
        read: Layers whose attention is read; none is the last.
        said: Words of the answer, which end the prompt but for what ends them.
        looked: What was found.
    """

    name: ClassVar[str] = "region_targets"
    summary: ClassVar[str] = "everything"
    paper: ClassVar[str] = "none"
    takes_budget: ClassVar[bool] = False
    reads: ClassVar[frozenset[Signal]] = frozenset(
        {
            Signal.TEXT_STATES, Signal.INPUT_NORM, Signal.QUERY_ATTENTION, Signal.DEPTH,
            Signal.GRID, Signal.CROPS,
        }
    )  # fmt: skip

    layer: int
    read: tuple[int, ...]
    said: int
    looked: Looked = field(default_factory=Looked)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return listening((self.layer,), self.read)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        assert tokens.depth is not None
        assert tokens.text_states is not None
        assert tokens.input_norm is not None
        behind, looked = tokens.depth[0], self.looked
        last = tokens.text_states.shape[1] - self.said - 2
        if last >= 0 and behind == self.layer:  # a word of the prompt stands behind the image
            looked.tokens = tokens
            looked.features = tokens.input_norm(upcast(tokens.features))[0].cpu()
            looked.asking = tokens.input_norm(upcast(tokens.text_states[0, last])).cpu()
        if last >= 0 and behind - 1 in self.read:
            assert tokens.query_attention is not None  # declared in `reads`
            rows = upcast(tokens.query_attention)[0, :, last : last + self.said]
            looked.attention[behind - 1] = rows.mean(dim=1).cpu()
        return TokenPlan(keep=full_index(tokens.batch, tokens.num_visual, tokens.features.device))


def look(
    loaded: LoadedModel, prompts: Iterable[Prompt], layer: int, read: tuple[int, ...]
) -> Iterator[Looked]:
    """Show a model its own answers, one by one; images without words behind them are left out.

    Args:
        loaded: The model, uncompressed; it stays as it is.
        prompts: With one picture each, and the model's own answer.
        layer: Before which states are read.
        read: Layers whose attention is read.
    """
    for prompt in prompts:
        inputs: dict[str, Any] = with_answers(loaded, [prompt])
        said = int((inputs.pop("labels") != IGNORED).sum()) - 1  # without what ends it
        listener = AnswerListener(layer=layer, read=read, said=said)
        compress_model(loaded.model, listener)
        try:
            with torch.no_grad():
                loaded.model(**inputs, use_cache=False)
        finally:
            remove_compression(loaded.model)
        if listener.looked.tokens is not None:
            yield listener.looked


def sharpest_heads(loaded: LoadedModel, prompts: Sequence[Prompt]) -> tuple[Head, ...]:
    """Choose the heads whose attention to an image is spread over the fewest tokens.

    Measured is the perplexity of its shares as a part of all tokens, a mean over prompts.

    Args:
        loaded: The model, uncompressed; it stays as it is.
        prompts: With one picture each, and the model's own answer; some are enough.

    Raises:
        ConfigError: No prompt has words behind its picture.
    """
    layers = tuple(range(len(find_adapter(loaded.model).decoder_layers) - 1))
    spread: dict[Head, float] = {}
    for looked in look(loaded, prompts, 1, layers):
        for layer, attention in looked.attention.items():
            shares = attention / attention.sum(dim=1, keepdim=True).clamp(min=1e-30)
            entropy = -(shares * shares.clamp(min=1e-30).log()).sum(dim=1)
            for head, width in enumerate((entropy.exp() / shares.shape[1]).tolist()):
                spread[layer, head] = spread.get((layer, head), 0.0) + width
    if not spread:
        raise ConfigError("regions want a question behind a picture, and no prompt has one")
    return tuple(sorted(sorted(spread, key=lambda one: (spread[one], one))[:HEADS]))


def marks(tokens: VisualTokens, attention: Float[Tensor, "B N"]) -> list[Float[Tensor, "N"] | None]:
    """Mark foreground (1), background (0) and what is neither (-100) in each image, on the host.

    Sinks count for nothing. Foreground is above a share of the highest attention; background lies
    outside of the box around the foreground of its sub-image, and below another. None where the
    boxes are too large to say anything.

    Args:
        tokens: Whole images.
        attention: That each token receives.
    """
    size = upcast(tokens.features).norm(dim=-1)
    sink = size > SINK * size.median(dim=1, keepdim=True).values
    segment, row, col = coordinates(geometry_of(tokens))
    found: list[Float[Tensor, "N"] | None] = []
    for own in attention.masked_fill(sink, 0.0).cpu():
        high = own.max()
        front = own > FOREGROUND * high
        boxed = torch.zeros_like(front)
        for part in sorted(set(segment[front].tolist())):
            inside = segment == part
            for at in (row, col):
                low, top = at[front & (segment == part)].aminmax()
                inside &= (at >= low) & (at <= top)
            boxed |= inside
        if not high > 0 or float(boxed.float().mean()) >= LARGEST:
            found.append(None)
            continue
        target = torch.full(own.shape, float(IGNORED))
        target[~boxed & (own < BACKGROUND * high)] = 0.0
        target[front] = 1.0
        found.append(target)
    return found


def find_regions(
    loaded: LoadedModel, prompts: Iterable[Prompt], layer: int, heads: tuple[Head, ...]
) -> Iterator[Region]:
    """Show a model its own answers, and give each image with the region that they looked at.

    Args:
        loaded: The model, uncompressed; it stays as it is.
        prompts: With one picture each, and the model's own answer.
        layer: Before which states are read.
        heads: Whose attention marks a region, by layer and number.
    """
    read = tuple(sorted({number for number, _ in heads}))
    for looked in look(loaded, prompts, layer, read):
        assert looked.tokens is not None
        assert looked.features is not None
        assert looked.asking is not None
        attention = torch.stack([looked.attention[number][head] for number, head in heads])
        (target,) = marks(looked.tokens, attention.mean(dim=0, keepdim=True))
        if target is not None:
            yield Region(looked.features, looked.asking, target)


def region_loss(module: nn.Module, batch: Sequence[Region]) -> Tensor:
    """Average the binary cross-entropy of logits over marked cells, in nats.

    Args:
        module: Called with features `[B, N, D]` and what asks `[B, D]`.
        batch: Images of one size.
    """
    device = next(module.parameters()).device
    features = torch.stack([one.features for one in batch]).to(device)
    logits: Tensor = module(features, torch.stack([one.asking for one in batch]).to(device))
    target = torch.stack([one.target for one in batch]).to(logits)
    marked = target != IGNORED
    return nn.functional.binary_cross_entropy_with_logits(logits[marked], target[marked])


def teach(pupil: Pupil) -> Curve:
    """Find regions by the model's own answers, then move the head towards them."""
    depth = len(find_adapter(pupil.loaded.model).decoder_layers)
    layer = pupil.method.placements(depth)[0].layer
    advance, size = pupil.begin("answers", pupil.samples), pupil.batch_size
    own = list(answered(pupil.loaded, pupil.prompts, right=False, batch_size=size, advance=advance))
    heads = sharpest_heads(pupil.loaded, own[:SOME])
    heard = list(find_regions(pupil.loaded, own, layer, heads))
    return learn(pupil, heard, region_loss)


LESSONS = (
    Lesson(
        "sd_rpn", "regions", teach, "cross-entropy of cells in and out of regions",
        samples=1200, steps=200, lr=1e-3,
    ),
)  # fmt: skip
