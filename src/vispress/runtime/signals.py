"""Fill a bucket's VisualTokens with the signals a compressor declares, and nothing else."""

from typing import Any

import torch
from torch import Tensor

from vispress.devices import sent
from vispress.methods.base import Compressor, upcast
from vispress.runtime.capture import projector_function
from vispress.runtime.images import Bucket, numbered
from vispress.runtime.rows import Rows, gather_rows
from vispress.runtime.seen import Wanted, attention_layers
from vispress.runtime.state import ForwardState
from vispress.runtime.surroundings import context_of
from vispress.types import ATTENTION_SIGNALS, Placement, Queries, Signal, Transition, VisualTokens
from vispress_kernels import Backend
from vispress_kernels.gather_tokens import gather_tokens


def visual_tokens(
    state: ForwardState,
    compressor: int,
    method: Compressor,
    placement: Placement,
    bucket: Bucket,
    rows: Rows,
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
    sample = bucket.sample.unsqueeze(1)
    local = rows.place[sample, bucket.positions]
    first = bucket.images[0]
    signals = _encoder_signals(state, method, bucket, reads)
    asked = placement.queries is not None and bucket.reads_attention(compressor)
    if asked and Signal.QUERY_ATTENTION in reads:
        signals["query_attention"] = _query_attention(state, placement, bucket)
    if asked and Signal.MEAN_ATTENTION in reads:
        signals["mean_attention"] = _mean_attention(state, placement, bucket)
    if asked and Signal.ROTARY_PRIOR in reads:
        signals["rotary_prior"] = _rotary_prior(state, placement, bucket)
    if asked and Signal.KEY_NORMS in reads:
        signals["key_norms"] = _key_norms(state, placement, bucket)
    if Signal.TEXT_STATES in reads:
        behind = sent(torch.stack([image.text_after for image in bucket.images]), hidden.device)
        signals["text_states"] = hidden[sample, rows.place[sample, behind]]
    if Signal.FINAL_NORM in reads:
        signals["final_norm"] = state.attachment.adapter.language_model.norm
    if Signal.TRANSITION in reads:
        signals["transition"] = _transitions(state, placement, bucket)
    if Signal.TEXT_EMBEDDINGS in reads:
        signals["text_embeddings"] = _text_embeddings(state, bucket)
        signals["text_after"] = len(first.text_after)
    if Signal.INPUT_EMBEDDINGS in reads:
        signals["input_embeddings"] = _input_embeddings(state, bucket)
    if Signal.CONTEXT in reads:
        inside = placement.layer > 0
        signals["context"] = context_of(state, bucket, rows, hidden, inside=inside)
    if Signal.DEPTH in reads:
        depth = len(state.attachment.adapter.decoder_layers)
        signals["depth"] = (placement.layer, depth)
    numbers, counts = numbered(state.images)
    if Signal.IMAGE_COUNT in reads:
        signals["image_count"] = torch.tensor([counts[image.sample] for image in bucket.images])
    if Signal.IMAGE_NUMBER in reads:
        signals["image_number"] = torch.tensor([numbers[image] for image in bucket.images])
    return VisualTokens(
        features=hidden[sample, local],
        index=bucket.index,
        num_original=first.num_visual,
        grid=first.grid,
        crops=first.crops,
        num_entered=bucket.entered[compressor],
        memory=bucket.memory.get(compressor, ()),
        views=tuple(
            visual_tokens(state, compressor, one, placement, bucket, rows, hidden) for one in parts
        ),
        backend=state.attachment.backend,
        **signals,
    )


def _encoder_signals(
    state: ForwardState, method: Compressor, bucket: Bucket, reads: frozenset[Signal]
) -> dict[str, Any]:
    adapter = state.attachment.adapter
    device = bucket.index.device
    out: dict[str, Any] = {}

    def stacked(values: list[Tensor], axis: int) -> Tensor:
        """Images to rows; only the tokens that are still there."""
        whole = torch.stack(values).to(device)
        if bucket.num_visual == bucket.images[0].num_visual:
            return whole
        return _pick(whole, axis, bucket.index, state.attachment.backend)

    for signal in ATTENTION_SIGNALS:
        if signal in reads:
            layers = state.attachment.encoder_layers(method, signal)
            values = [i.capture.attention(signal, layers, i.number) for i in bucket.images]
            out[signal.value] = stacked(values, values[0].ndim)
    if Signal.VISION_KEYS in reads:
        (*_, layer) = state.attachment.encoder_layers(method, Signal.VISION_KEYS)
        out["vision_keys"] = stacked([i.capture.keys(layer, i.number) for i in bucket.images], 2)
    if Signal.VISION_FEATURES in reads:
        inputs = [i.capture.vision_features(i.number) for i in bucket.images]
        out["vision_features"] = stacked(inputs, 1)
    if Signal.ENCODER_GROUPS in reads:
        alone = torch.arange(bucket.images[0].num_visual, device=device)
        groups = [i.capture.encoder_groups(i.number) for i in bucket.images]
        values = [alone if group is None else group.to(device) for group in groups]
        out["encoder_groups"] = stacked(values, 1)
    if Signal.PROJECTOR in reads:
        out["projector"] = projector_function(adapter)
        two_layer = adapter.two_layer()
        out["two_layer"] = None if two_layer is None else two_layer.to(device)
    if Signal.PADDING in reads and adapter.square_encoder() is not None:
        out["padding"] = stacked([i.capture.padding(i.number) for i in bucket.images], 1)
    return out


def _query_attention(state: ForwardState, placement: Placement, bucket: Bucket) -> Tensor:
    """`[Bk, H, Q, N]` of the rows that the placement names, or `[Bk, E, H, Q, N]` of E layers."""
    layers = [
        _rows_of(_wanted(state, placement, layer), placement, bucket, state.attachment.backend)
        for layer in attention_layers(placement)
    ]
    return layers[0] if len(layers) == 1 else torch.stack(layers, dim=1)


def _wanted(state: ForwardState, placement: Placement, layer: int) -> Wanted:
    return next(want for want in state.wanted if want.serves(placement, layer))


def _rows_of(want: Wanted, placement: Placement, bucket: Bucket, backend: Backend) -> Tensor:
    """`[Bk, H, Q, N]` of one layer."""
    assert want.rows is not None
    assert want.seen_on is not None
    device = bucket.index.device
    # other steps before the same layer may have dropped rows since
    local = want.seen_on.to(device).place[bucket.sample.unsqueeze(1), bucket.positions]
    probs = want.rows.to(device)[bucket.sample]  # [Bk, H, R, S]
    if (picks := _tails(want, placement, bucket)) is not None:
        probs = _pick(probs, 2, picks, backend)
    return _pick(probs, 3, local + want.offset, backend)


def _mean_attention(state: ForwardState, placement: Placement, bucket: Bucket) -> Tensor:
    """`[Bk, N]` of the layer that the placement names."""
    (layer,) = attention_layers(placement)
    want = _wanted(state, placement, layer)
    assert want.means is not None
    assert want.seen_on is not None
    device, places = bucket.index.device, numbered(state.images)[0]
    number = sent(torch.tensor([places[image] for image in bucket.images]), device)
    local = want.seen_on.to(device).place[bucket.sample.unsqueeze(1), bucket.positions]
    return want.means.to(device)[bucket.sample, number].gather(1, local + want.offset)


def _tails(want: Wanted, placement: Placement, bucket: Bucket) -> Tensor | None:
    """`[Bk, Q]` of a sample's rows that stand behind each image; None for all of them.

    Rows of a sample are its text behind the first image; behind this image is a tail of them.
    """
    if placement.queries is not Queries.TEXT_AFTER:
        return None
    tails = [want.tail(image) for image in bucket.images]
    return sent(torch.tensor(tails, dtype=torch.int64), bucket.index.device)


def _pick(x: Tensor, axis: int, index: Tensor, backend: Backend) -> Tensor:
    """Places `index [B, K]` along one axis of `[B, ...]`."""
    return gather_tokens(x.movedim(axis, 1), index, backend=backend).movedim(1, axis)


def _rotary_prior(state: ForwardState, placement: Placement, bucket: Bucket) -> Tensor:
    """`[Bk, Q, N]`: a pair of ones at frequency f scores `2 cos(f (q - k))`, whatever the axes."""
    (layer,) = attention_layers(placement)
    want = _wanted(state, placement, layer)
    assert want.rotary is not None
    assert want.seen_on is not None
    device, sample = bucket.index.device, bucket.sample
    asked = want.positions.to(device)[sample]  # [Bk, R]
    if (picks := _tails(want, placement, bucket)) is not None:
        asked = asked.gather(1, picks)
    place = want.seen_on.to(device).place[sample]  # [Bk, Q]
    total: Tensor | None = None
    for table in want.rotary:
        own = upcast(table.to(device)).expand(len(state.last.index), -1, -1)[sample]
        queries, keys = (
            gather_rows(own, place.gather(1, where), state.attachment.backend)
            for where in (asked, bucket.positions)
        )
        part = queries @ keys.mT * want.scaling
        total = part if total is None else total + part
    assert total is not None
    return total


def _key_norms(state: ForwardState, placement: Placement, bucket: Bucket) -> Tensor:
    """`[Bk, N + T]` of the layer that the placement names."""
    (layer,) = attention_layers(placement)
    want = _wanted(state, placement, layer)
    assert want.key_norms is not None
    assert want.seen_on is not None
    device, where = bucket.index.device, bucket.positions
    behind = sent(torch.stack([image.text_after for image in bucket.images]), device)
    rows = want.seen_on.to(device)
    slots = rows.place[bucket.sample.unsqueeze(1), torch.cat([where, behind], dim=1)]
    return want.key_norms.to(device)[bucket.sample].gather(1, slots + want.offset)


def _transitions(
    state: ForwardState, placement: Placement, bucket: Bucket
) -> tuple[Transition, ...]:
    device, sample = bucket.index.device, bucket.sample.unsqueeze(1)
    shared: dict[int, tuple[Tensor, Tensor]] = {}  # layers with the same rows
    out = []
    for layer in placement.transitions:
        seen = state.transitions[layer]
        rows: Rows = seen.rows
        if id(rows) not in shared:
            local = rows.place.to(device)[sample, bucket.positions]
            valid = state.row_validity(rows).to(device)[bucket.sample]
            shared[id(rows)] = (local.unsqueeze(1).expand(-1, 4, -1), valid)
        pick, valid = shared[id(rows)]
        whole = seen.measures.to(device)[bucket.sample]
        own = whole.gather(2, pick)
        out.append(
            Transition(
                layer=layer,
                magnitude=own[:, :2],
                cosine=own[:, 2:],
                sequence_cosine=whole[:, 2:],
                sequence_valid=valid,
            )
        )
    return tuple(out)


def _text_embeddings(state: ForwardState, bucket: Bucket) -> Tensor:
    """`[Bk, T, D]`, right-aligned; samples of one bucket have equally many text tokens."""
    assert state.text_embeddings is not None
    return torch.stack([state.text_embeddings[image.sample] for image in bucket.images])


def _input_embeddings(state: ForwardState, bucket: Bucket) -> Tensor:
    """`[Bk, N0, D]`, dropped tokens included."""
    assert state.input_embeddings is not None
    device = state.input_embeddings.device
    positions = sent(torch.stack([image.positions for image in bucket.images]), device)
    sample = bucket.sample.to(device).unsqueeze(1)
    return state.input_embeddings[sample, positions].to(bucket.index.device)
