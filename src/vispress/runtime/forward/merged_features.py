"""Compress prompts whose features the caller merged: `inputs_embeds` and no pixel values.

Where the images stand is told by token ids beside the embeddings (of the call, or of `generate`,
whose forward is not given them), or by `mm_token_type_ids`. The encoder did not run, so its signals
cannot be had; what a method reads of embeddings and of the language model can.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vispress.adapters.base import Modality, ModelAdapter
from vispress.errors import CompressionStateError, UnsupportedMethodError
from vispress.kinds import ENCODER_SIGNALS, Signal
from vispress.runtime.encoder.capture import EncoderCapture, EncoderSink
from vispress.runtime.forward.model_call import ModelCall
from vispress.runtime.forward.owner import GENERATING, ids_of
from vispress.runtime.layout import runs_of
from vispress.runtime.plan.plan import Plan

NOTHING_COMPRESSED = (
    "nothing is compressed in calls with inputs_embeds and neither pixel values nor token ids: "
    "where the images stand is not known. Give input_ids beside inputs_embeds (to generate, or to "
    "the compressed model), or pixel values and no inputs_embeds; text alone needs neither. Said "
    "once a model"
)
_MODALITIES: dict[int, Modality] = {1: "image", 2: "video"}
"""By `mm_token_type_ids`."""


def takes_embeds(arguments: Any) -> bool:
    """Whether a base model is called with embeddings of more than one token."""
    embeds = arguments.get("inputs_embeds")
    return isinstance(embeds, Tensor) and embeds.shape[1] > 1


def note_merged(plan: Plan, call: ModelCall, told: set[str]) -> None:
    """Note the images of a call that brings embeddings alone, as if an encoder had given them.

    Args:
        plan: What is asked of the model.
        call: The base model's; its captures are filled, and the ids that tell of them noted.
        told: What the model's user was warned of; grows.

    Raises:
        UnsupportedMethodError: A method reads what only the encoder shows.
        UnsupportedModelError: What images there are cannot be told without another argument.
        CompressionStateError: Placeholders and sizes of images do not fit.
    """
    generating = GENERATING.get()
    of_this = generating is not None and generating.base is plan.adapter.base
    prompts = generating.arguments if generating is not None and of_this else {}
    ids = _ids_beside(plan.adapter, call, prompts)
    if ids is None:
        if NOTHING_COMPRESSED not in told:
            told.add(NOTHING_COMPRESSED)
            warnings.warn(NOTHING_COMPRESSED, stacklevel=2)
        return
    given = {name: value for name, value in call.arguments.items() if value is not None}
    call.arguments = {**call.arguments, "input_ids": ids}
    call.fetch()
    shown = call.on_host(ids)
    tokens, sizes = plan.adapter.placeholders(), {**prompts, **given}
    for modality, token in tokens.items():
        other = next((one for one in tokens if one != modality and tokens[one] == token), None)
        # one token for both (GLM): sizes tell, and without any they are pictures
        if other and (modality == "video") != (sizes.get("video_grid_thw") is not None):
            continue
        marks = torch.eq(shown, token)
        runs = [stop - start for row in marks for start, stop in runs_of(row)]
        if runs:
            _refuse_readers(plan)
            call.captures[modality] = _capture(plan, modality, sizes, runs)


def _ids_beside(
    adapter: ModelAdapter, call: ModelCall, prompts: Mapping[str, Any]
) -> Tensor | None:
    """`[B, Q]` token ids that say what the embeddings are of; None where nothing does.

    Args:
        adapter: The family.
        call: The base model's.
        prompts: Arguments of the `generate` that it is part of, if it is.
    """
    given = call.arguments
    embeds: Tensor = given["inputs_embeds"]
    for ids in (given.get("input_ids"), ids_of(prompts)):
        if isinstance(ids, Tensor) and ids.ndim == 2 and ids.shape[1] == embeds.shape[1]:
            times, rest = divmod(len(embeds), max(len(ids), 1))  # beams stand side by side
            if not rest and times:
                return ids.repeat_interleave(times, dim=0) if times > 1 else ids
    types = given.get("mm_token_type_ids")
    if isinstance(types, Tensor) and types.shape == embeds.shape[:2]:
        ids = torch.full_like(types, -1, dtype=torch.long)
        tokens = adapter.placeholders()
        for number, modality in _MODALITIES.items():
            if modality in tokens:
                ids = ids.masked_fill(types == number, tokens[modality])
        return ids
    return None


def _refuse_readers(plan: Plan) -> None:
    for method in (*plan.methods, *plan.readers):
        missing = method.signals() & (ENCODER_SIGNALS | {Signal.ENCODER_GROUPS})
        if Signal.PADDING in missing and plan.adapter.square_encoder() is None:
            missing -= {Signal.PADDING}
        reads = " and ".join(sorted(signal.value for signal in missing))
        if method.changes_encoder():
            reads = "tokens inside"
        if reads:
            raise UnsupportedMethodError(
                f"{method.name} needs {reads} of the vision encoder, which does not run in a call "
                "with inputs_embeds and no pixel values. Pass pixel values, or compress with a "
                "method that reads features (divprune) or the LLM's attention (fastv)"
            )


def _capture(
    plan: Plan, modality: Modality, given: Mapping[str, Any], runs: list[int]
) -> EncoderCapture:
    adapter = plan.adapter
    geometry = any(one.signals() & {Signal.GRID, Signal.CROPS} for one in plan.readers)
    counts, arguments = adapter.merged_images(modality, given, runs, geometry=geometry)
    asked = ids_of(given)  # `generate` repeats prompts for beams, and not what it keeps for itself
    times = 1 if asked is None else len(given["inputs_embeds"]) // len(asked)
    if sum(runs) not in (sum(counts), times * sum(counts)):
        raise CompressionStateError(
            f"{sum(runs)} {modality} placeholders beside inputs_embeds do not fit images of "
            f"{list(counts)} tokens, as their sizes say: give the sizes of these images"
        )
    sink = EncoderSink(adapter, frozenset(), (), (), plan.backend)
    features = [torch.empty(count, 0) for count in counts]
    capture = EncoderCapture(adapter, modality, features, arguments, sink)
    capture.transient = True
    return capture
