"""What an engine is asked to keep of its pictures, how many tokens that is, and what is refused.

Nothing here knows vLLM: a model without weights is made of the engine's configuration, and
vispress's own rules say whether the method fits it.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from vispress import __version__
from vispress.adapters.base import Modality, ModelAdapter
from vispress.api import attachment_of, compress_model, remove_compression
from vispress.config import from_mapping, load_config, make_compressor, to_mapping
from vispress.errors import BudgetError, ConfigError, UnsupportedMethodError, VispressError
from vispress.kinds import ATTENTION_SIGNALS, ENCODER_SIGNALS, Signal, Stage
from vispress.methods.base import Compressor
from vispress.model_folders import skeleton
from vispress.registry import list_methods
from vispress.request import check_signals
from vispress.runtime.modules import VispressModules, make_modules, shape_of
from vispress.runtime.plan.plan import Plan
from vispress.types import CropLayout, Placement, Positions, VisualTokens, full_index
from vispress.weights import SavedCompressor, read_saved

KEY: Final = "vispress"
"""Where `hf_overrides` says what is asked."""
GIVEN: Final = ENCODER_SIGNALS | {
    Signal.PROJECTOR,
    Signal.ENCODER_GROUPS,
    Signal.TEXT_EMBEDDINGS,
    Signal.INPUT_EMBEDDINGS,
    Signal.GRID,
    Signal.CROPS,
    Signal.DEPTH,
}
"""What is there before the LLM runs, where vLLM shows it."""
Layout = tuple[tuple[int, int, int] | None, CropLayout | None]
_BEFORE: Final = (
    "only methods with one placement before the LLM can be served: vLLM stores keys and values "
    "of equally many tokens in all layers"
)


@dataclass(frozen=True, eq=False)
class Spec:
    """A checked method on the model of an engine.

    Args:
        plan: The method and its placement on a model without weights.
        saved: Parameters of a method that is trained.
        salt: Names method, fields, parameters and version: what another one left in a cache is not
            found.
    """

    plan: Plan
    saved: SavedCompressor | None
    salt: str

    @property
    def method(self) -> Compressor:
        """The compressor, as on transformers."""
        return self.plan.methods[0]

    @property
    def placement(self) -> Placement:
        """Its one placement, before the LLM."""
        return self.plan.placements[0].placement

    @property
    def adapter(self) -> ModelAdapter:
        """What vispress knows about the family; its model has no weights."""
        return self.plan.adapter

    @property
    def refused(self) -> tuple[Modality, ...]:
        """What vLLM serves and the plug-in does not.

        Videos whose frames stand among text (`among_text`), to a method that reads the text: it is
        written when the video is processed, and is told to methods before that.
        """
        return ("video",) if self.reads_text and self.among_text("video") else ()

    def among_text(self, modality: Modality) -> bool:
        """Whether an item's visual tokens stand in several runs, with text between."""
        return modality == "video" and self.adapter.family in ("qwen3_vl", "internvl")

    def seen(self, modality: Modality) -> Modality:
        """Tell what an item is to the model: frames of InternVL's videos are tiles of pictures."""
        return "image" if self.adapter.family == "internvl" else modality

    @property
    def reads_text(self) -> bool:
        """Whether the choice depends on the prompt's text."""
        return self.plan.reads_text

    @property
    def needs_layout(self) -> bool:
        """Whether the count of kept tokens follows from more than the number of tokens."""
        return not self.method.exact

    def parts(self, modality: Modality, num_visual: int) -> int:
        """Count the images that vispress takes an item of vLLM's for: InternVL's are tiles."""
        if self.adapter.family != "internvl":
            return 1
        tiles, _ = self.adapter.merged_images(modality, {}, [num_visual], geometry=False)
        return len(tiles)

    @cached_property
    def _modules(self) -> nn.Module | None:
        made = make_modules(self.adapter, self.plan.methods)
        if not made:
            return None
        assert self.saved is not None
        modules = VispressModules(made)
        self.saved.load_into(modules)
        return modules

    def module(self, device: torch.device) -> Callable[..., Any] | None:
        """Find what calls the method's parameters, on a device; None where it has none."""
        return None if self._modules is None else partial(self._modules.to(device), "0")

    def passes(self, modality: Modality, num_visual: int) -> bool:
        """Whether images or videos of that many tokens stay whole, as on transformers."""
        if self.method.needs == "video" and modality != "video":
            return True
        return self.placement.budget.resolve(num_visual) >= num_visual

    def count(self, modality: Modality, num_visual: int, layout: Layout = (None, None)) -> int:
        """Tell how many tokens stay of an image, tile or video, before the encoder has seen it.

        Args:
            modality: Image or video.
            num_visual: Tokens it has.
            layout: Its grid or crops, looked at where `needs_layout`.
        """
        if self.passes(modality, num_visual):
            return num_visual
        if self.needs_layout:
            return _rehearsed(self, num_visual, *layout)
        return self.placement.budget.resolve(num_visual)


