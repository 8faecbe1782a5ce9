"""Set up a prefill: read its layout, find its images and what must be read from attention."""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vispress.adapters.base import Modality
from vispress.devices import sent
from vispress.runtime.encoder.capture import EncoderCapture
from vispress.runtime.forward.attention_reads import AttentionRead, attention_layers, mode_of
from vispress.runtime.forward.model_call import ModelCall
from vispress.runtime.forward.prompt_context import note_prompt_context
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.forward.survey import Survey, layout_key
from vispress.runtime.layout import (
    Document,
    ImageLayout,
    Prompt,
    PromptEnds,
    PromptLayout,
    Runs,
    find_prompts,
    runs_of,
    runs_of_positions,
)
from vispress.runtime.plan.plan import Plan
from vispress.runtime.tokens.images import Image, Located, locate_images, make_buckets
from vispress.types import Placement, Queries

_CODES: dict[Modality, int] = {"image": 1, "video": 2}


def find(
    plan: Plan,
    state: ForwardState,
    call: ModelCall,
    embeds: Tensor,
    documents: Sequence[Document],
    ends: PromptEnds,
) -> None:
    """Locate the images and set up what must be read from attention."""
    if (gist := plan.gist_token) is not None:
        state.gist = _placeholder_mask(plan, call, gist)
    captures = [call.captures[one] for one in plan.placeholders if one in call.captures]
    key = layout_key(plan, state, call, captures, embeds, documents, ends)
    survey = None if key is None else plan.surveys.get(key)
    if survey is not None:
        survey.begin(state, call.captures)
        _read_prompts(plan, state, embeds, survey.texts)
        return
    _survey(plan, state, call, captures, embeds, documents, ends)
    texts = _texts(state, embeds.device) if plan.reads_text else {}
    _read_prompts(plan, state, embeds, texts)
    state.buckets = make_buckets(
        state.shown_images, embeds.device, by_text=plan.by_text, by_ends=plan.reads_ends
    )
    assert state.layout is not None
    assert state.asking is not None
    state.reads = _reads(plan, state.shown_images, state.layout, state.asking)
    if key is not None:
        plan.surveys.put(key, Survey.of(state, texts))


def _read_prompts(
    plan: Plan, state: ForwardState, embeds: Tensor, texts: Mapping[Prompt, Tensor]
) -> None:
    """Note what methods read of the embeddings of a prompt."""
    if plan.reads_context:
        note_prompt_context(state.shown_images, embeds)
    if plan.reads_input:
        state.input_embeddings = embeds.detach()
    for prompt, places in texts.items():
        state.text_embeddings[prompt] = embeds[prompt.row][places].detach()


def _texts(state: ForwardState, device: torch.device) -> dict[Prompt, Tensor]:
    """`[T]` positions of the text of each prompt with images."""
    texts = {image.prompt: image.text for image in state.shown_images}
    return {prompt: sent(text, device) for prompt, text in texts.items()}


def _survey(
    plan: Plan,
    state: ForwardState,
    call: ModelCall,
    captures: Sequence[EncoderCapture],
    embeds: Tensor,
    documents: Sequence[Document],
    ends: PromptEnds,
) -> None:
    """Locate the images of a call."""
    marks = torch.zeros(embeds.shape[:2], dtype=torch.long)
    taken = {plan.placeholders[modality] for modality in call.captures}
    for modality, token in plan.placeholders.items():
        if token in taken and modality not in call.captures:
            continue  # one token for both (GLM): those of this call are of the other
        here = _placeholder_mask(plan, call, token)
        marks = marks.masked_fill(here, _CODES[modality])
    valid = state.host_valid
    located = locate_images(marks, captures, _CODES)
    asking = valid
    if ends.supervised is not None:
        asking = ~ends.supervised if valid is None else valid & ~ends.supervised
    state.layout = _layout(located, documents, marks.shape, valid, asking, ends)
    text = marks == 0 if asking is None else asking & (marks == 0)
    state.images = _images(located, state.layout, text, valid)
    state.asking = torch.ones_like(text) if asking is None else asking


def _layout(
    located: Sequence[Located],
    documents: Sequence[Document],
    shape: Sequence[int],
    valid: Tensor | None,
    asking: Tensor | None,
    ends: PromptEnds,
) -> PromptLayout:
    """Make the layout of a call whose images are located."""
    batch, length = shape
    packed = len(documents) > batch
    lasts = []
    for one in located:
        number = one.sample
        if packed:
            number = next(
                n
                for n, document in enumerate(documents)
                if document.row == one.sample and document.start <= one.first < document.stop
            )
        lasts.append((number, one.last))
    prompts, numbers = find_prompts(documents, lasts, valid, ends)
    images = []
    for one, prompt in zip(located, numbers, strict=True):
        dead: Runs = ()
        if valid is not None and not bool((shown := valid[one.sample][one.positions]).all()):
            dead = runs_of(~shown)
        runs = runs_of_positions(one.positions, one.first, one.last)
        modality = one.capture.modality
        images.append(ImageLayout(modality, one.number, one.sample, prompt, runs, dead))
    hidden = ((),) * batch if asking is None else tuple(runs_of(~row) for row in asking)
    return PromptLayout(batch, length, tuple(documents), prompts, tuple(images), hidden)


