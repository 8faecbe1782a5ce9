"""Let torchvision be imported beside a torch without CUDA, in every process of the tests.

The registry's torchvision is built for CUDA and cannot load its operators there; importing it only
wants them declared. Nothing here calls them: they find boxes.
"""

import importlib.abc
import sys

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _Declares(importlib.abc.MetaPathFinder):
    """Declares the operators when torchvision is first looked for."""

    def __init__(self):
        self.library = None  # kept: a library's operators go with it

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self.library is None:
            import torch

            if not torch.cuda.is_available():
                self.library = torch.library.Library("torchvision", "DEF")
                for operator in _OPERATORS:
                    self.library.define(operator)
        return None


sys.meta_path.insert(0, _Declares())
