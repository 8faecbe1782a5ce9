"""Requests of an engine that compresses: short prompts, and names that tell compressors apart."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.processing import PromptReplacement

from vispress.adapters.base import Modality
from vispress.integrations.vllm.engine import check_modalities
from vispress.integrations.vllm.press import TEXT, as_tiles
from vispress.integrations.vllm.spec import Layout, Spec, read_spec

_OWN: Final = "vispress_texts"
"""Our option among those of a processor: rows of `TEXT` by modality."""


class ShortPrompts:
    """Put before a processor of vLLM's: its prompts have a place for each token that is kept.

    A method that reads the prompt is handed its text with each picture, and the text is part of the
    picture's name: nothing that one question left in a cache is found by another.
    """

    info: Any

    def __init__(self, info: Any, dummy_inputs: Any) -> None:
        super().__init__(info, dummy_inputs)  # type: ignore[call-arg]
        self.vispress: Spec | None = read_spec(info.get_hf_config())

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """As vLLM's, with the prompt's text beside each picture where it is read."""
        spec = self.vispress
        if spec is not None:
            counts = inputs.mm_data_items.get_all_counts()
            check_modalities(spec, lambda modality: counts.get(modality, 0))
        if spec is not None and spec.reads_text:
            options = {
                **inputs.hf_processor_mm_kwargs,
                _OWN: _texts(spec, inputs.prompt, self._around()),
            }
            inputs = replace(inputs, hf_processor_mm_kwargs=options)
        return super().apply(inputs, timing_ctx)  # type: ignore[misc]

    def _around(self) -> tuple[list[int], list[int]]:
        """Text that a processor itself puts before and behind each picture (InternVL's)."""
        processor = self.info.get_hf_processor()
        marks = [getattr(processor, f"{end}_image_token", None) for end in ("start", "end")]
        before, behind = (
            [] if mark is None else [self.info.get_tokenizer().convert_tokens_to_ids(mark)]
            for mark in marks
        )
        return before, behind

    def _get_mm_hashes(self, inputs: Any) -> Any:
        own = inputs.hf_processor_mm_kwargs.get(_OWN, {})
        plain = replace(inputs, hf_processor_mm_kwargs=_without(inputs.hf_processor_mm_kwargs))
        hashes = super()._get_mm_hashes(plain)  # type: ignore[misc]
        if self.vispress is None:
            return hashes
        salt = self.vispress.salt
        return {
            modality: [
                "-".join([name, salt, *_digest(own.get(modality), i)])
                for i, name in enumerate(names)
            ]
            for modality, names in hashes.items()
        }

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Any) -> Any:
        options = super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached)  # type: ignore[misc]
        if _OWN not in options:
            return options
        missing = {
            modality: [rows[i] for i, there in enumerate(mm_is_cached[modality]) if not there]
            for modality, rows in options[_OWN].items()
            if modality in mm_is_cached
        }
        return {**options, _OWN: missing}

    def _get_hf_mm_inputs(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        made = super()._get_hf_mm_inputs(mm_items, _without(hf_kwargs))  # type: ignore[misc]
        for modality, count in mm_items.get_all_counts().items():
            rows = hf_kwargs.get(_OWN, {}).get(modality)
            if rows and count:
                made.passthrough_data[f"{TEXT}_{modality}"] = torch.tensor(rows)
        return made

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Any:
        fields = super()._get_mm_fields_config(hf_inputs, _without(hf_processor_mm_kwargs))  # type: ignore[misc]
        own = {
            f"{TEXT}_{modality}": MultiModalFieldConfig.batched(modality)
            for modality in ("image", "video")
            if f"{TEXT}_{modality}" in hf_inputs
        }
        return {**fields, **own}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any
    ) -> Sequence[Any]:
        options = _without(hf_processor_mm_kwargs)
        updates: Sequence[Any] = super()._get_prompt_updates(mm_items, options, out_mm_kwargs)  # type: ignore[misc]
        if self.vispress is None:
            return updates
        return [
            PromptReplacement(
                modality=update.modality,
                target=update.target,
                replacement=partial(_shortened, self.vispress, update, out_mm_kwargs),
            )
            if update.modality in ("image", "video")
            else update
            for update in updates
        ]


def _without(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != _OWN}


def _texts(
    spec: Spec, prompt: Sequence[int], around: tuple[list[int], list[int]]
) -> dict[str, list[list[int]]]:
    """Rows of `TEXT` by modality, from a prompt with one placeholder for each picture."""
    kinds: dict[int, Modality] = {i: kind for kind, i in spec.adapter.placeholders().items()}
    words: list[int] = []
    places: list[tuple[Modality, int]] = []
    for token in prompt:
        if token not in kinds:
            words.append(token)
            continue
        words += around[0]
        places.append((kinds[token], len(words)))
        words += around[1]
    rows: dict[str, list[list[int]]] = {}
    for modality, seen in places:
        rows.setdefault(modality, []).append([len(words) - seen, *words])
    return rows


def _digest(rows: Sequence[Sequence[int]] | None, item: int) -> list[str]:
    """A name of the text that an item is seen with; none where no text is read."""
    if rows is None:
        return []
    return [hashlib.sha256(repr(list(rows[item])).encode()).hexdigest()[:16]]


def _shortened(spec: Spec, update: Any, items: Any, item: int) -> Any:
    """The tokens that stand for a picture, without those that will have been dropped."""
    details = update.resolve(item).content
    full = list(details.full)
    shows = [True] * len(full) if details.is_embed is None else details.is_embed(full).tolist()
    modality: Modality = spec.seen(update.modality)
    visual = sum(shows)
    parts = spec.parts(modality, visual)
    each = visual // parts
    layout: Layout = (None, None)
    if spec.needs_layout:
        call = MultiModalKwargsItems({update.modality: [items[update.modality][item]]}).get_data()
        if modality != update.modality:
            call = as_tiles(call)
        layout = spec.adapter.layouts(modality, [each] * parts, call)[0]
    stays, before, short = spec.count(modality, each, layout), 0, []
    for token, visible in zip(full, shows, strict=True):
        if not visible or before % each < stays:
            short.append(token)
        before += visible
    if spec.among_text(update.modality) and spec.seen("video") == "video":
        # which frames the places go to shows behind the encoder, from which all rows come
        return replace(details, full=short, is_embed=None)
    return replace(details, full=short)