def _images(
    located: Sequence[Located], layout: PromptLayout, text: Tensor, valid: Tensor | None
) -> list[Image]:
    """The images with all that is known of them on the host."""
    images: list[Image] = []
    texts: dict[int, Tensor] = {}
    numbers: Counter[int] = Counter()
    for one, place in zip(located, layout.images, strict=True):
        prompt = layout.prompts[place.prompt]
        if place.prompt not in texts:
            span = text[prompt.row, prompt.start : prompt.stop]
            texts[place.prompt] = span.nonzero()[:, 0] + prompt.start
        grid, crops = one.capture.layouts[one.number]
        shown = None
        if place.dead:
            assert valid is not None
            shown = valid[one.sample][one.positions].nonzero()[:, 0]
        image = Image(
            one.sample, one.capture.modality, one.positions, one.capture, one.number, grid, crops,
            prompt, texts[place.prompt], shown, numbers[prompt.document],
        )  # fmt: skip
        numbers[prompt.document] += image.num_shown > 0
        images.append(image)
    for image, one in zip(images, located, strict=True):
        stop = max(image.prompt.stop, one.last + 1)
        image.count_in_prompt = sum(
            other.num_shown > 0
            and other.prompt.document == image.prompt.document
            and where.last < stop
            for other, where in zip(images, located, strict=True)
        )
    return images


def _reads(
    plan: Plan, images: Sequence[Image], layout: PromptLayout, asking: Tensor
) -> list[AttentionRead]:
    """Attention rows that the placements read, each once."""
    found: list[AttentionRead] = []
    for bound in plan.placements:
        placement, reads = bound.placement, {*bound.method.signals()}
        for layer in attention_layers(placement):
            known = next((read for read in found if read.serves(placement, layer)), None)
            if known is None:
                known = read_of(placement, layer, images, layout, asking)
                found.append(known)
            known.reads |= reads
            known.readers[bound.compressor] = bound.method.needs
            known.until = placement.layer
    return found


def read_of(
    placement: Placement,
    layer: int,
    images: Sequence[Image],
    layout: PromptLayout,
    asking: Tensor,
) -> AttentionRead:
    """What is read of a layer for a placement (and others like it): rows of each batch row."""
    assert placement.queries is not None
    wanted = {image: _asking_rows(placement.queries, image, asking) for image in images}
    union: list[set[int]] = [set() for _ in asking]
    for image, asking_rows in wanted.items():
        union[image.sample].update(asking_rows)
    rows = [sorted(places) for places in union]
    places = [{position: i for i, position in enumerate(row)} for row in rows]
    tails = {
        image: [places[image.sample][position] for position in asking_rows]
        for image, asking_rows in wanted.items()
    }
    width = max(map(len, rows))
    padded = [row + row[-1:] * (width - len(row)) if row else [0] * width for row in rows]
    positions = torch.tensor(padded, dtype=torch.long).view(len(rows), width)
    return AttentionRead(
        layer,
        placement.queries,
        mode_of(placement),
        positions,
        tails,
        set(),
        placement.layer,
        groups=_groups(images, layout, asking) if placement.queries is Queries.ALL else None,
    )


def _groups(
    images: Sequence[Image], layout: PromptLayout, asking: Tensor
) -> tuple[Tensor, Mapping[Image, int]] | None:
    """Rows that ask about each image; None where all real rows of its batch row do."""
    if not layout.packed and all(image.prompt.stop == layout.length for image in images):
        return None
    numbers: dict[Image, int] = {}
    prompts: list[list[Prompt]] = [[] for _ in range(layout.batch)]
    for image in images:
        known = prompts[image.sample]
        if image.prompt not in known:
            known.append(image.prompt)
        numbers[image] = known.index(image.prompt)
    groups = torch.zeros(max(map(len, prompts)), *asking.shape, dtype=torch.bool)
    for row, known in enumerate(prompts):
        for number, prompt in enumerate(known):
            span = slice(prompt.start, prompt.stop)
            groups[number, row, span] = asking[row, span]
    return groups, numbers


def _asking_rows(queries: Queries, image: Image, asking: Tensor) -> list[int]:
    """Chunk positions of the rows that ask about an image, ascending."""
    prompt = image.prompt
    if queries is Queries.ALL or not prompt.ends:
        return []
    if queries is Queries.LAST:
        return list(prompt.ends[:1])
    if queries is Queries.ENDS:
        return list(prompt.ends)
    if queries is Queries.LAST_FOUR:
        return image.text_after.tolist()[-4:] or list(prompt.ends[:1])
    if queries is Queries.TEXT_AFTER:
        return image.text_after.tolist()
    whole = asking[image.sample, prompt.start : prompt.stop].nonzero()[:, 0] + prompt.start
    behind: list[int] = whole[whole > image.positions[-1]].tolist()
    return behind or whole[-1:].tolist()


def _placeholder_mask(plan: Plan, call: ModelCall, token: int) -> Tensor:
    """`[B, Q]` bool on the host."""
    input_ids = call.arguments.get("input_ids")
    if isinstance(input_ids, Tensor):
        return torch.eq(call.on_host(input_ids), token)
    embeds: Tensor = call.arguments["inputs_embeds"]
    table = plan.adapter.base.get_input_embeddings()
    placeholder: Tensor = table(torch.tensor(token, device=embeds.device))
    return torch.eq(embeds, placeholder).all(-1).cpu()
