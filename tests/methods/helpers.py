"""Random tokens with every signal filled, and the plain meaning of a plan."""

from dataclasses import fields, replace

import torch
from torch import Tensor

from vispress.context import Context
from vispress.methods import FastV
from vispress.types import CropLayout, TokenPlan, Transition, TwoLayer, VisualTokens, full_index


def like_fastv(**says):
    """A FastV whose class says something else about itself."""
    return type("LikeFastV", (FastV,), says)()


def adaptive_placements(method, num_layers):
    """FastV's placements, where the method decides the count."""
    return tuple(replace(p, adaptive=True) for p in FastV.placements(method, num_layers))


NOT_TO_A_BUDGET = {"adaptive": True, "exact": False, "takes_budget": False}


class TinyProjector:
    """A two-layer MLP that computes in the dtype and on the device of its input."""

    def __init__(self, width_in, width_out, generator):
        self.first = torch.randn(width_in, 7, generator=generator, dtype=torch.float64)
        self.second = torch.randn(7, width_out, generator=generator, dtype=torch.float64)

    @property
    def weights(self):
        """The same as weights."""
        return TwoLayer(w1=self.first.mT, b1=None, w2=self.second.mT, b2=None)

    def __call__(self, x):
        return torch.nn.functional.gelu(x @ self.first.to(x)) @ self.second.to(x)


class TinyNorm:
    """An RMS norm that computes in the dtype of its input."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, x):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight.to(x), 1e-6)


def anyres(side=4, rows=2, cols=2, *, top=0, left=0, newlines=True):
    """A LLaVA-NeXT layout: thumbnail, then the stitched crops in raster order, newline-ended rows.

    Args:
        side: Patches along a crop.
        rows: Crops along the height.
        cols: Crops along the width.
        top: Rows of padding removed above and below.
        left: Columns of padding removed on both sides.
        newlines: Whether every row ends with a newline token.
    """
    places = [(0, r, c) for r in range(side) for c in range(side)]
    for r in range(top, rows * side - top):
        for c in range(left, cols * side - left):
            places.append((1 + (r // side) * cols + c // side, r % side, c % side))
        if newlines:
            places.append((-1, -1, -1))
    segment, row, col = torch.tensor(places).T
    return CropLayout(segment=segment, row=row, col=col, thumbnail=True)


def make_tokens(
    batch=2,
    num_visual=None,
    *,
    grid=None,
    crops=None,
    dtype=torch.float32,
    seed=0,
    dim=8,
    heads=2,
    queries=3,
    encoder_layers=1,
    transitions=(0, 1),
):
    """A bucket with every signal filled with seeded random data.

    Args:
        batch: B.
        num_visual: N; taken from the geometry if there is one.
        grid: `(t, h, w)`.
        crops: AnyRes geometry, in place of a grid.
        dtype: Of everything but attention rows and transitions, which the runtime gives in fp32.
        seed: Of a generator of its own.
        dim: D; `vision_features` have 6 channels, keys 5.
        heads: H, everywhere.
        queries: Q.
        encoder_layers: E.
        transitions: Decoder layers that were measured.
    """
    g = torch.Generator().manual_seed(seed)
    if grid is not None:
        num_visual = grid[0] * grid[1] * grid[2]
    elif crops is not None:
        num_visual = len(crops.segment)
    B, N, L = batch, num_visual, num_visual + 6

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    def attention(*shape):
        # over a few more keys than there are visual tokens
        return torch.softmax(3 * normal(*shape, N + 4), dim=-1)[..., :N]

    def transition(layer):
        cosine = torch.rand(B, 2, L, generator=g) * 2 - 1
        return Transition(
            layer=layer,
            magnitude=torch.rand(B, 2, N, generator=g) + 0.5,
            cosine=cosine[..., 2 : N + 2],
            sequence_cosine=cosine,
            sequence_valid=torch.arange(L).expand(B, L) > torch.arange(B)[:, None] % 2,
        )

    layers = () if encoder_layers == 1 else (encoder_layers,)
    projector = TinyProjector(6, dim, g)
    return VisualTokens(
        features=normal(B, N, dim).to(dtype),
        index=full_index(B, N, torch.device("cpu")),
        num_original=N,
        cls_attention=attention(B, *layers, heads).to(dtype),
        column_attention=attention(B, *layers, heads).to(dtype),
        patch_attention=torch.rand(
            B, *layers, heads, N, generator=torch.Generator().manual_seed(seed + 2)
        ).to(dtype),
        cls_logits=normal(B, *layers, heads, N).to(dtype),
        cls_wide_attention=attention(B, *layers, 1).to(dtype),
        vision_keys=normal(B, heads, N, 5).to(dtype),
        vision_features=normal(B, N, 6).to(dtype),
        encoder_groups=torch.randint(
            N // 2 + 1, (B, N), generator=torch.Generator().manual_seed(seed)
        ),
        projector=projector,
        two_layer=projector.weights,
        text_embeddings=normal(B, queries + 1, dim).to(dtype),
        text_after=queries,
        input_embeddings=normal(B, N, dim).to(dtype),
        query_attention=attention(B, heads, queries),
        mean_attention=torch.rand(B, N, generator=torch.Generator().manual_seed(seed)) / N,
        key_norms=torch.rand(B, N + queries, generator=g),
        text_states=normal(B, queries, dim).to(dtype),
        final_norm=TinyNorm(normal(dim)),
        input_norm=TinyNorm(torch.ones(dim)),
        update_norm=torch.rand(B, N, generator=torch.Generator().manual_seed(seed + 1)),
        transition=tuple(transition(layer) for layer in transitions),
        grid=grid,
        crops=crops,
        image_count=torch.ones(B, dtype=torch.int64),
        rotary_prior=1 + torch.rand(B, queries, N, generator=g),
        image_number=torch.arange(B),
        padding=torch.rand(B, N, generator=g),
        depth=(1, 8),
        context=Context(paired_text=normal(B, dim), query=normal(B, dim), earlier=normal(B, dim)),
    )


def only(**signals):
    """Tokens with nothing but the given signals; sizes are taken from the first one's B and N."""
    first = next(iter(signals.values()))
    if "features" in signals or "vision_features" in signals:
        batch, num_visual = (signals.get("features", first)).shape[:2]
    else:
        batch, num_visual = first.shape[0], first.shape[-1]
    signals.setdefault("features", torch.zeros(batch, num_visual, 1))
    index = full_index(batch, num_visual, torch.device("cpu"))
    return VisualTokens(index=index, num_original=num_visual, **signals)


