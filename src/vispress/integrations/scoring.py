"""Where prompts end while a harness scores given answers: log-likelihood, multiple choice.

A harness gives the model prompt and answer in one forward, so the answer's last token would be
taken for what asks. It makes the tokens of both first, and those of the prompt alone behind them;
from the two it follows where the prompt ends.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vispress.adapters.base import find_adapter
from vispress.errors import ConfigError
from vispress.integrations.options import PICTURES, Compression, Tally
from vispress.prompts import PROMPT_LENGTHS

_PROCESSORS = ("_image_processor", "processor", "_processor")
"""Names that harnesses give a model's processor."""


@contextmanager
def scoring(harness: Any, compression: Compression, tally: Tally) -> Iterator[None]:
    """Tell the model where its prompts end while a harness scores answers, and count what is kept.

    Args:
        harness: The harness's own model; its processor is listened to inside the block.
        compression: What was applied.
        tally: What is counted.

    Raises:
        ConfigError: (By the model's call.) The tokens of the prompt alone were not made ahead.
    """
    model: nn.Module = harness.model
    placeholders = frozenset(find_adapter(model).placeholders().values())
    own = vars(harness)
    listeners = {n: _Listener(own[n], placeholders) for n in _PROCESSORS if n in own}

    def starts(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        lengths = [end for listener in listeners.values() for end in listener.taken()]
        pictures = any(kwargs.get(name) is not None for name in PICTURES)
        if compression.method is None or not pictures:
            return None
        if not lengths:
            raise ConfigError(
                f"{type(harness).__name__} scores an answer whose prompt it has not made tokens "
                "of, so where the prompt ends is unknown, and what is kept would hang on the "
                "answer; use tasks that generate"
            )
        return args, kwargs | {PROMPT_LENGTHS: lengths}

    def ends(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        tally.count(model, compression, kwargs)

    hooks = [
        model.register_forward_pre_hook(starts, with_kwargs=True),
        model.register_forward_hook(ends, with_kwargs=True),
    ]
    try:
        own.update(listeners)
        yield
    finally:
        own.update({name: listener.processor for name, listener in listeners.items()})
        for hook in hooks:
            hook.remove()


class _Listener:
    """Stands for a processor; learns from its calls where the prompts of the next forward end.

    Args:
        processor: The processor.
        placeholders: Token ids that stand for visual tokens.
    """

    def __init__(self, processor: Any, placeholders: frozenset[int]) -> None:
        self.processor, self._placeholders = processor, placeholders
        self._rows: Sequence[Tensor] = ()
        self._ends: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def taken(self) -> list[int]:
        """Lengths of the prompts, for one forward."""
        ends, self._rows, self._ends = self._ends, (), []
        return ends

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("images") or kwargs.get("videos"):
            made = self.processor(*args, **kwargs)
            self._rows, self._ends = _rows(made), []
            return made
        text = kwargs.get("text")
        if args or not self._rows or text is None:
            return self.processor(*args, **kwargs)
        # the prompt alone: a processor would refuse its placeholders, or leave one for each image
        alone = self.processor.tokenizer(text, **{"return_tensors": "pt"} | _rest(kwargs))
        self._ends = [
            prompt_length(whole.tolist(), prompt.tolist(), self._placeholders)
            for whole, prompt in zip(self._rows, _rows(alone), strict=True)
        ]
        if len(self._ends) == 1:  # with a place for each visual token, as in the whole
            alone["input_ids"] = self._rows[0][None, : self._ends[0]]
            alone["attention_mask"] = torch.ones_like(alone["input_ids"])
        return alone


def _rest(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key not in ("text", "images", "videos")}


def _rows(made: Any) -> list[Tensor]:
    """Token ids of each row, without padding."""
    masks = made["attention_mask"].bool()
    return [ids[mask] for ids, mask in zip(made["input_ids"], masks, strict=True)]


def prompt_length(whole: Sequence[int], alone: Sequence[int], placeholders: frozenset[int]) -> int:
    """Count the tokens of a prompt, in it and the answer behind it.

    Args:
        whole: Prompt and answer, a placeholder for each visual token.
        alone: The prompt, perhaps with one placeholder for each image.
        placeholders: Their ids.

    Raises:
        ConfigError: One does not begin with the other (but for a last token that the answer's
            first may have joined).
    """
    ends, known = _collapsed(whole, placeholders), _collapsed(alone, placeholders)
    same = 0
    while same < min(len(ends), len(known)) and ends[same][0] == known[same][0]:
        same += 1
    if same < max(1, len(known) - 1):
        raise ConfigError(
            f"the prompt's {len(known)} tokens are not the first of prompt and answer together "
            f"(token {same} differs), so where the prompt ends is unknown"
        )
    return ends[same - 1][1]


def _collapsed(ids: Sequence[int], placeholders: frozenset[int]) -> list[tuple[int, int]]:
    """Tokens with the place behind each; a run of one placeholder is one."""
    found: list[tuple[int, int]] = []
    for place, token in enumerate(ids, start=1):
        if found and token in placeholders and found[-1][0] == token:
            found.pop()
        found.append((token, place))
    return found
