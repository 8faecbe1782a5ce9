"""Apply one placement: gather signals, ask the compressor, turn its plans into rows and values."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vispress.errors import BudgetError
from vispress.kinds import PROMPT_SIGNALS
from vispress.runtime.forward.bucket_view import BucketView
from vispress.runtime.forward.decision import Change, Decision
from vispress.runtime.forward.losses import collect
from vispress.runtime.forward.signals import visual_tokens
from vispress.runtime.forward.softening import key_biases, softened
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.plan.bound import BoundPlacement
from vispress.runtime.tokens.images import Bucket, Trace
from vispress.runtime.tokens.live_tokens import LiveTokens, gather_rows, narrow
from vispress.runtime.tokens.marks import marked
from vispress.types import TokenPlan
from vispress_kernels.merge_tokens import merge_tokens


@dataclass(eq=False)
class Choice:
    """Hold what the compressors of a placement chose, before any row moves.

    Args:
        drop: `[B, Q]` bool, visual tokens that are not kept.
        drop_counts: How many that is of each sample, on the host.
        document_drops: The same of each document, where rows are packed.
        changes: Buckets whose survivors change value.
        gates: Buckets whose plans have a gate, before anything is dropped, and those plans.
        soft: Buckets whose keys are softened, and by how much (see `TokenPlan.soft`).
        entered: All buckets as they were, a ragged one row by row, with what the compressor
            remembers of them.
        buckets: The same with the kept tokens alone.
    """

    drop: Tensor
    drop_counts: tuple[int, ...]
    document_drops: tuple[int, ...]
    changes: list[Change]
    gates: list[tuple[Bucket, TokenPlan]]
    soft: list[tuple[Bucket, Tensor]]
    entered: list[Bucket]
    buckets: list[Bucket]

    @property
    def empty(self) -> bool:
        """Tell whether nothing is dropped, changed or gated."""
        return not any(self.drop_counts) and not self.changes and not self.gates


def choose(state: ForwardState, step: BoundPlacement, hidden: Tensor) -> Choice:
    """Ask the compressor about every bucket, and note in each image what it kept.

    Args:
        state: The call.
        step: The placement.
        hidden: `[B, P, D]`, rows that would enter the placement's layer.
    """
    rows = state.last.to(hidden.device)
    drop: Tensor | None = None
    shape = hidden.shape[0], rows.length
    drop_counts = [0] * hidden.shape[0]
    document_drops = [0] * len(rows.document_counts)
    changes: list[Change] = []
    gates: list[tuple[Bucket, TokenPlan]] = []
    soft: list[tuple[Bucket, Tensor]] = []
    entered: list[Bucket] = []
    after: list[Bucket] = []
    for bucket in state.buckets:
        for part, plan in _plans(state, step, bucket.to(hidden.device), rows, hidden):
            kept = part
            if plan is not None:
                assert isinstance(plan.keep, Tensor)
                kept = part.kept(plan.keep)
                if plan.memory:
                    kept.memory = kept.memory | {step.compressor: plan.memory}
                drop = marked(drop, shape, part, kept, plan.keep)
                if plan.features is not None or plan.assign is not None:
                    changes.append(Change(part, kept, plan))
                if plan.gate is not None:
                    gates.append((part, plan))
                if plan.soft is not None:
                    soft.append((part, plan.soft))
            for number, image in enumerate(part.images):
                dropped = part.num_visual - kept.num_visual
                drop_counts[image.sample] += dropped
                if document_drops:
                    document_drops[image.prompt.document] += dropped
                image.trace.append(Trace(step.number, kept.index[number]))
            entered.append(replace(part, memory=kept.memory))
            entered[-1].marks = part.marks
            after.append(kept)
    if drop is None:
        drop = torch.zeros(shape, dtype=torch.bool, device=hidden.device)
    drops = tuple(drop_counts), tuple(document_drops)
    return Choice(drop, *drops, changes, gates, soft, entered, after)


def note_all_kept(state: ForwardState, step: BoundPlacement, hidden: Tensor) -> None:
    """Note in each image that all of it enters the layer of a placement that drops nothing."""
    for bucket in state.buckets:
        for image, index in zip(bucket.images, bucket.index, strict=True):
            image.trace.append(Trace(step.number, index))


def prune(state: ForwardState, step: BoundPlacement, hidden: Tensor) -> Decision | None:
    """Drop what the compressor does not keep; None when nothing is dropped or changed.

    Args:
        state: The call; its buckets move on.
        step: The placement.
        hidden: `[B, P, D]`, rows that would enter the placement's layer.

    Raises:
        BudgetError: Nothing is left of the prompt.
    """
    choice = choose(state, step, hidden)
    state.buckets = choice.buckets
    if choice.soft:
        state.softened.append((step.placement.layer, key_biases(choice.soft, choice.drop)))
    if choice.empty:
        return None
    rows = state.last.to(hidden.device)
    new, local = narrow(
        rows,
        choice.drop,
        choice.drop_counts,
        compact=step.positions == "compact",
        valid=state.valid_rows(rows),
        document_drops=choice.document_drops,
    )
    if new.size == 0:
        raise BudgetError(
            "nothing is left of the prompt: it holds visual tokens only, none is kept"
        )
    return Decision(rows, new, local, choice.changes, state.plan.backend)


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
        local = BucketView(change.kept).places(rows, change.kept.positions)
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
    own = hidden[sample, BucketView(before).places(rows, before.positions)]
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
    """Tell whether a placement reads attention to decide about any bucket."""
    return any(
        not _passes(step, bucket) and bucket.reads_attention(step.compressor)
        for bucket in state.buckets
    )


def asks_prompt(step: BoundPlacement) -> bool:
    """Tell whether a placement decides by the text around an image: a prompt must end then."""
    return step.placement.queries is not None or bool(step.method.signals() & PROMPT_SIGNALS)


def unasked(state: ForwardState, placements: Iterable[BoundPlacement]) -> Sequence[str]:
    """Say how many images methods which ask the prompt leave whole, as nothing asks about them.

    Where that is all of them, the record says that the methods changed nothing.
    """
    images = state.shown_images
    whole = sum(not image.prompt.ends for image in images)
    names = dict.fromkeys(step.method.name for step in placements if asks_prompt(step))
    return [
        f"{name}: {whole} of {len(images)} images pass whole, as no supervised token stands behind "
        "them and so nothing asks about them"
        for name in names
        if 0 < whole < len(images)
    ]


def _passes(step: BoundPlacement, bucket: Bucket) -> bool:
    """Tell whether all tokens of a bucket stay, without a look at them."""
    placement, first = step.placement, bucket.images[0]
    if bucket.passes(step.method.needs) or bucket.over(step.compressor):
        return True
    if not first.prompt.ends and asks_prompt(step):  # nothing asks about these images
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
    if plan.losses:
        collect(state.plan.adapter.base, plan, len(state.images))
    if plan.soft is not None:
        plan = softened(plan, tokens, method)
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
                gate=None if plan.gate is None else plan.gate[one],
                bypassed=plan.bypassed,
            ),
        )
