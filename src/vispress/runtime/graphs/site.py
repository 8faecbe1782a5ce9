"""Name the model that is captured, and what is asked of it now."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vispress.adapters.base import ModelAdapter
from vispress.adapters.decoder import window_of
from vispress.runtime.attachment import ATTRIBUTE, Attachment
from vispress.runtime.graphs.arguments import special_ids
from vispress.runtime.graphs.backends import Backend


@dataclass(frozen=True, eq=False)
class Site:
    """The model that is captured.

    Args:
        owner: The head, or the base model where there is none.
        adapter: Knows the model.
        original: The owner's forward.
        backend: How it is recorded.
        weights: Its parameters.
    """

    owner: nn.Module
    adapter: ModelAdapter
    original: Callable[..., Any]
    backend: Backend
    weights: Sequence[Tensor]

    @cached_property
    def windows(self) -> tuple[object, ...]:
        """What keeps decoder layers from seeing all tokens in one way; empty for nothing."""
        config, kinds = self.adapter.language_model.config, self.adapter.layer_types
        found = [window for kind in kinds if (window := window_of(config, kind)) is not None]
        return tuple(found) if len({*kinds}) == 1 else tuple(kinds)

    @property
    def attachment(self) -> Attachment | None:
        """What compresses the model now, if something does."""
        found: Attachment | None = self.adapter.base.__dict__.get(ATTRIBUTE)
        return found

    @property
    def special(self) -> tuple[int, ...]:
        """Token ids that belong to a layout."""
        attachment = self.attachment
        gist = None if attachment is None else attachment.plan.gist_token
        return special_ids(self.adapter.base.config, () if gist is None else (gist,))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.weights[0].device
