"""Keep what VoCo tokens hold of a picture or a video, and ask about it later, as often as wanted.

A `VoCoCache` is the part of a KV cache that stays when a picture has been compressed: keys and
values of its VoCo tokens and of text in front of them, 2 * layers * KV width * tokens * bytes. The
model that made it, or an equal one, goes on from it like from any KV cache, compressed or not.

What was made of a picture of people is personal data derived from it: keep and delete it likewise.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from torch import Tensor, nn

from vispress.adapters.base import ModelAdapter, find_adapter
from vispress.api import attachment_of
from vispress.errors import ConfigError
from vispress.weights import hash_config

FORMAT: Final = "vispress.voco_cache.1"


@dataclass(frozen=True, eq=False)
class VoCoCache:
    """Keys and values of a compressed picture or video, in every decoder layer.

    Args:
        keys: `[Hkv, T, D]` a layer, post-RoPE.
        values: `[Hkv, T, D]` a layer.
        positions: `[T]` int64, or `[3, T]` for M-RoPE: position ids that the keys were rotated by.
        next_position: Position id of the text behind.
        voco_tokens: How many of the T tokens are VoCo tokens; others are text.
        config_hash: Of the config of the model that made it.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    positions: Tensor
    next_position: int
    voco_tokens: int
    config_hash: str

    @property
    def num_tokens(self) -> int:
        """Tokens in each layer (T)."""
        return self.keys[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(x.numel() * x.element_size() for x in (*self.keys, *self.values))

    @classmethod
    @torch.no_grad()
    def compress(cls, model: nn.Module, *, start: int = 0, **inputs: Any) -> "VoCoCache":
        """Run the prompt up to its last VoCo token, and keep what it leaves in the KV cache.

        Args:
            model: Compressed by `voco`.
            start: Position id of the prompt's first token.
            **inputs: What the processor makes of one prompt without its question: input ids that
                end with VoCo tokens, pixel values, and so on; no padding.

        Raises:
            CompressionStateError: The model is not compressed.
            ConfigError: It is by another method, or with compact positions; the prompt is padded,
                several, without an image, or does not end with a VoCo token.
        """
        from transformers import DynamicCache

        from vispress.runtime.kv_cache.hf_compat import CACHE

        plan = attachment_of(model).plan
        ids = _one_prompt(plan.gist_token, inputs)
        places = _position_ids(plan.adapter, inputs) + start
        cache = DynamicCache()
        given = {name: value for name, value in inputs.items() if name != "position_ids"}
        model(**given, position_ids=places, use_cache=True, **{CACHE: cache})
        layers: Any = cache.layers
        slots = getattr(layers[0], "slots", None)
        if slots is None:
            raise ConfigError("the prompt has no image or video; give its pixel values")
        if slots.shift is not None:
            raise ConfigError(
                "another method of the chain renumbers positions, which a VoCo cache keeps; give "
                "positions='original' to compress_model"
            )
        held = slots.positions[0].to(ids.device)
        return cls(
            keys=tuple(layer.keys[0].contiguous() for layer in layers),
            values=tuple(layer.values[0].contiguous() for layer in layers),
            positions=places.squeeze(-2)[..., held.to(places.device)].cpu(),
            next_position=int(places.max()) + 1,
            voco_tokens=int((ids[held] == plan.gist_token).sum()),
            config_hash=hash_config(plan.adapter.base.config),
        )

    @classmethod
    def compress_segments(
        cls, model: nn.Module, segments: Sequence[Mapping[str, Any]]
    ) -> "VoCoCache":
        """Compress the segments of a video each on its own, and join them in time order.

        Each segment's positions start behind as many positions as the earlier ones left tokens, so
        that VoCo tokens follow each other and a long video stays within the model's positions
        (reconstructed). A segment that is shorter than those before it starts later, so that its
        VoCo tokens still stand behind theirs.

        Args:
            model: As in `compress`.
            segments: Inputs of `compress`, one segment each.

        Raises:
            ConfigError: There are none; and as `compress`.
        """
        made: list[VoCoCache] = []
        token = attachment_of(model).plan.gist_token
        for inputs in segments:
            start = sum(cache.num_tokens for cache in made)
            if made:
                ids = _one_prompt(token, inputs)
                first = int((ids == token).nonzero()[0, 0])
                alone = _position_ids(find_adapter(model), inputs)[..., first].max()
                start = max(start, made[-1].next_position - int(alone))
            made.append(cls.compress(model, **{**inputs, "start": start}))
        return cls.concatenate(made)

    @classmethod
    def concatenate(cls, caches: Sequence["VoCoCache"]) -> "VoCoCache":
        """Join caches of one model, in the order in which text behind them sees them.

        Their positions stay as they are: `compress_segments` makes them follow each other.

        Raises:
            ConfigError: There are none, or they are of different models.
        """
        if not caches or len({cache.config_hash for cache in caches}) > 1:
            made = "none was given" if not caches else "they were made by models of other configs"
            raise ConfigError(f"caches to concatenate must be of one model, and {made}")
        layers = range(len(caches[0].keys))
        return cls(
            keys=tuple(torch.cat([c.keys[i] for c in caches], dim=1) for i in layers),
            values=tuple(torch.cat([c.values[i] for c in caches], dim=1) for i in layers),
            positions=torch.cat([cache.positions for cache in caches], dim=-1),
            next_position=max(cache.next_position for cache in caches),
            voco_tokens=sum(cache.voco_tokens for cache in caches),
            config_hash=caches[0].config_hash,
        )

    def inputs_for(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
        """Make the arguments with which `model(...)` or `model.generate(...)` goes on from here.

        The KV cache in it is new each time: questions do not see each other.

        Args:
            input_ids: `[R, Q]`, text behind the VoCo tokens: one or several questions.
            attention_mask: `[R, Q]`, 0 on padding, which stands on the left; None for no padding.

        Raises:
            ConfigError: `input_ids` is no such tensor, or empty.
        """
        from transformers import DynamicCache

        from vispress.runtime.kv_cache.hf_compat import CACHE

        if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or not input_ids.numel():
            raise ConfigError(f"input_ids must be a tensor [R, Q] of questions, got {input_ids!r}")
        rows, device = len(input_ids), input_ids.device
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        ids = (mask.cumsum(-1) - 1).clamp(min=0) + self.next_position
        ids = ids.expand(3, -1, -1) if self.positions.ndim == 2 else ids
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            each = (x.to(device).expand(rows, -1, -1, -1) for x in (keys, values))
            cache.update(*each, layer)
        held = mask.new_ones(rows, self.num_tokens)
        whole = torch.cat([held, mask], dim=1)
        given = {"input_ids": input_ids, "attention_mask": whole, "position_ids": ids}
        return given | {CACHE: cache}

    def to(self, *args: Any, **kwargs: Any) -> "VoCoCache":
        """Move keys and values to a device or dtype, as `Tensor.to`."""
        keys, values = (
            tuple(x.to(*args, **kwargs) for x in part) for part in (self.keys, self.values)
        )
        return replace(self, keys=keys, values=values)

    def save(self, path: str | Path) -> None:
        """Write it into one safetensors file, with what it needs to be used again.

        Raises:
            ConfigError: The file cannot be written.
        """
        from safetensors.torch import save

        tensors = {f"keys.{i}": x.cpu().contiguous() for i, x in enumerate(self.keys)}
        tensors |= {f"values.{i}": x.cpu().contiguous() for i, x in enumerate(self.values)}
        counts = {"tokens": self.num_tokens, "voco_tokens": self.voco_tokens}
        counts |= {"next_position": self.next_position}
        card = {"format": FORMAT, "config_sha256": self.config_hash}
        card |= {name: str(count) for name, count in counts.items()}
        path = Path(path)
        data = save({**tensors, "positions": self.positions.contiguous()}, metadata=card)
        try:
            with TemporaryDirectory(dir=path.parent, prefix=".saving") as made:
                (whole := Path(made) / path.name).write_bytes(data)
                whole.replace(path)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> "VoCoCache":
        """Read what `save` wrote, for a model with the config of the one that made it.

        Args:
            path: The file.
            model: What is to go on from it; keys and values come to its device and dtype. That its
                weights are those that made the cache is not checked.

        Raises:
            ConfigError: The file cannot be read, is no such cache, or of another model.
        """
        from safetensors import SafetensorError, safe_open

        adapter = find_adapter(model)
        try:
            with safe_open(str(path), framework="pt") as file:
                card = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise ConfigError(f"cannot read {path} as a safetensors file: {error}") from error
        if card.get("format") != FORMAT:
            raise ConfigError(
                f"{path}: format must be {FORMAT!r}, got {card.get('format')!r}; a VoCo cache is "
                "what VoCoCache.save writes"
            )
        if (own := hash_config(adapter.base.config)) != card.get("config_sha256"):
            raise ConfigError(
                f"{path} was made by a model of another config (sha256 "
                f"{str(card.get('config_sha256'))[:12]}, this model's is {own[:12]}); compress the "
                "picture with this model"
            )
        layers = range(len(adapter.decoder_layers))
        names = [f"{kind}.{i}" for kind in ("keys", "values") for i in layers]
        count, counts = card.get("tokens"), ("next_position", "voco_tokens")
        fits = tensors.keys() == {*names, "positions"} and all(
            str(x.shape[-1 if name == "positions" else -2]) == count for name, x in tensors.items()
        )
        if not fits or not all(card.get(name, "").isdecimal() for name in counts):
            raise ConfigError(f"{path} does not hold {count} tokens in {len(layers)} layers")
        weight = adapter.base.get_input_embeddings().weight
        found = cls(
            keys=tuple(tensors[f"keys.{i}"] for i in layers),
            values=tuple(tensors[f"values.{i}"] for i in layers),
            positions=tensors["positions"],
            next_position=int(card["next_position"]),
            voco_tokens=int(card["voco_tokens"]),
            config_hash=own,
        )
        return found.to(device=weight.device, dtype=weight.dtype)


def _one_prompt(token: int | None, inputs: Mapping[str, Any]) -> Tensor:
    """The ids `[L]` of one prompt that ends with a VoCo token.

    Raises:
        ConfigError: It is none.
    """
    if token is None:
        raise ConfigError("the model is compressed by a method without VoCo tokens; use 'voco'")
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or len(ids) != 1:
        found = "no input_ids" if not isinstance(ids, Tensor) else f"{len(ids)} rows"
        raise ConfigError(f"a VoCo cache is made of one prompt, got {found}; give one at a time")
    if isinstance(mask, Tensor) and not bool(mask.bool().all()):
        raise ConfigError("the prompt of a VoCo cache has padding; give it without")
    if int(ids[0, -1]) != token:
        raise ConfigError(
            f"the prompt of a VoCo cache ends with its VoCo tokens ({token}), got {int(ids[0, -1])}"
            "; what stands behind them is a question: give it to inputs_for"
        )
    return ids[0]


def _position_ids(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> Tensor:
    """`[1, L]` or `[3, 1, L]`, position ids of a prompt that starts at 0."""
    ids: Tensor = inputs["input_ids"]
    if not adapter.mrope:
        return torch.arange(ids.shape[1], device=ids.device)[None]
    base: Any = adapter.base
    names = inspect.signature(base.get_rope_index).parameters
    if (types := "mm_token_type_ids") in names and types not in inputs:
        raise ConfigError(f"{types} are missing, by which positions go; the processor gives them")
    found: Tensor = base.get_rope_index(**{k: v for k, v in inputs.items() if k in names})[0]
    return found
