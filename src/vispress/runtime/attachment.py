"""Attach compressors to a model instance: hooks in, hooks out, nothing left behind."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from vispress.adapters.base import Modality
from vispress.errors import CompressionStateError
from vispress.kinds import Signal
from vispress.methods.base import Compressor
from vispress.prompts import PROMPT_LENGTHS
from vispress.request import Request
from vispress.runtime.encoder.capture import watch_pixels, watch_projector
from vispress.runtime.footprint import Footprint
from vispress.runtime.forward import chunks, prefill
from vispress.runtime.forward.base_model import current_call, run_base, run_encoder
from vispress.runtime.forward.dynamic_decode import decode_step
from vispress.runtime.forward.expand import expand_step
from vispress.runtime.forward.feed_forward import feed_layer
from vispress.runtime.forward.gating import gate_layer
from vispress.runtime.forward.layer_patch import patch_layer
from vispress.runtime.forward.measuring import measure_layer
from vispress.runtime.forward.model_call import ModelCall
from vispress.runtime.forward.owner import check_replica, patch_forward, patch_generation
from vispress.runtime.forward.running import (
    MEASURED,
    RUNNING,
    Running,
    add_deepstack,
    awaited,
    refuse_awaited,
)
from vispress.runtime.forward.static_decode import StaticDecodeCall
from vispress.runtime.forward.turns import Turns
from vispress.runtime.hooks.attention import watch, watch_layer
from vispress.runtime.hooks.compiling import outside
from vispress.runtime.hooks.instance_patch import (
    Original,
    forget,
    is_patched,
    patch_instance,
    refuse_replaced,
    undo_all,
)
from vispress.runtime.modules import missing_modules, put_modules
from vispress.runtime.plan.plan import Plan
from vispress.runtime.plan.refusals import refuse_partitioned
from vispress.runtime.stages.base import RuntimeStage

ATTRIBUTE = "_vispress_attachment"
_ENTER_OUTSIDE = outside(prefill.enter_layer)


class Attachment:
    """Compressors on one model: what is attached, and how to take it off again.

    Args:
        plan: What is asked of the model.
        stages: The stages of its chain, in order.
        owner: The head that owns the base model (see `find_owner`), or None.
        request: What the plan was made of.
    """

    def __init__(
        self, plan: Plan, stages: Sequence[RuntimeStage], owner: nn.Module | None, request: Request
    ) -> None:
        self.owner, self.turns = owner, Turns()
        self._told: set[str] = set()
        self._undo: list[Callable[[], None]] = []
        self._undo_moving: list[Callable[[], None]] = []
        self._heard: list[Callable[[], None]] = []
        self._decoder = (plan.adapter.language_model, *plan.adapter.decoder_layers)
        self._take(plan, stages, request, Footprint.of(plan, stages))

    def _take(
        self, plan: Plan, stages: Sequence[RuntimeStage], request: Request, footprint: Footprint
    ) -> None:
        self.plan, self.stages, self.request = plan, tuple(stages), request
        self._footprint = footprint

    @property
    def methods(self) -> tuple[Compressor, ...]:
        """The chain of compressors."""
        return self.plan.methods

    # --- on and off

    def attach(self) -> None:
        """Install all hooks, or none."""
        try:
            self._attach()
            self._attach_moving()
        except BaseException:
            self.detach()
            raise

    def _attach(self) -> None:
        adapter, base = self.plan.adapter, self.plan.adapter.base
        base.__dict__[ATTRIBUTE] = self
        self._undo.append(partial(forget, base, ATTRIBUTE))
        self._undo += put_modules(adapter, self.owner, self.methods)
        self._hook(base.register_forward_pre_hook(self._base_starts, with_kwargs=True))
        self._undo.append(patch_instance(base, "forward", self._base_runs, keyword=PROMPT_LENGTHS))
        if self.owner is not None:
            self._hook(self.owner.register_forward_pre_hook(self._owner_starts, with_kwargs=True))
            self._undo += patch_generation(self.owner, base)
            self._wrap(self.owner, "_prefill", chunks.run, self)
        self.hear_owner()
        for modality in adapter.placeholders():
            self._wrap(base, f"get_{modality}_features", self._encodes, modality)
        language_model: Any = adapter.language_model
        pre, post = self._language_model_starts, self._language_model_ends
        self._hook(language_model.register_forward_pre_hook(pre, with_kwargs=True))
        self._hook(language_model.register_forward_hook(post, with_kwargs=True))
        for number, layer in enumerate(adapter.decoder_layers):
            self._undo.append(patch_layer(layer, number, partial(self._enter_layer, number)))
        if hasattr(language_model, "_deepstack_process"):
            self._wrap(language_model, "_deepstack_process", add_deepstack)

    def hear_owner(self) -> None:
        """Stand in front of what has replaced the owner's `forward` since, if something has."""
        if self.owner is not None and not is_patched(self.owner, "forward"):
            undo_all(self._heard)  # underneath, it would hear what is left of the same call
            self._heard.append(patch_forward(self.owner, self.plan.adapter.base))

    def _attach_moving(self) -> None:
        """Install the hooks that a plan's footprint names."""
        adapter, footprint, undo = self.plan.adapter, self._footprint, self._undo_moving
        layers: Sequence[Any] = adapter.decoder_layers
        for number in sorted(footprint.left):
            # before transformers' own hook, which collects hidden states
            ends = partial(self._layer_ends, number)
            hook = layers[number].register_forward_hook(ends, with_kwargs=True, prepend=True)
            undo.append(hook.remove)
        undo += [each for n in sorted(footprint.watched) for each in watch_layer(layers[n])]
        for number in sorted(footprint.measured):
            undo += measure_layer(layers[number], number)
        for number in sorted(footprint.gated):
            undo += gate_layer(layers[number], number)
        for number in sorted(footprint.fed):
            undo += feed_layer(layers[number], number)
        attentions = adapter.encoder_attentions()
        for number in sorted(footprint.encoder):
            undo.append(watch(attentions[number]))
        for stage in self.stages:
            undo += [] if stage.install is None else stage.install()
        if Signal.VISION_FEATURES in footprint.signals:
            undo.append(watch_projector(adapter))
        if Signal.PADDING in footprint.signals:
            undo += watch_pixels(adapter)

    def update(self, plan: Plan, stages: Sequence[RuntimeStage], request: Request) -> None:
        """Let another plan stand, or none; hooks move only if its footprint is another one.

        Raises:
            CompressionStateError: They must, and a checkpointed call still needs them.
            ConfigError: Its methods have parameters of other shapes.
        """
        add = missing_modules(plan.adapter, self.owner, plan.methods)
        footprint = Footprint.of(plan, stages)
        if footprint == self._footprint:
            self._take(plan, stages, request, self._footprint)
        else:
            self._move(plan, stages, request, footprint)
        add()

    def _move(self, *after: Any) -> None:
        """Take what `_take` takes, and move hooks to the footprint, or leave all as it was."""
        if awaited(self._footprint):
            raise CompressionStateError(
                "hooks must move, and layers of a checkpointed call that they sit on are to run "
                "again in its backward: call update_compression behind that"
            )
        before = self.plan, self.stages, self.request, self._footprint
        try:
            undo_all(self._undo_moving)
            self._take(*after)
            self._attach_moving()
        except BaseException:
            undo_all(self._undo_moving)
            self._take(*before)
            self._attach_moving()
            raise

    def refuse_under_way(self) -> None:
        """Refuse to change what a forward that runs is in the midst of.

        Raises:
            CompressionStateError: Called inside the base model's forward.
        """
        if current_call(self.plan) is not None:
            raise CompressionStateError(
                "a forward of the model is under way: call update_compression before or behind it "
                "(between the tokens of generate is fine)"
            )

    def remove(self) -> None:
        """Take everything off again, unless a backward that has not come needs it."""
        refuse_awaited(self._footprint)
        self.detach()

    def detach(self) -> None:
        """Take everything off again, in reverse order; what is interrupted can be done again."""
        for undo in (self._undo_moving, self._heard, self._undo):
            undo_all(undo)

    def _hook(self, handle: Any) -> None:
        self._undo.append(handle.remove)

    def _wrap(self, module: Any, name: str, wrapper: Callable[..., Any], *args: Any) -> None:
        """Shadow a bound method on the instance (never on the class)."""
        if hasattr(module, name):
            self._undo.append(patch_instance(module, name, partial(wrapper, *args)))

    # --- hooks of the base model and its encoder

    def _base_starts(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        check_replica(module, self.plan.adapter.base)
        if torch.compiler.is_compiling():
            return
        refuse_partitioned(self.plan.adapter.language_model.norm._parameters.values())
        refuse_replaced(module, self.owner)

    def _owner_starts(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        check_replica(module, self.owner)

    def _base_runs(self, original: Original, *args: Any, **kwargs: Any) -> Any:
        return run_base(self.plan, self._decoder, original, args, kwargs, self._told)

    def _encodes(self, modality: Modality, original: Original, *args: Any, **kwargs: Any) -> Any:
        return run_encoder(self.plan, self.stages, modality, original, args, kwargs)

    # --- hooks of the language model

    def _language_model_starts(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        embeds = kwargs.get("inputs_embeds")
        if not args and embeds is not None and embeds.shape[1] == 1:
            if not torch.compiler.is_compiling():  # which can read no context
                more = decode_step(self.plan, self.stages, current_call(self.plan), module, kwargs)
                if more is not None:
                    return args, kwargs | more
            if (step := StaticDecodeCall.of(self.plan, self.stages, kwargs)) is not None:
                return args, kwargs | {RUNNING: step}
        starts = self._starts_outside if torch.compiler.is_compiling() else self._prefill_starts
        return starts(module, args, kwargs)

    def _prefill_starts(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._footprint.measured:
            MEASURED.set(None)
        call = current_call(self.plan) or ModelCall(self.plan, {})
        begin = prefill.begin if call.chunks is None else chunks.begin
        running, kwargs = begin(self.plan, self.stages, call, module, args, kwargs)
        if running is None:
            return None
        running.begin(self._footprint)
        return (), kwargs

    def _language_model_ends(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        running = kwargs.get(RUNNING)
        if isinstance(running, StaticDecodeCall):
            return expand_step(running.cache, output)
        if not isinstance(running, Running) or running.hooks is not self._footprint:
            if running is None and not torch.compiler.is_compiling():
                self.turns.note_plain(self.plan, kwargs, output)
            return None
        ends = self._ends_outside if torch.compiler.is_compiling() else self._prefill_ends
        return ends(running, output)

    def _prefill_ends(self, running: Running, output: Any) -> Any:
        finish = prefill.finish if running.chunks is None else chunks.finish
        output, state, record = finish(running, output)
        self.turns.note(state, record)
        state.release()
        return output

    _starts_outside, _ends_outside = outside(_prefill_starts), outside(_prefill_ends)

    def _enter_layer(self, number: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        running: Running | StaticDecodeCall = kwargs[RUNNING]
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if isinstance(running, StaticDecodeCall):
            kwargs = running.layer_kwargs(number, hidden, kwargs)
        else:
            enter = _ENTER_OUTSIDE if torch.compiler.is_compiling() else prefill.enter_layer
            hidden, kwargs = enter(running, number, module, hidden, kwargs)
        # other layers would hand the keyword on
        if number not in self._footprint.watched or number in self.plan.linear:
            kwargs = {name: value for name, value in kwargs.items() if name != RUNNING}
        return (hidden, *args[1:]), kwargs

    def _layer_ends(self, number: int, module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        running = kwargs.get(RUNNING)
        if not isinstance(running, Running):
            return None
        if isinstance(out, tuple):
            return (prefill.leave_layer(running, number, out[0]), *out[1:])
        return prefill.leave_layer(running, number, out)
