"""What a method remembers of an image from one of its placements to the next."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Carried by the forward call, for one image and one compressor; never by method or model.

    Args:
        value: The method's own, immutable; tensors stay on the device of the placement that left
            them.
        attention: Whether the next placement reads attention of the LLM; where no image needs any,
            none is computed.
        over: Later placements leave the image as it is, and do not ask for a plan; images that are
            planned together are left once all of them are over.
    """

    value: object = None
    attention: bool = True
    over: bool = False