def with_scores(*rows):
    """Tokens whose attention signals are the given head-averaged rows `[B][N]`."""
    scores = torch.tensor(rows)
    return only(
        cls_attention=scores[:, None],
        column_attention=scores[:, None],
        query_attention=scores[:, None, None],
    )


def map_tensors(tokens, change):
    """A copy with `change` applied to every tensor of the bucket (`crops` stays on the host)."""

    def visit(value):
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, Transition | Context):
            return replace(value, **{k: visit(v) for k, v in vars_of(value).items()})
        if isinstance(value, tuple) and value and isinstance(value[0], Transition):
            return tuple(visit(v) for v in value)
        return value

    return replace(
        tokens,
        **{k: visit(v) for k, v in vars_of(tokens).items() if k not in ("crops", "two_layer")},
    )


def vars_of(value):
    """Field values of a dataclass, not copied."""
    return {f.name: getattr(value, f.name) for f in fields(value)}


def all_tensors(tokens):
    """Every tensor in the bucket, geometry included."""
    found = []
    map_tensors(tokens, lambda t: found.append(t) or t)
    layout = () if tokens.crops is None else vars_of(tokens.crops).values()
    return found + [part for part in layout if isinstance(part, Tensor)]


def single(tokens, b):
    """Row `b` as a bucket of its own."""
    return map_tensors(tokens, lambda t: t[b : b + 1])


def take(tokens, keep):
    """What is left of the tokens after a placement that kept `keep` (features and encoder side)."""
    rows = torch.arange(len(keep))[:, None]

    def left(signal):
        """Along the last axis, whatever axes are between."""
        index = keep.view(len(keep), *(1,) * (signal.ndim - 2), -1)
        return signal.gather(-1, index.expand(*signal.shape[:-1], -1))

    return replace(
        tokens,
        features=tokens.features[rows, keep],
        index=tokens.index[rows, keep],
        cls_attention=left(tokens.cls_attention),
        column_attention=left(tokens.column_attention),
        patch_attention=None if tokens.patch_attention is None else left(tokens.patch_attention),
        cls_logits=left(tokens.cls_logits),
        cls_wide_attention=left(tokens.cls_wide_attention),
        vision_keys=tokens.vision_keys.transpose(1, 2)[rows, keep].transpose(1, 2),
        vision_features=tokens.vision_features[rows, keep],
        padding=tokens.padding[rows, keep],
        encoder_groups=tokens.encoder_groups[rows, keep],
        query_attention=None,
        mean_attention=tokens.mean_attention[rows, keep],  # a probe runs on what is left
        rotary_prior=None,
        update_norm=None if tokens.update_norm is None else tokens.update_norm[rows, keep],
        transition=None,
    )


def merged(plan, values):
    """`[B, K, C]`: each slot's weighted sum of the values folded into it."""
    slots = torch.nn.functional.one_hot(plan.assign + 1)[..., 1:]  # [B, N, K]
    return torch.einsum("bnk,bn,bnc->bkc", slots.to(values), plan.weight.to(values), values)


def same_plan(a: TokenPlan, b: TokenPlan):
    """Whether two plans are equal, values to rounding."""
    if [k.tolist() for k in a.keep] != [k.tolist() for k in b.keep]:
        return False
    if (a.assign is None) != (b.assign is None):
        return False
    if a.assign is not None and not (
        torch.equal(a.assign, b.assign) and torch.allclose(a.weight, b.weight)
    ):
        return False
    if (a.gate is None) != (b.gate is None) or a.losses.keys() != b.losses.keys():
        return False
    pairs = [(a.losses[name], b.losses[name]) for name in a.losses]
    pairs += [] if a.gate is None else [(a.gate, b.gate)]
    if not all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in pairs):
        return False
    return a.features is None or all(
        torch.allclose(a.features[i, :count], b.features[i, :count], rtol=1e-4, atol=1e-5)
        for i, count in enumerate(a.counts)
    )
