"""What a method's parameters are sized by."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModuleShape:
    """Sizes of the model that a method's parameters are made for.

    Args:
        width: Of the LLM's hidden states, and of visual tokens in front of it (D).
        vision_width: Of a token where it enters the projector (Dv).
        num_layers: Decoder layers.
        num_heads: Query heads of a decoder layer.
        vision_layers: Layers of the vision encoder.
        encoder_width: Of a patch inside of it; None where its layers are of an unknown kind.
    """

    width: int
    vision_width: int
    num_layers: int
    num_heads: int
    vision_layers: int
    encoder_width: int | None = None