def read_spec(config: Any) -> Spec | None:
    """Read what `hf_overrides={"vispress": {...}}` put into a model's configuration.

    Either `method` and its fields, or `config`: a YAML file, or a folder of `save_compression`;
    beside them `positions`, as in `compress_model`.

    Args:
        config: The model's configuration, of transformers.

    Returns:
        None where nothing is asked.

    Raises:
        VispressError: As `compress_model`; and `UnsupportedMethodError` for a method that vLLM
            cannot serve, with the reason and those that it can.
    """
    given = getattr(config, KEY, None)
    if given is None:
        return None
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(
            f'hf_overrides: {KEY} must be a mapping such as {{"method": "divprune", '
            f'"keep_ratio": 0.25}}, got {given!r}'
        )
    rest = dict(given)
    positions, path = rest.pop("positions", None), rest.pop("config", None)
    if path is not None and rest:
        raise ConfigError(f"hf_overrides: {KEY} has config and {', '.join(rest)}; give one of them")
    asked = from_mapping(rest, f"hf_overrides: {KEY}") if path is None else load_config(path)
    if not isinstance(asked, Compressor):
        names = ", ".join(one.name for one in asked)
        raise UnsupportedMethodError(f"a chain ({names}) cannot be served by vLLM; give one method")
    folder = Path(path) if path is not None and Path(path).is_dir() else None
    saved = None if folder is None else read_saved(folder)
    plain = copy.deepcopy(config)
    delattr(plain, KEY)
    model = skeleton(plain)
    method: Mapping[str, Any] = {"config": path} if folder else {"method": asked}
    compress_model(model, **method, positions=positions)
    plan: Plan = attachment_of(model).plan
    remove_compression(model)
    why = _why_not(asked, plan.adapter, plan.placements[0].positions, saved is not None)
    if why is not None:
        raise UnsupportedMethodError(
            f"{why}. Methods that vLLM can serve on {plan.adapter.family}: "
            f"{', '.join(servable(plan.adapter))}"
        )
    parameters = None if saved is None else saved.card.get("sha256")
    words = [__version__, to_mapping(asked), plan.placements[0].positions, parameters]
    text = json.dumps(words, sort_keys=True)
    return Spec(plan, saved, hashlib.sha256(text.encode()).hexdigest()[:16])


def servable(adapter: ModelAdapter) -> list[str]:
    """List registered methods that can be served on a family, some with a field set."""
    found = []
    for name in list_methods():
        try:
            method = make_compressor(name, keep_ratio=0.25)
            check_signals(method, adapter)
            if _why_not(method, adapter, "compact", True) is None:
                found.append(name)
        except VispressError:  # takes no such budget, or does not fit the family
            continue
    return found


def _why_not(
    method: Compressor, adapter: ModelAdapter, positions: Positions, saved: bool
) -> str | None:
    """Say why vLLM cannot serve a method that fits the family; None if it can."""
    placements = method.placements(len(adapter.decoder_layers))
    stages = dict.fromkeys(p.stage.value for p in placements)
    if len(placements) != 1 or placements[0].stage is not Stage.PRE_LLM:
        return f"{method.name} acts at {', '.join(stages)} ({len(placements)} times), and {_BEFORE}"
    (placement,) = placements
    missing = method.signals() - GIVEN
    if placement.probe is not None or placement.queries is not None or missing:
        names = ", ".join(sorted(missing)) or "attention"
        return f"{method.name} reads {names}, which vLLM does not show before the LLM runs"
    if placement.adaptive or (not method.exact and method.uncapturable()):
        why = method.uncapturable() or "the picture decides"
        return (
            f"{method.name} keeps a number of tokens that is not known before the encoder runs "
            f"({why}), and vLLM must know it; give keep_ratio or num_tokens where it takes one"
        )
    if (layer := _late_layer(method, adapter)) is not None:
        return (
            f"{method.name} reads layer {layer} of the vision encoder, and vLLM builds none behind "
            f"layer {adapter.feature_layer()}, which gives the features"
        )
    if placement.images != "all":
        return f"{method.name} acts on the {placement.images} images of a prompt only"
    if placement.budget.resolve(1) == 0:
        return f"{method.name} keeps no token, and a picture must have a place in vLLM's prompt"
    if method.trained and not saved:
        return f"{method.name} has parameters: give config=FOLDER, as save_compression writes it"
    if positions == "original" and not adapter.mrope:
        return (
            f"{method.name} leaves gaps in the positions (positions='original'), which vLLM has "
            f'for no {adapter.family} model; give "positions": "compact"'
        )
    return None


def _late_layer(method: Compressor, adapter: ModelAdapter) -> int | None:
    """Find a layer that is read of a tower, and that vLLM leaves away; None where there is none."""
    if adapter.packed or not method.signals() & (ATTENTION_SIGNALS | {Signal.VISION_KEYS}):
        return None
    last = adapter.feature_layer()
    layers = method.encoder_layers(len(adapter.encoder_attentions()), last)
    return next((layer for layer in layers if layer > last), None)


def _rehearsed(
    spec: Spec, num_visual: int, grid: tuple[int, int, int] | None, crops: CropLayout | None
) -> int:
    """Ask a method whose count follows from the layout alone, by a plan for an empty image."""
    if crops is None:
        return _of_grid(spec, num_visual, grid)
    return _asked(spec, num_visual, grid, crops)


@lru_cache(maxsize=256)
def _of_grid(spec: Spec, num_visual: int, grid: tuple[int, int, int] | None) -> int:
    return _asked(spec, num_visual, grid, None)


def _asked(
    spec: Spec, num_visual: int, grid: tuple[int, int, int] | None, crops: CropLayout | None
) -> int:
    shape = shape_of(spec.adapter)
    empty = torch.zeros(1, num_visual, shape.width)
    tokens = VisualTokens(
        features=empty,
        index=full_index(1, num_visual, empty.device),
        num_original=num_visual,
        num_entered=num_visual,
        grid=grid,
        crops=crops,
        vision_features=empty.new_zeros(1, num_visual, shape.vision_width),
        projector=lambda x: x.new_zeros(*x.shape[:-1], shape.width),
        text_embeddings=empty[:, :0],
        module=spec.module(empty.device),
    )
    (count,) = spec.method.plan(tokens, spec.placement.budget.resolve(num_visual)).counts
    if count < 1:
        raise BudgetError(f"{spec.method.name} would keep nothing of {num_visual} tokens")
    return count
