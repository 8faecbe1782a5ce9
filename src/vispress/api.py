"""The public functions: compress a model in place, report on it, undo it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from torch import nn

from vispress.adapters.base import ModelAdapter, find_adapter
from vispress.adapters.decoder import first_attention
from vispress.chain import share_mean
from vispress.config import Config
from vispress.errors import CompressionStateError
from vispress.report import CompressionReport
from vispress.report_builder import build_report
from vispress.report_view import ReportView as ReportView
from vispress.request import Method, Request, check_signals, resolve
from vispress.types import Positions
from vispress.versions import check_versions
from vispress.weights import find_saved
from vispress_kernels import Backend

M = TypeVar("M", bound=nn.Module)


def compress_model(
    model: M,
    method: Method | Sequence[Method] | None = None,
    *,
    keep_ratio: float | None = None,
    num_tokens: int | None = None,
    config: Config | None = None,
    positions: Positions | None = None,
    backend: Backend = "auto",
    cache_layouts: bool = True,
    **hyperparameters: Any,
) -> M:
    """Compress the visual tokens of a Hugging Face multimodal LLM, in place.

    Afterwards `forward`, `generate`, training and pipelines are used as before: inputs, logits and
    cache lengths stay those of the full sequence, while inside each decoder layer only the kept
    rows are computed and stored.

    Args:
        model: A supported model, possibly wrapped (PEFT, sharded, quantised); see `vispress
            doctor`.
        method: A registered name, a compressor, or a list of either (a chain: each acts on what
            the one before has left).
        keep_ratio: Fraction of visual tokens kept by one placement, in `(0, 1]`. Methods with a
            published schedule read it as the mean over decoder layers.
        num_tokens: Visual tokens kept per image, in place of `keep_ratio`.
        config: In place of `method` and its hyper-parameters: a YAML file, the name of a shipped
            one (`"fastervlm"`), or a mapping as in YAML; or a folder that `save_compression` wrote,
            with the parameters of its methods.
        positions: `"original"` keeps position ids of survivors (gaps remain), `"compact"`
            renumbers them. By default each method follows its official code.
        backend: Kernels: `"triton"`, plain `"torch"`, or what fits the device (`"auto"`).
        cache_layouts: Whether what the last prompts had in common with others of their layout
            (places of images, sizes, masks) is kept, so that it need not be made again. Results
            are the same, bit for bit.
        **hyperparameters: Fields of the method's class, `layer=2` for example. Of a list only
            `mean_keep_ratio`: see `vispress.chain`.

    Returns:
        The same model.

    Raises:
        BudgetError: Both or neither of the budgets, or one out of range.
        UnsupportedModelError: No adapter knows the model, or one of its settings is not supported.
        UnsupportedMethodError: Unknown method, or one that needs a signal this model cannot give.
        ConfigError: A hyper-parameter is unknown or out of range; saved parameters do not fit.
        CompressionStateError: The model is compressed already; or its method has parameters, which
            have to be there before DistributedDataParallel or FSDP wrap it.
        UnsupportedVersionError: torch or transformers is outside the supported range.
    """
    methods, mean = resolve(method, config, keep_ratio, num_tokens, hyperparameters)
    saved = find_saved(config)
    if saved is not None and positions is None:
        positions = saved.card.get("positions")
    request = Request(tuple(methods), mean, positions, backend, cache_layouts=cache_layouts)
    check_versions()
    adapter = find_adapter(model)

    from vispress.runtime.attachment import ATTRIBUTE, Attachment
    from vispress.runtime.forward.owner import find_owner
    from vispress.runtime.plan.refusals import refuse_late_parameters

    if ATTRIBUTE in adapter.base.__dict__:
        current = ", ".join(m.name for m in adapter.base.__dict__[ATTRIBUTE].methods)
        raise CompressionStateError(
            f"the model is already compressed by {current}; call remove_compression(model) first, "
            "or update_compression(model, ...) for another budget of the same method"
        )
    plan, stages = plan_of(model, adapter, request)
    refuse_late_parameters(model, plan)
    attachment = Attachment(plan, stages, find_owner(model, adapter.base), request)
    attachment.attach()
    if saved is not None:
        try:
            saved.load(model)
        except BaseException:
            attachment.detach()
            raise
    return model


def update_compression(
    model: M,
    *,
    keep_ratio: float | None = None,
    num_tokens: int | None = None,
    mean_keep_ratio: float | None = None,
    **hyperparameters: Any,
) -> M:
    """Change the budget or hyper-parameters of a compressed model.

    From the next prefill on it computes what it would if it were compressed anew with them; what is
    not given stays. Hooks stay in place, but for those on layers that are watched or changed under
    one setting and not the other (a schedule that moves with its budget), which move. A failed
    update changes nothing. Not while another thread runs the model.

    A conversation may go on: its KV cache keeps what it holds, and new images get the new budget.
    Methods that go on choosing while decoding (DyCoke, CMAI) are the exception: a cache filled
    under another setting of theirs is refused by name.

    Args:
        model: A compressed model.
        keep_ratio: As in `compress_model`; each budget takes the place of the one before.
        num_tokens: As in `compress_model`.
        mean_keep_ratio: The mean over decoder layers, in `(0, 1]`; all that a chain can be given,
            if it was compressed with one.
        **hyperparameters: Fields of the method's class.

    Returns:
        The same model.

    Raises:
        CompressionStateError: The model is not compressed, a forward of it is under way, or hooks
            must move that layers of a checkpointed call still need for its backward.
        BudgetError: No budget and no hyper-parameter, several budgets, or one out of range.
        ConfigError: A hyper-parameter is unknown, out of range, or given to a chain.
        UnsupportedMethodError: The model cannot give a signal that is read now.
    """
    budgets = {
        "keep_ratio": keep_ratio,
        "num_tokens": num_tokens,
        "mean_keep_ratio": mean_keep_ratio,
    }
    given = {name: value for name, value in budgets.items() if value is not None}
    attachment_of(model).refuse_under_way()
    change_request(model, attachment_of(model).request.changed(given | hyperparameters))
    return model


def change_request(model: nn.Module, request: Request) -> None:
    """Let a compressed model follow another request; a failed change changes nothing."""
    attachment = attachment_of(model)
    attachment.refuse_under_way()
    check_versions()
    plan, stages = plan_of(model, find_adapter(model), request)
    attachment.update(plan, stages, request)


def remove_compression(model: M) -> M:
    """Undo `compress_model`; the model is bit-identical to before.

    Raises:
        CompressionStateError: The model is not compressed; or checkpointed layers that run again in
            a backward, which has not come yet, need masks of the method's.
    """
    attachment_of(model).remove()
    return model


@contextmanager
def compressed(
    model: nn.Module, method: Method | Sequence[Method] | None = None, **options: Any
) -> Iterator[ReportView]:
    """`compress_model` for the length of a `with` block.

    Args:
        model: As in `compress_model`.
        method: As in `compress_model`.
        **options: As in `compress_model`.

    Yields:
        A view that reads like the report of the last prefill (and keeps the last one afterwards).
    """
    compress_model(model, method, **options)
    view = ReportView(partial(compression_report, model))
    try:
        yield view
    except BaseException:
        view.close()
        attachment_of(model).detach()  # what failed has no backward
        raise
    view.close()
    remove_compression(model)


def compression_report(model: nn.Module) -> CompressionReport:
    """Tell what the last prefill with visual tokens kept, and where.

    It is of the conversation that the last call belongs to, and tells how far that has come: a turn
    of text behind the prefill is counted in (see `CompressionReport`).

    Raises:
        CompressionStateError: The model is not compressed, or the conversation holds no visual
            tokens.
    """
    return build_report(*attachment_of(model).turns.last())


def attachment_of(model: nn.Module) -> Any:
    """Find what is attached to a model.

    Raises:
        CompressionStateError: The model is not compressed.
    """
    from vispress.runtime.attachment import ATTRIBUTE

    base = find_adapter(model).base
    if ATTRIBUTE not in base.__dict__:
        raise CompressionStateError("the model is not compressed; call compress_model first")
    return base.__dict__[ATTRIBUTE]


def plan_of(model: nn.Module, adapter: ModelAdapter, request: Request) -> tuple[Any, Any]:
    """Make the plan of a request on a model, and its stages, or refuse it."""
    from vispress.runtime.hooks.head_shards import find_shards
    from vispress.runtime.kv_cache.cache_layers import Remembering
    from vispress.runtime.plan.placements import bind_placements
    from vispress.runtime.plan.plan import Plan
    from vispress.runtime.plan.refusals import refuse_partitioned, refuse_sharded_encoder
    from vispress.runtime.stages import bind_all
    from vispress.runtime.stages.base import Binding
    from vispress.runtime.tokens.masks import check_implementation

    check_implementation(adapter.language_model.config._attn_implementation)
    methods, notes = list(request.at(request.progress)), list[str]()
    for one in methods:
        check_signals(one, adapter)
    if request.mean is not None:
        methods, note = share_mean(methods, request.mean, len(adapter.decoder_layers))
        notes.append(note)
    placements, remarks = bind_placements(methods, adapter, request.positions)
    notes += remarks
    stages = bind_all(Binding(adapter, methods, placements, notes, request.backend))
    shards = find_shards(model, first_attention(adapter.decoder_layers))
    remembering = Remembering(tuple(s.remembers for s in stages if s.remembers is not None))
    cached = request.cache_layouts
    plan = Plan(
        adapter, methods, placements, request.backend, notes, shards, remembering,
        caches_layouts=cached,
    )  # fmt: skip
    refuse_sharded_encoder(model, plan)
    refuse_partitioned(adapter.base.parameters())
    return plan, stages
