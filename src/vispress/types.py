"""The values that methods, adapters and the runtime exchange. Tensors only, no models."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vispress.context import Context
from vispress.crop_layout import CropLayout as CropLayout
from vispress.errors import BudgetError
from vispress.kinds import ATTENTION_SIGNALS, CLS_SIGNALS, Need, Positions, Queries, Signal, Stage
from vispress.memory import Memory
from vispress.module_shape import ModuleShape
from vispress.placement import Placement
from vispress.projectors import PatchNorm, TwoLayer
from vispress_kernels import Backend

__all__ = [
    "ATTENTION_SIGNALS",
    "CLS_SIGNALS",
    "CropLayout",
    "Memory",
    "ModuleShape",
    "Need",
    "PatchNorm",
    "Placement",
    "Positions",
    "Queries",
    "Signal",
    "Stage",
    "TokenPlan",
    "Transition",
    "TwoLayer",
    "VisualTokens",
    "full_index",
]


@dataclass(frozen=True, kw_only=True)
class Transition:
    """What one decoder layer did to its rows, for its attention (0) and MLP (1) module.

    `x` is the module's normalised input, `y` its output before the residual addition.

    Args:
        layer: Decoder layer.
        magnitude: `[B, 2, N]` fp32, `|y| / |x|` of the visual tokens.
        cosine: `[B, 2, N]` fp32, `cos(x, y)` of the visual tokens.
        sequence_cosine: `[B, 2, L]` fp32, the same for every row of the sequence in that layer.
        sequence_valid: `[B, L]` bool, False on padding.
    """

    layer: int
    magnitude: Float[Tensor, "B 2 N"]
    cosine: Float[Tensor, "B 2 N"]
    sequence_cosine: Float[Tensor, "B 2 L"]
    sequence_valid: Bool[Tensor, "B L"]


@dataclass(frozen=True, kw_only=True)
class VisualTokens:
    """A bucket of images (or videos) with equal N and geometry; no padding, one row an image.

    Signals are `None` unless the compressor declares them. Attention is post-softmax over all keys
    of its layer (text and [CLS] included), so rows over visual tokens do not sum to 1.

    Args:
        features: `[B, N, D]`; projected tokens (PRE_LLM) or hidden states (IN_LLM), model dtype.
        index: `[B, N]` int64 ascending; place of each token in the image's original raster.
        num_original: Tokens the image had at the start (N0); equals N unless pruned before.
        cls_attention: `[B, H, N]`, [CLS] row of the encoder layer that gives the features; or
            `[B, E, H, N]` when `Compressor.encoder_layers` asks for E != 1 layers, in its order.
        cls_logits: As `cls_attention`, scaled but before the softmax.
        cls_wide_attention: As `cls_attention`, with all heads as one of full width: H = 1.
        column_attention: As `cls_attention`, with the mean over query rows in place of the [CLS]
            row.
        patch_attention: As `cls_attention`, with the mean over the other patches in place of the
            [CLS] row: neither a token's own row nor [CLS]'s.
        vision_keys: `[B, Hv, N, Dh]`, keys of the (last) encoder layer that is asked for.
        vision_features: `[B, N, Dv]`, input of the projector for each token.
        encoder_groups: `[B, N]` int64; equal for tokens that left the encoder as one.
        projector: Maps `[..., N, Dv]` to `[..., N, D]`.
        two_layer: The projector's weights, where it is a two-layer MLP, behind a norm or not; comes
            with `projector`.
        text_embeddings: `[B, T, D]`, input embeddings of the sample's valid text tokens.
        input_embeddings: `[B, N0, D]`, all the image's tokens as they were before any compressor.
        text_after: How many of them stand behind the image: the last ones; 0 when not read.
        query_attention: `[B, H, Q, N]` fp32, rows as `Placement.queries` says; or `[B, E, H, Q,
            N]`, earliest layer first, for an `attention_depth` of E > 1.
        mean_attention: `[B, N]` fp32; mean of `query_attention` over heads and rows, which are
            never held together.
        key_norms: `[B, N + S]` fp32; L1 norm over all heads of the (post-RoPE) keys of the layer
            whose attention the placement reads: visual tokens, then the text behind the image.
        rotary_prior: `[B, Q, N]` fp32; scaled logits that queries and keys of ones would have in
            the layer of `query_attention`, at the places of its rows and of the visual tokens.
        text_states: `[B, S, D]`, hidden states of the text behind the image, as `features`.
        final_norm: The LLM's norm behind its last layer; maps `[..., D]` to `[..., D]`.
        input_norm: The norm in front of the attention of the layer that the placement acts before.
        transition: One entry a measured layer so far, ascending.
        update_norm: `[B, N]` fp32; L2 norm of what the decoder layer in front of the placement
            added to each token's hidden state. None before the LLM.
        grid: `(t, h, w)` when the N0 original tokens are a plain raster, else None.
        crops: Geometry when they are not.
        image_count: Images in the sample that each bucket row belongs to, `[B]` int64.
        image_number: Place of each row's image among them, from 0; `[B]` int64 on the host.
        padding: `[B, N]` fp32; share of each token's patch that is padding, in `[0, 1]`. None also
            where the family pads no images.
        num_entered: Tokens that reached the compressor's first placement; None: all N0. Fewer are
            left only at its later placements.
        context: Means of what surrounds each image in its prompt.
        depth: Decoder layer that the placement acts before, and how many the LLM has.
        memory: What the compressor's placement before left for each row; empty at its first one.
        views: The bucket as each of `Compressor.views` sees it; then signals are there alone.
        module: Calls what `Compressor.make_module` made, wherever it is by now.
        training: Whether gradients flow in this call, so that `TokenPlan.soft` is looked at.
        backend: Kernels that the user asked for; methods hand it to `vispress_kernels`.
    """

    features: Float[Tensor, "B N D"]
    index: Int[Tensor, "B N"]
    num_original: int
    cls_attention: Float[Tensor, "B *EH N"] | None = None
    cls_logits: Float[Tensor, "B *EH N"] | None = None
    cls_wide_attention: Float[Tensor, "B *EW N"] | None = None
    column_attention: Float[Tensor, "B *EH N"] | None = None
    patch_attention: Float[Tensor, "B *EH N"] | None = None
    vision_keys: Float[Tensor, "B Hv N Dh"] | None = None
    vision_features: Float[Tensor, "B N Dv"] | None = None
    encoder_groups: Int[Tensor, "B N"] | None = None
    projector: Callable[[Tensor], Tensor] | None = None
    two_layer: TwoLayer | None = None
    text_embeddings: Float[Tensor, "B T D"] | None = None
    text_after: int = 0
    input_embeddings: Float[Tensor, "B N0 D"] | None = None
    query_attention: Float[Tensor, "B *LH Q N"] | None = None
    mean_attention: Float[Tensor, "B N"] | None = None
    key_norms: Float[Tensor, "B NT"] | None = None
    rotary_prior: Float[Tensor, "B Q N"] | None = None
    text_states: Float[Tensor, "B S D"] | None = None
    final_norm: Callable[[Tensor], Tensor] | None = None
    input_norm: Callable[[Tensor], Tensor] | None = None
    transition: tuple[Transition, ...] | None = None
    update_norm: Float[Tensor, "B N"] | None = None
    grid: tuple[int, int, int] | None = None
    crops: CropLayout | None = None
    image_count: Int[Tensor, "B"] | None = None
    image_number: Int[Tensor, "B"] | None = None
    padding: Float[Tensor, "B N"] | None = None
    num_entered: int | None = None
    context: Context | None = None
    depth: tuple[int, int] | None = None
    memory: tuple[Memory, ...] = ()
    views: tuple["VisualTokens", ...] = ()
    module: Callable[..., Any] | None = None
    training: bool = False
    backend: Backend = "auto"

    @property
    def batch(self) -> int:
        """Images in the bucket."""
        return self.features.shape[0]

    @property
    def num_visual(self) -> int:
        """Tokens of each image now (N)."""
        return self.features.shape[1]

    @property
    def segmented(self) -> bool:
        """Whether the image is composed of sub-images or frames."""
        return self.crops is not None or (self.grid is not None and self.grid[0] > 1)

    def segments(self) -> Int[Tensor, "B N"]:
        """Sub-image or frame of each token (-1: newline), on the host; 0 for a plain image.

        Synchronises only for images that were pruned before.
        """
        if self.crops is not None:
            places = self.crops.segment
        else:
            size = self.num_original if self.grid is None else self.grid[1] * self.grid[2]
            places = torch.arange(self.num_original) // size
        if self.num_visual == self.num_original:
            return places.expand(self.batch, -1)
        return places[self.index.cpu()]


@dataclass(frozen=True, kw_only=True)
class TokenPlan:
    """What to keep of each image, and what becomes of the rest.

    Args:
        keep: `[B, K]` int64 into N, strictly ascending; or, from adaptive methods, one `[K_b]` an
            image.
        assign: `[B, N]` int64; which kept slot (0..K-1) each token is folded into, -1 for none.
            Survivors that keep themselves must name their own slot.
        weight: `[B, N]` float; a slot's new value is the sum of weight * value over its tokens.
        merge_on: What is merged: the tokens themselves, or the projector's input (then projected;
            a slot of one token keeps it as it is).
        features: `[B, K, D]`; values that take the kept places (in place of merging).
        memory: One for each image, handed back at the method's next placement; none: what was left
            before stays.
        gate: `[B, N]` in at least fp32, at SKIP placements of a method that `gates`: factor on what
            the MLP adds to a token that runs (differentiable).
        losses: By name, `[B]`: what each image adds to a training loss (`compression_loss`).
        bypassed: What becomes of tokens that do not run: nothing, or they are multiplied by it.
        soft: `[B, N]` in `(0, 1]`, of a method that `softens`: in training every token stays and
            counts this much (differentiable); else `keep` holds, and this is not looked at.
    """

    keep: Int[Tensor, "B K"] | tuple[Int[Tensor, "_"], ...]
    assign: Int[Tensor, "B N"] | None = None
    weight: Float[Tensor, "B N"] | None = None
    merge_on: Literal["features", "vision_features"] = "features"
    features: Float[Tensor, "B K D"] | None = None
    memory: tuple[Memory, ...] = ()
    gate: Float[Tensor, "B N"] | None = None
    bypassed: Literal["identity", "gated"] = "identity"
    losses: Mapping[str, Float[Tensor, "B"]] = field(default_factory=dict)
    soft: Float[Tensor, "B N"] | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        """Kept tokens of each image, from shapes (no device sync)."""
        if isinstance(self.keep, Tensor):
            return (self.keep.shape[1],) * self.keep.shape[0]
        return tuple(int(k.shape[0]) for k in self.keep)

    def check(self, tokens: VisualTokens, num_keep: int, *, exact: bool) -> None:
        """Compare the plan's shapes with what was asked (no device sync).

        Raises:
            BudgetError: A count is not `num_keep` (or, for `exact=False`, lies outside 0..N).
            ValueError: A shape does not fit the tokens.
        """
        counts = self.counts
        if len(counts) != tokens.batch:
            raise ValueError(f"plan has {len(counts)} images, the bucket has {tokens.batch}")
        for count in counts:
            if exact and count != num_keep:
                raise BudgetError(
                    f"plan keeps {count} tokens of an image, the budget is {num_keep}"
                )
            if count > tokens.num_visual:
                raise BudgetError(f"plan keeps {count} of {tokens.num_visual} tokens")
        if (self.assign is None) != (self.weight is None):
            raise ValueError("assign and weight come together")
        shape = (tokens.batch, tokens.num_visual)
        if self.assign is not None and tuple(self.assign.shape) != shape:
            raise ValueError(f"assign has shape {tuple(self.assign.shape)}, expected {shape}")
        for own, value in (("gate", self.gate), ("soft", self.soft)):
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"{own} has shape {tuple(value.shape)}, expected {shape}")
        for name, loss in self.losses.items():
            if tuple(loss.shape) != (tokens.batch,):
                raise ValueError(
                    f"loss {name} has shape {tuple(loss.shape)}, one an image is wanted"
                )
        if sum(part is not None for part in (self.features, self.assign, self.soft)) > 1:
            raise ValueError("a plan has one of features, assign with weight, and soft")
        if len(self.memory) not in (0, tokens.batch):
            raise ValueError(f"plan remembers {len(self.memory)} of {tokens.batch} images")

    def check_values(self, tokens: VisualTokens) -> None:
        """Compare the plan's values with the contract (synchronises; for tests and debugging).

        Raises:
            ValueError: Indices are out of range or not strictly ascending.
        """
        for keep in self.keep:
            inside = bool(((keep >= 0) & (keep < tokens.num_visual)).all())
            if not inside or not bool((keep[1:] > keep[:-1]).all()):
                raise ValueError("keep must be strictly ascending indices into the visual tokens")
        if self.assign is not None:
            slots = max(self.counts, default=0)
            if not bool(((self.assign >= -1) & (self.assign < slots)).all()):
                raise ValueError(f"assign must be in [-1, {slots})")
        if self.soft is not None and not bool(((self.soft > 0) & (self.soft <= 1)).all()):
            raise ValueError("soft must be in (0, 1]")


def full_index(batch: int, num_visual: int, device: torch.device) -> Int[Tensor, "B N"]:
    """The index of tokens none of which was dropped yet."""
    return torch.arange(num_visual, device=device).expand(batch, num_visual)
