"""The runtime's knowledge of a model family. Everything here may know transformers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vispress.adapters.decoder import layer_types
from vispress.adapters.values import Encode, EncoderBlock, Grid, Modality
from vispress.errors import UnsupportedMethodError, UnsupportedModelError
from vispress.types import CLS_SIGNALS, CropLayout, Need, Signal, TwoLayer


class ModelAdapter(ABC):
    """Parts of the models of one family. Stateless: holds a reference to the base model only.

    Args:
        base: The base model (e.g. `LlavaModel`), which owns vision encoder and language model.
    """

    family: ClassVar[str]
    """Name for users, e.g. `"llava"`."""
    base_classes: ClassVar[tuple[str, ...]]
    """Class names of base models this adapter serves."""
    transformers: ClassVar[str] = "5.17"
    """Oldest supported release of transformers."""
    has_cls: ClassVar[bool] = False
    """Whether the vision encoder has a [CLS] token at index 0 of its sequence."""
    kinds: ClassVar[frozenset[Need]] = frozenset()
    """Special kinds of visual input: AnyRes crops, videos."""
    packed: ClassVar[bool] = False
    """Whether the encoder runs all images as one packed sequence (`pack` then gets `[S, C]`)."""
    mrope: ClassVar[bool] = False
    """Whether positions have three axes (then `compact` positions are not defined)."""

    def __init__(self, base: nn.Module) -> None:
        self.base: Any = base

    # --- the language model

    @property
    def language_model(self) -> Any:
        """The decoder stack (a module) that is called with `inputs_embeds`."""
        return self.base.language_model

    @property
    def decoder_layers(self) -> Sequence[nn.Module]:
        """Its decoder layers in order; each has `self_attn`, `mlp` and `input_layernorm`."""
        return self.base.language_model.layers  # type: ignore[no-any-return]

    @property
    def layer_types(self) -> Sequence[str]:
        """Kind of attention of each decoder layer, as transformers names it."""
        return layer_types(self.language_model.config, len(self.decoder_layers))

    @abstractmethod
    def placeholders(self) -> Mapping[Modality, int]:
        """Name the token id of one visual token, for each modality the model reads."""

    # --- the vision side

    @abstractmethod
    def encoder_attentions(self) -> Sequence[nn.Module]:
        """List the vision encoder's attention modules, one a layer (`ALL_ATTENTION_FUNCTIONS`)."""

    @abstractmethod
    def feature_layer(self) -> int:
        """Find the layer, in `encoder_attentions`, whose output becomes the visual tokens.

        For windowed encoders, the last layer with full attention (window columns do not compare).
        """

    def feature_choice(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
        """Say which features an encoder call gives, by its arguments or else by the config.

        Empty where a family has no arguments that choose.

        Args:
            call: Arguments of `get_<modality>_features` by name; empty for the config's choice.
        """
        return {}

    def encoder_blocks(self) -> Sequence[EncoderBlock]:
        """List the encoder's layers up to the one whose output goes to the projector.

        Empty where they are not built that way: nothing can merge there.
        """
        return ()

    def encoder_grids(
        self, modality: Modality, call: Mapping[str, Any]
    ) -> Sequence[tuple[int, int]] | None:
        """Count rows and columns of tokens of each sequence (one, unless `packed`); None: no grid.

        Args:
            modality: Image or video.
            call: Arguments of `get_<modality>_features` by name; empty for the config's size.
        """
        return None

    def encoder_taps(self) -> Sequence[nn.Module]:
        """List modules that take an earlier layer's output as their first argument (DeepStack)."""
        return ()

    def patches_per_token(self) -> int:
        """Count the patches that become one visual token."""
        return 1

    def patch_order(self, modality: Modality, call: Mapping[str, Any]) -> Tensor | None:
        """Order the `[n]` patches of one encoder sequence by token; None where they stand so."""
        return None

    def sequences(
        self, modality: Modality, call: Mapping[str, Any], length: int
    ) -> Sequence[Sequence[int]]:
        """Count the tokens of each encoder sequence (crop, frame, window) of each image or video.

        Args:
            modality: Image or video.
            call: Arguments of `get_<modality>_features` by name.
            length: Tokens of one sequence, where all have the same number (not `packed`).
        """
        raise NotImplementedError

    def merged_images(
        self, modality: Modality, call: Mapping[str, Any], runs: Sequence[int], *, geometry: bool
    ) -> tuple[Sequence[int], Mapping[str, Any]]:
        """Tell apart images or videos whose features the caller merged into embeddings.

        Args:
            modality: Image or video.
            call: Arguments of the base model's forward by name; there are no pixels among them.
            runs: Lengths of the runs of placeholders, in order of rows and positions.
            geometry: Whether a method reads grids or crops.

        Returns:
            Tokens of each image or video, and what `layouts` needs in place of call arguments.

        Raises:
            UnsupportedModelError: They cannot be told apart; says what argument would do.
        """
        raise UnsupportedModelError(
            f"{self.family}: {modality}s merged into inputs_embeds cannot be told apart; pass "
            "pixel values"
        )

    def global_layers(self) -> Sequence[int]:
        """List the encoder layers with full attention (all, unless some have window attention)."""
        return range(len(self.encoder_attentions()))

    @property
    @abstractmethod
    def projector(self) -> nn.Module:
        """The module between encoder and LLM (projector or merger), called once a forward."""

    def project(self, projector: nn.Module, features: Tensor) -> Tensor:
        """Apply the projector (or a clone in another dtype) to `[..., N, Dv]` token inputs.

        Args:
            projector: `self.projector` or a clone of it.
            features: Token inputs as `pack(projector_inputs(...))` gives them.

        Returns:
            `[..., N, D]`.
        """
        return projector(features)  # type: ignore[no-any-return]

    def two_layer(self) -> TwoLayer | None:
        """Take the projector's weights, if it is exactly two linear layers around a GELU, or these
        behind a norm of the patches.

        None where more may happen between `projector_inputs` and output: an adapter (LoRA),
        quantised or offloaded weights, a hook on its layers.
        """
        return None

    @abstractmethod
    def projector_inputs(self, modality: Modality, raw: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Turn what the projector received into per-patch (or per-merged-token) rows.

        Args:
            modality: Image or video.
            raw: First positional argument of the projector's forward.
            call: Arguments of `get_<modality>_features` by name.

        Returns:
            A tensor that `pack` accepts.
        """

    @abstractmethod
    def pack(
        self, modality: Modality, values: Tensor, call: Mapping[str, Any]
    ) -> tuple[Tensor, ...]:
        """Carry encoder-side values to visual tokens, exactly as the model carries features.

        Stitching, unpadding, pooling, 2x2 merging (mean) and un-permuting happen here; newlines get
        zeros. With one value a merged token (projector inputs of mergers) only order is restored.

        Args:
            modality: Image or video.
            values: `[P, n, C]`, P encoder sequences (crops, tiles, frames) of n patches ([CLS]
                removed); or `[S, C]` for encoders that run all patches in one packed sequence.
            call: Arguments of `get_<modality>_features` by name.

        Returns:
            `[N_i, C]` for each image or video, in the order of the model's features.
        """

    @abstractmethod
    def layouts(
        self, modality: Modality, counts: Sequence[int], call: Mapping[str, Any]
    ) -> Sequence[tuple[Grid | None, CropLayout | None]]:
        """Find `(grid, crops)` of each image or video of `counts[i]` visual tokens; one is None."""

    def square_encoder(self) -> nn.Module | None:
        """Find the module that is called with pixels of pictures padded to squares.

        None for families whose visual tokens hold no padding (it is cut off, or never put on).
        """
        return None

    def padding(self, pixels: Tensor) -> Tensor:
        """Measure the share of each patch that is padding, for families with a `square_encoder`.

        Args:
            pixels: `[P, C, H, W]`, what that module was called with.

        Returns:
            `[P, n, 1]` fp32 in `[0, 1]`, which `pack` accepts.
        """
        raise NotImplementedError(f"{self.family} images have no padding")

    # --- pictures of other sizes (the oracle and the down-sampling control of `vispress bench`)

    def picture_grids(self, modality: Modality, inputs: Mapping[str, Any]) -> Sequence[Grid] | None:
        """Find the grid of visual tokens over each whole image or video of a batch.

        Args:
            modality: Image or video.
            inputs: Keyword arguments of the model, as its processor makes them; may be empty.

        Returns:
            One for each, in prompt order, its tokens in raster order; empty where the batch has
            none of that modality. None, whatever the batch, where there is no such grid: pictures
            are cut into crops or tiles, or have tokens that lie nowhere.
        """
        return None

    def any_size(self) -> AbstractContextManager[None]:
        """Let the encoder take images of the sizes that `resize` makes, until the context ends.

        Raises:
            UnsupportedMethodError: The family has no `resize`.
        """
        raise UnsupportedMethodError(f"the adapter of {self.family} cannot resize pictures")

    def resize(
        self, modality: Modality, inputs: Mapping[str, Any], grids: Sequence[Grid], encode: Encode
    ) -> Mapping[str, Any]:
        """Make the images or videos of a batch smaller, with placeholders to match.

        Args:
            modality: Image or video.
            inputs: The batch at its usual size, left-padded; not to be changed.
            grids: The wanted grid of each image or video, in prompt order, with its own steps.
            encode: Processes the batch again, for families whose processor decides on sizes.

        Returns:
            Keyword arguments of the model, left-padded, for calls inside of `any_size`.

        Raises:
            UnsupportedMethodError: The family has no `resize`.
        """
        raise UnsupportedMethodError(f"the adapter of {self.family} cannot resize pictures")

    def features(self, modality: Modality, output: Any) -> tuple[Tensor, ...]:
        """Take `[N_i, D]` that the model scatters for each image of `get_<modality>_features`."""
        return tuple(output.pooler_output)

    def signals(self) -> frozenset[Signal]:
        """List the signals this family can give."""
        return frozenset(Signal) if self.has_cls else frozenset(Signal) - CLS_SIGNALS

    # --- checks

    def check(self) -> None:  # noqa: B027  (optional to fill in, not abstract)
        """Refuse a configuration the runtime would get wrong (override to add rules).

        Raises:
            UnsupportedModelError: Names the setting and what works.
        """


def raster(h: int, w: int) -> tuple[Tensor, Tensor]:
    """Number row and column of each place of an `h x w` grid in raster order, on the host."""
    rows = torch.arange(h).repeat_interleave(w)
    return rows, torch.arange(w).repeat(h)
