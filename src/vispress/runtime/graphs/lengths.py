"""Let prompts of several lengths share a graph, by text behind their last token.

Attention looks back alone, so rows behind a prompt change nothing in front of them. A prompt is
lengthened to a multiple of so many tokens; which rows its logits are of is a value of the call, and
what stands behind it is not copied into caches and records (`without`). Images stay where they are:
their places are the layout's. Methods that read text, or act where its rows are, would see more of
it, and prompts keep their length under them.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from vispress.kinds import Stage
from vispress.runtime.forward.apply_placement import asks_prompt
from vispress.runtime.forward.model_call import brings_images
from vispress.runtime.forward.prefill_record import Alive
from vispress.runtime.forward.rehearsal import told_lengths
from vispress.runtime.graphs.arguments import MASK, POSITIONS, SEQUENCES, Arguments
from vispress.runtime.graphs.site import Site
from vispress.runtime.kv_cache.slots import Slots
from vispress.runtime.plan.plan import Plan
from vispress.runtime.tokens.live_tokens import LiveTokens

KEEP: Final = "logits_to_keep"
_OF_PICTURES: Final = ("pixel_", "image_", "video_", "second_per_grid", "batch_num_images")
"""How names of arguments begin that are as long as there are pictures."""
_AHEAD: Final = (Stage.PRE_LLM, Stage.ENCODER)


@dataclass(frozen=True, eq=False)
class Fitted:
    """Arguments of a prefill, as long as its graph.

    Args:
        given: The arguments.
        length: Tokens of the prompt.
        behind: Rows behind it; None where the graph is of this length alone.
        why: Why it is, for reports; None also where nobody asked for others.
        key: What prefills of one graph share.
    """

    given: Arguments
    length: int
    behind: int | None
    why: str | None
    key: Hashable

    @classmethod
    def of(cls, site: Site, given: Arguments, cache: Cache | None, bucket: int) -> "Fitted":
        """Lengthen a prompt to a multiple of so many tokens, where that changes nothing of it.

        Args:
            site: The model.
            given: Its arguments.
            cache: Its empty cache, or None.
            bucket: So many; 1 for lengths as they are.
        """
        length, told = given.ids.shape[1], told_lengths()
        more, why, special = -length % bucket, None, site.special
        if bucket > 1:
            why = _why_exact(site, given, told, cache, length + more)
        if bucket == 1 or why is not None:
            return cls(given, length, None, why, (told, given.key(special)))
        filler = next(token for token in count() if token not in special)
        longer = given.lengthened(more, filler)
        return cls(longer, length, more, None, ("lengthened", longer.key(special)))

    @property
    def kept(self) -> int | None:
        """How many rows have logits, where a lengthened prompt's are not wanted of all."""
        wanted = self.given.plain.get(KEEP)
        return wanted if self.behind is not None and wanted else None


def _why_exact(
    site: Site,
    given: Arguments,
    told: Sequence[tuple[int, ...] | None],
    cache: Cache | None,
    size: int,
) -> str | None:
    """Say why a prompt cannot be lengthened to `size` tokens."""
    attachment, why = site.attachment, None
    if attachment is not None and brings_images(given.tensors):
        why = _why_no_method(attachment.plan)
    return why or _why_no_model(site, given.plain, size) or _why_no_call(given, told, cache)


def _why_no_method(plan: Plan) -> str | None:
    """Say which method would see what stands behind a prompt."""
    for bound in plan.placements:
        if bound.placement.stage not in _AHEAD:
            return f"{bound.method.name} acts in the LLM, among rows of text"
        if asks_prompt(bound):
            return f"{bound.method.name} reads the text of the prompt"
    return None


def _why_no_model(site: Site, plain: Mapping[str, Any], size: int) -> str | None:
    """Say what of a model rests on how many rows there are."""
    owner: Any = site.owner
    config: Any = site.adapter.language_model.config
    if any(site.windows):
        return "layers have windows of attention, or attention of several kinds"
    rotary = getattr(site.adapter.language_model, "rotary_emb", None)
    if getattr(rotary, "rope_type", None) not in ("default", "linear", "llama3", "yarn"):
        return "rotary tables rest on the length of the prompt"
    both = getattr(config, "use_bidirectional_attention", None) in (True, "all")
    if both or getattr(config, "is_causal", None) is False:
        return "text is not causal"
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and size > most:
        return f"the model has {most} positions"
    hidden = plain.get("output_hidden_states")
    if owner.config.get_text_config().output_hidden_states if hidden is None else hidden:
        return "output_hidden_states is on"
    whole = plain.get("return_dict")
    if not (owner.config.return_dict if whole is None else whole):
        return "return_dict is off"
    return None


