"""Fill a bucket's VisualTokens with the signals a compressor declares, and nothing else."""

from typing import Any

import torch
from torch import Tensor

from vispress.devices import sent
from vispress.methods.base import Compressor, upcast
from vispress.runtime.forward.attention_reads import AttentionRead, attention_layers
from vispress.runtime.forward.bucket_view import BucketView, on_device, pick, stacked
from vispress.runtime.forward.encoder_signals import FROM_ENCODER, encoder_signals
from vispress.runtime.forward.prompt_context import context_of
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.modules import module_of
from vispress.runtime.tokens.images import Bucket, numbered
from vispress.runtime.tokens.live_tokens import LiveTokens
from vispress.types import Placement, Signal, Transition, VisualTokens
from vispress_kernels import Backend
from vispress_kernels.gather_tokens import gather_tokens_many


def visual_tokens(
    state: ForwardState,
    compressor: int,
    method: Compressor,
    placement: Placement,
    bucket: Bucket,
    rows: LiveTokens,
    hidden: Tensor,
) -> VisualTokens:
    """The bucket as a method sees it.

    Args:
        state: The call.
        compressor: Number of the compressor in the chain.
        method: Whose signals to fill: the compressor, or one of its views.
        placement: Where the method acts.
        bucket: Images with equal N.
        rows: Rows that enter the placement's layer.
        hidden: `[B, P, D]`, their hidden states.
    """
    parts = method.views()
    reads = frozenset() if parts else method.signals()
    sample, view = bucket.sample.unsqueeze(1), BucketView(bucket)
    first = bucket.images[0]
    signals: dict[str, Any] = {}
    if reads & FROM_ENCODER:
        signals = encoder_signals(state.plan, method, bucket.images, bucket.index, reads)
    asked = placement.queries is not None and bucket.reads_attention(compressor)
    if asked and Signal.QUERY_ATTENTION in reads:
        signals["query_attention"] = _query_attention(state, placement, view)
    if asked and Signal.MEAN_ATTENTION in reads:
        signals["mean_attention"] = _mean_attention(state, placement, view)
    if asked and Signal.ROTARY_PRIOR in reads:
        signals["rotary_prior"] = _rotary_prior(state, placement, view)
    if asked and Signal.KEY_NORMS in reads:
        signals["key_norms"] = _key_norms(state, placement, view)
    if Signal.TEXT_STATES in reads:
        signals["text_states"] = hidden[sample, view.behind(rows)]
    if Signal.FINAL_NORM in reads:
        signals["final_norm"] = state.plan.adapter.language_model.norm
    if Signal.INPUT_NORM in reads:
        layer: Any = state.plan.adapter.decoder_layers[placement.layer]
        signals["input_norm"] = layer.input_layernorm
    if Signal.TRANSITION in reads:
        signals["transition"] = _transitions(state, placement, view)
    if Signal.UPDATE_NORM in reads and placement.layer > 0:
        signals["update_norm"] = _update_norm(state, view)
    if Signal.TEXT_EMBEDDINGS in reads:
        signals["text_embeddings"] = _text_embeddings(state, bucket)
        signals["text_after"] = len(first.text_after)
    if Signal.INPUT_EMBEDDINGS in reads:
        signals["input_embeddings"] = _input_embeddings(state, bucket)
    if Signal.CONTEXT in reads:
        inside = placement.layer > 0
        signals["context"] = context_of(state, bucket, rows, hidden, inside=inside)
    if Signal.DEPTH in reads:
        depth = state.plan.num_layers
        signals["depth"] = (placement.layer, depth)
    if Signal.IMAGE_COUNT in reads:
        signals["image_count"] = torch.tensor([i.count_in_prompt for i in bucket.images])
    if Signal.IMAGE_NUMBER in reads:
        signals["image_number"] = torch.tensor([i.number_in_prompt for i in bucket.images])
    if method.trained:
        signals["module"] = module_of(state.plan.adapter.base, compressor)
    return VisualTokens(
        features=hidden[sample, view.local(rows)],
        index=bucket.index,
        num_original=first.num_visual,
        grid=first.grid,
        crops=first.crops,
        num_entered=bucket.entered[compressor],
        memory=bucket.memory.get(compressor, ()),
        views=tuple(
            visual_tokens(state, compressor, one, placement, bucket, rows, hidden) for one in parts
        ),
        training=state.trains,
        backend=state.plan.backend,
        **signals,
    )


def _query_attention(state: ForwardState, placement: Placement, view: BucketView) -> Tensor:
    """`[Bk, H, Q, N]` of the rows that the placement names, or `[Bk, E, H, Q, N]` of E layers."""
    layers = [
        rows_of(_wanted(state, placement, layer), view, state.plan.backend)
        for layer in attention_layers(placement)
    ]
    return layers[0] if len(layers) == 1 else torch.stack(layers, dim=1)


def _wanted(state: ForwardState, placement: Placement, layer: int) -> AttentionRead:
    return next(want for want in state.reads if want.serves(placement, layer))


def rows_of(want: AttentionRead, view: BucketView, backend: Backend) -> Tensor:
    """`[Bk, H, Q, N]` of one layer."""
    assert want.rows is not None
    assert want.seen_on is not None
    probs = view.own(want.rows)  # [Bk, H, R, S]
    if want.groups is not None:
        numbers = torch.tensor([want.groups[1][image] for image in view.bucket.images])
        probs = probs[torch.arange(len(numbers)), sent(numbers, view.device)]
    elif (picks := _tails(want, view)) is not None:
        probs = pick(probs, 2, picks, backend)
    # other steps before the same layer may have dropped rows since
    return pick(probs, 3, want.slots(view.local(want.seen_on)), backend)


