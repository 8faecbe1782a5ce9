"""One placement at work: gather signals, ask the compressor, turn its plans into rows and
values.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vispress.errors import BudgetError
from vispress.methods.base import Compressor
from vispress.runtime.forward.signals import visual_tokens
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.stages.skip import LayerSkip
from vispress.runtime.tokens.images import Bucket, Trace
from vispress.runtime.tokens.live_tokens import LiveTokens, gather_rows, narrow
from vispress.types import Placement, Positions, TokenPlan
from vispress_kernels import Backend
from vispress_kernels.merge_tokens import merge_tokens


@dataclass(frozen=True, eq=False)
class BoundPlacement:
    """One placement of one compressor, in the order the steps are taken.

    Args:
        number: Place in that order.
        compressor: Number of the compressor in the chain.
        method: The compressor.
        placement: Where it acts and how much it keeps.
        positions: What becomes of position ids.
    """

    number: int
    compressor: int
    method: Compressor
    placement: Placement
    positions: Positions


@dataclass(eq=False)
class Change:
    """New values for the kept tokens of one bucket."""

    before: Bucket
    kept: Bucket
    plan: TokenPlan


@dataclass(eq=False)
class Decision:
    """What a placement did; a checkpointed recompute repeats it on new hidden states.

    Args:
        before: Rows that entered.
        rows: Rows that stay.
        local: `[B, P']`, place of each in `before`.
        changes: Buckets whose survivors change value.
        backend: Kernels to use.
        span: Layers that the dropped rows bypass; then `rows` are all but padding.
    """

    before: LiveTokens
    rows: LiveTokens
    local: Tensor
    changes: list[Change]
    backend: Backend
    span: LayerSkip | None = None


def decide(state: ForwardState, step: BoundPlacement, hidden: Tensor) -> Decision | None:
    """Ask the compressor about every bucket; None when nothing is dropped or changed.

    Args:
        state: The call; its buckets move on.
        step: The placement.
        hidden: `[B, P, D]`, rows that would enter the placement's layer.
    """
    rows = state.last.to(hidden.device)
    drop = torch.zeros(hidden.shape[0], rows.length, dtype=torch.bool, device=hidden.device)
    drop_counts = [0] * hidden.shape[0]
    changes: list[Change] = []
    after: list[Bucket] = []
    for bucket in state.buckets:
        for part, plan in _plans(state, step, bucket.to(hidden.device), rows, hidden):
            kept = part
            if plan is not None:
                assert isinstance(plan.keep, Tensor)
                kept = part.kept(plan.keep)
                if plan.memory:
                    kept.memory = kept.memory | {step.compressor: plan.memory}
                gone = torch.ones_like(part.positions, dtype=torch.bool).scatter(
                    1, plan.keep, False
                )
                drop[part.sample.unsqueeze(1), part.positions] = gone
                if plan.features is not None or plan.assign is not None:
                    changes.append(Change(part, kept, plan))
            for number, image in enumerate(part.images):
                drop_counts[image.sample] += part.num_visual - kept.num_visual
                image.trace.append(Trace(step.number, kept.index[number]))
            back = step.placement.until is not None
            after.append(replace(part, memory=kept.memory) if back else kept)
    state.buckets = after
    if not any(drop_counts) and not changes:
        return None
    valid = rows.valid
    if rows.whole and state.chunk_valid is not None:
        valid = state.chunk_valid.to(hidden.device)
    compact = step.positions == "compact"
    if (until := step.placement.until) is not None:
        none = torch.zeros_like(drop)
        base, local = narrow(rows, none, (0,) * len(drop_counts), compact=compact, valid=valid)
        some, inner = narrow(base, drop, tuple(drop_counts), compact=compact, valid=base.valid)
        span = LayerSkip(step.placement.layer, until, base, some, inner)
        return Decision(rows, base, local, [], state.attachment.backend, span)
    new, local = narrow(rows, drop, tuple(drop_counts), compact=compact, valid=valid)
    if new.size == 0:
        raise BudgetError(
            "nothing is left of the prompt: it holds visual tokens only, none is kept"
        )
    return Decision(rows, new, local, changes, state.attachment.backend)


def apply(decision: Decision, hidden: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
    """The surviving rows of `hidden`, changed where the plans say so (differentiable)."""
    out = gather_rows(hidden, decision.local, decision.backend)
    return write_values(decision, decision.rows, hidden, out, project)


def write_values(
    decision: Decision,
    rows: LiveTokens,
    hidden: Tensor,
    out: Tensor,
    project: Callable[[Tensor], Tensor],
) -> Tensor:
    """Put the new values of changed tokens into `out`.

    Placements before the LLM write into the full-length embeddings, outside of any checkpointed
    layer, so that gradients of encoder and projector flow once.

    Args:
        decision: What changes.
        rows: Rows of `out`.
        hidden: `[B, P, D]`, rows that entered the placement.
        out: `[B, P', D]`; not modified.
        project: The projector.
    """
    for change in decision.changes:
        values = _values(change, decision, hidden, project)
        sample = change.kept.sample.unsqueeze(1)
        local = rows.place[sample, change.kept.positions]
        out = out.index_put((sample.expand_as(local), local), values.to(out.dtype))
    return out


def _values(
    change: Change, decision: Decision, hidden: Tensor, project: Callable[[Tensor], Tensor]
) -> Tensor:
    """`[Bk, K, D]` new values of the kept tokens."""
    plan, before = change.plan, change.before
    if plan.features is not None:
        return plan.features
    assert plan.assign is not None
    assert plan.weight is not None
    slots, rows, backend = change.kept.num_visual, decision.before, decision.backend
    sample = before.sample.unsqueeze(1)
    own = hidden[sample, rows.place[sample, before.positions]]
    if plan.merge_on == "features":
        return merge_tokens(own, plan.assign, slots, weight=plan.weight, backend=backend)
    whole = [image.capture.vision_features(image.number) for image in before.images]
    inputs = gather_rows(torch.stack(whole).to(hidden.device), before.index, backend)
    folded = merge_tokens(inputs, plan.assign, slots, weight=plan.weight, backend=backend)
    merged = project(folded)
    # a slot of one token keeps it as it is: newline tokens never went through the projector
    assert isinstance(plan.keep, Tensor)
    return torch.where(
        (_members(plan.assign, slots) > 1).unsqueeze(-1),
        merged,
        gather_rows(own, plan.keep, backend),
    )


def _members(assign: Tensor, slots: int) -> Tensor:
    """`[B, K]` tokens folded into each slot."""
    counts = assign.new_zeros(assign.shape[0], slots + 1)
    target = torch.where(assign < 0, slots, assign)
    return counts.scatter_add(1, target, torch.ones_like(assign))[:, :slots]


def asks(state: ForwardState, step: BoundPlacement) -> bool:
    """Whether a placement reads attention to decide about any bucket."""
    return any(
        not _passes(step, bucket) and bucket.reads_attention(step.compressor)
        for bucket in state.buckets
    )


def _passes(step: BoundPlacement, bucket: Bucket) -> bool:
    """Whether all tokens of a bucket stay, without a look at them."""
    placement, first = step.placement, bucket.images[0]
    if bucket.passes(step.method.needs) or bucket.over(step.compressor):
        return True
    if placement.images == ("earlier" if first.last else "last"):
        return True
    entered = bucket.entered.get(step.compressor, bucket.num_visual)
    return placement.budget.resolve(entered) >= bucket.num_visual and not placement.adaptive


def _plans(
    state: ForwardState, step: BoundPlacement, bucket: Bucket, rows: LiveTokens, hidden: Tensor
) -> Iterator[tuple[Bucket, TokenPlan | None]]:
    """The bucket and its plan; a ragged plan comes image by image. No plan: all tokens stay."""
    placement, method = step.placement, step.method
    bucket.entered.setdefault(step.compressor, bucket.num_visual)
    entered = bucket.entered[step.compressor]
    num_keep = placement.budget.resolve(entered)
    if _passes(step, bucket):
        yield bucket, None
        return
    if num_keep == 0:
        empty = bucket.index.new_empty(len(bucket.images), 0)
        yield bucket, TokenPlan(keep=empty)
        return
    tokens = visual_tokens(state, step.compressor, method, placement, bucket, rows, hidden)
    plan = method.plan(tokens, num_keep)
    plan.check(tokens, num_keep, exact=method.exact and not placement.adaptive)
    if isinstance(plan.keep, Tensor):
        yield bucket, plan
        return
    for number, keep in enumerate(plan.keep):
        one = slice(number, number + 1)
        yield (
            bucket.row(number),
            TokenPlan(
                keep=keep[None],
                assign=None if plan.assign is None else plan.assign[one],
                weight=None if plan.weight is None else plan.weight[one],
                merge_on=plan.merge_on,
                features=None if plan.features is None else plan.features[one, : len(keep)],
                memory=plan.memory[one],
            ),
        )