def _why_no_call(
    given: Arguments, told: Sequence[tuple[int, ...] | None], cache: Cache | None
) -> str | None:
    """Say what of a call keeps text from standing behind it."""
    batch, length = given.ids.shape
    for name in given.tensors:
        if name not in SEQUENCES and not name.startswith(_OF_PICTURES):
            return f"{name} is given"
    mask = given.host.get(MASK)
    if mask is not None and (mask.ndim != 2 or not bool(mask[:, -1].all())):
        return "attention_mask hides the last token, or is not [B, L]"
    places = given.host.get(POSITIONS)
    if places is not None and not _goes_on(places, mask):
        return "position_ids do not go on by one"
    if cache is not None and any(isinstance(layer, StaticLayer) for layer in cache.layers):
        return "its KV cache is static"
    wanted = given.plain.get(KEEP) or 0
    if not isinstance(wanted, int) or wanted > length:
        return f"{KEEP} is {wanted!r}"
    block, generating, owner = told
    counts = [length] * batch if mask is None else mask.bool().sum(1).tolist()
    if generating is not None and batch % len(generating) == 0:
        generating = tuple(n for n in generating for _ in range(batch // len(generating)))
    if block is not None or owner is not None or generating not in (None, tuple(counts)):
        return "prompt lengths are told, and are not those of its rows"
    return None


def _goes_on(places: Tensor, mask: Tensor | None) -> bool:
    """Whether position ids of text go on by one, where none are hidden."""
    if places.ndim == 3:  # M-RoPE: positions of text come first of four
        if len(places) != 4:
            return True
        places = places[0]
    steps = places[:, 1:] == places[:, :-1] + 1
    if mask is not None:
        steps = steps | (mask[:, :-1] == 0)
    return bool(steps.all())


# --- what stands behind a prompt, and what is without it


def without(value: Any, behind: int) -> dict[str, Any]:
    """Give the fields of an object that a lengthened prefill left, without its last rows.

    Args:
        value: A cache layer, its slots, live rows, or an account of them; others are as they are.
        behind: So many rows.
    """
    fields: dict[str, Any] = vars(value)
    if isinstance(value, DynamicLayer):
        return fields | {name: _cut(fields[name], behind, 2) for name in ("keys", "values")}
    if isinstance(value, Slots):
        places, valid = value.positions, value.valid
        size, logical = value.size - behind, value.logical - behind
        valid = None if valid is None else valid[:, :size]
        return vars(Slots(places[:, :size], valid, value.shift, logical, value.padded))
    if isinstance(value, LiveTokens):
        return vars(_rows_without(value, behind))
    if isinstance(value, Alive):
        plain = {name: one for name, one in fields.items() if name != "tokens"}
        return plain | {"valid": _cut(value.valid, behind, 1)}
    return fields


def _rows_without(rows: LiveTokens, behind: int) -> LiveTokens:
    counts = tuple(held - behind for held in rows.counts)
    made = LiveTokens(
        rows.index[:, :-behind],
        _cut(rows.valid, behind, 1),
        rows.length - behind,
        counts,
        _cut(rows.dropped, behind, 1),
        rows.whole,
    )
    made.gone = _cut(rows.gone, behind, 1)
    return made


def _cut(tensor: Tensor | None, behind: int, dim: int) -> Tensor | None:
    return None if tensor is None else tensor.narrow(dim, 0, tensor.shape[dim] - behind)


def shown_without(result: Any, behind: int) -> Any:
    """Give what a forward gave of all its rows, without the last ones."""
    names = [name for name in ("logits", "last_hidden_state") if name in result]
    return type(result)(**{**result, **{name: _cut(result[name], behind, 1) for name in names}})


def places_of_logits(length: int, kept: int, device: torch.device) -> Tensor:
    """`[kept]` int64, the last rows of a prompt."""
    return torch.arange(length - kept, length, device=device)