def _mean_attention(state: ForwardState, placement: Placement, view: BucketView) -> Tensor:
    """`[Bk, N]` of the layer that the placement names."""
    (layer,) = attention_layers(placement)
    want = _wanted(state, placement, layer)
    assert want.means is not None
    assert want.seen_on is not None
    places = numbered(list(want.tails))[0]
    number = sent(torch.tensor([places[image] for image in view.bucket.images]), view.device)
    means = on_device(want.means, view.device)[view.bucket.sample, number]
    return means.gather(1, want.slots(view.local(want.seen_on)))


def _tails(want: AttentionRead, view: BucketView) -> Tensor | None:
    """`[Bk, Q]` of a batch row's rows that ask about each image; None for all of them."""
    tails = [want.tails[image] for image in view.bucket.images]
    if all(tail == list(range(want.positions.shape[1])) for tail in tails):
        return None
    return sent(torch.tensor(tails, dtype=torch.int64), view.device)


def _rotary_prior(state: ForwardState, placement: Placement, view: BucketView) -> Tensor:
    """`[Bk, Q, N]`: a pair of ones at frequency f scores `2 cos(f (q - k))`, whatever the axes."""
    (layer,) = attention_layers(placement)
    want = _wanted(state, placement, layer)
    assert want.rotary is not None
    assert want.seen_on is not None
    assert want.asked is not None
    asked, backend = view.own(want.asked), state.plan.backend
    if (picks := _tails(want, view)) is not None:
        asked = asked.gather(1, picks)
    batch = len(state.last.index)
    tables = [view.own(upcast(table).expand(batch, -1, -1)) for table in want.rotary]
    queries, keys = (
        gather_tokens_many(tables, where, backend=backend)
        for where in (asked, view.local(want.seen_on))
    )
    cos, sin = (q @ k.mT * want.scaling for q, k in zip(queries, keys, strict=True))
    return cos + sin


def _key_norms(state: ForwardState, placement: Placement, view: BucketView) -> Tensor:
    """`[Bk, N + T]` of the layer that the placement names."""
    (layer,) = attention_layers(placement)
    want = _wanted(state, placement, layer)
    assert want.key_norms is not None
    assert want.seen_on is not None
    local = torch.cat([view.local(want.seen_on), view.behind(want.seen_on)], dim=1)
    return view.own(want.key_norms).gather(1, want.slots(local))


def _transitions(
    state: ForwardState, placement: Placement, view: BucketView
) -> tuple[Transition, ...]:
    same: dict[int, list[int]] = {}  # layers that ran on the same rows
    for layer in placement.transitions:
        same.setdefault(id(state.transitions[layer].rows), []).append(layer)
    out = []
    for layers in same.values():
        rows: LiveTokens = state.transitions[layers[0]].rows
        found = [
            on_device(x, view.device) for layer in layers for x in state.transitions[layer].measures
        ]
        whole = view.own(torch.stack(found, dim=1))  # [Bk, 4 E, P]
        own = whole.gather(2, view.local(rows).unsqueeze(1).expand(-1, len(found), -1))
        valid = _asking(state, rows, view)
        parts = zip(layers, torch.split(whole, 4, 1), torch.split(own, 4, 1), strict=True)
        for layer, of_all, of_own in parts:
            out.append(
                Transition(
                    layer=layer,
                    magnitude=of_own[:, :2],
                    cosine=of_own[:, 2:],
                    sequence_cosine=of_all[:, 2:],
                    sequence_valid=valid,
                )
            )
    return tuple(out)


def _update_norm(state: ForwardState, view: BucketView) -> Tensor:
    """`[Bk, N]`, of the layer that has just run."""
    assert state.update is not None
    rows, norms = state.update
    return view.own(norms).gather(1, view.local(rows))


def _asking(state: ForwardState, rows: LiveTokens, view: BucketView) -> Tensor:
    """`[Bk, P]` bool: rows of the prompt that decides about each image."""
    valid = view.own(state.row_validity(rows))
    layout, images = state.layout, view.bucket.images
    assert layout is not None
    if not layout.packed and all(image.prompt.stop == layout.length for image in images):
        return valid
    spans = torch.tensor([(image.prompt.start, image.prompt.stop) for image in images])
    start, stop = sent(spans, view.device).unsqueeze(-1).unbind(1)
    assert state.asking is not None
    asking = sent(torch.stack([state.asking[image.sample] for image in images]), view.device)
    index = view.own(rows.index)
    return valid & asking.gather(1, index) & (index >= start) & (index < stop)


def _text_embeddings(state: ForwardState, bucket: Bucket) -> Tensor:
    """`[Bk, T, D]`; prompts of one bucket have equally many text tokens."""
    return stacked([state.text_embeddings[image.prompt] for image in bucket.images])


def _input_embeddings(state: ForwardState, bucket: Bucket) -> Tensor:
    """`[Bk, N0, D]`, dropped tokens included."""
    assert state.input_embeddings is not None
    device = state.input_embeddings.device
    positions = sent(stacked([image.positions for image in bucket.images]), device)
    sample = on_device(bucket.sample, device).unsqueeze(1)
    return on_device(state.input_embeddings[sample, positions], bucket.index.device)
