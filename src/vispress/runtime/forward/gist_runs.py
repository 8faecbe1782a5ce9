"""Find the runs of gist tokens in a prompt, and how far what stands in front of them is seen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from vispress.errors import ConfigError
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.kv_cache.cache_layers import is_compressed
from vispress.runtime.layout import Document
from vispress.runtime.tokens.images import Image

NEVER: Final = torch.iinfo(torch.int64).max
"""Position of the first row that does not see a token which all see."""


@final
@dataclass(frozen=True, eq=False)
class Sight:
    """How far tokens of a chunk are seen.

    Args:
        until: `[B, Q]` int64 on the host, position of the first row that does not see a token;
            `NEVER` where all rows behind it do.
        texts: Text tokens of each batch row that leave.
        gists: Gist tokens that stand for images.
    """

    until: Tensor
    texts: tuple[int, ...]
    gists: int

    def narrows(self, state: ForwardState) -> bool:
        """Whether a row of the chunk itself does not see what it would."""
        first = self.until.amin(dim=1, keepdim=True)
        behind = torch.arange(self.until.shape[1]) >= first
        return bool((behind if state.host_valid is None else behind & state.host_valid).any())


def find_sight(state: ForwardState, name: str, *, prefix: bool) -> Sight | None:
    """Find out how far tokens are seen; None where no image is there to be hidden.

    Args:
        state: The call.
        name: Of the method, for messages.
        prefix: Whether text in front of a document's first gist token is hidden, too.

    Raises:
        ConfigError: An image has no run of gist tokens behind it, or one stands elsewhere.
    """
    layout, shown = state.layout, state.shown_images
    if not shown:
        return None
    assert layout is not None
    until = torch.full((layout.batch, layout.length), NEVER)
    texts, gists = [0] * layout.batch, 0
    continued = state.past > 0
    if continued and prefix and not is_compressed(state.cache):
        raise ConfigError(
            f"{name}: text in front of the first token {state.plan.gist_token} is in the KV cache "
            "already and cannot leave it; run the prompt in one call, or set hide='visual'"
        )
    for number, document in enumerate(layout.documents):
        images = [image for image in shown if image.prompt.document == number]
        if not images:
            continue
        places = document.places(state.host_valid)
        ranks, stops = _runs(state, document, places, images, name)
        visual = torch.zeros(layout.length, dtype=torch.bool)
        for image in images:
            visual[image.positions] = True
        gone = visual[places]
        if prefix and not continued:  # else the first gist token is in the cache
            texts[document.row] += int((~gone[: ranks[0]]).sum())
            gone[: ranks[0]] = True
        # a token is seen up to the end of the first run behind it
        stop = torch.tensor([*stops, NEVER])
        behind = stop[torch.searchsorted(stop, places, right=True)]
        until[document.row, places] = behind.masked_fill(~gone, NEVER)
        gists += len(ranks)
    return Sight(until, tuple(texts), gists)


def _runs(
    state: ForwardState, document: Document, places: Tensor, images: Sequence[Image], name: str
) -> tuple[Tensor, list[int]]:
    """The ranks of gist tokens among the real tokens of a document, and the ends of their runs.

    Images without a token between them (tiles) have one run.

    Args:
        state: The call.
        document: The document.
        places: `[T]` positions of its real tokens.
        images: Its images, in order.
        name: Of the method, for messages.

    Raises:
        ConfigError: Gist tokens do not stand in one run behind each image.
    """
    assert state.gist is not None
    token, row = state.plan.gist_token, document.row
    ranks = state.gist[row, places].nonzero()[:, 0]
    found = places[ranks]
    stops, runs, wrong = [], [], ""
    firsts = [int(image.positions[0]) for image in images]
    for number, (image, end) in enumerate(zip(images, [*firsts[1:], document.stop], strict=True)):
        last = int(image.positions[-1])
        if end == last + 1 < document.stop:  # a tile: the next one goes on with the same picture
            continue
        if image.prompt.ends:  # what a model answers or drafts stands for nothing
            end = min(end, image.prompt.stop)
        run = ranks[(found > last) & (found < end)]
        if bool(((found < last) & (found > (firsts[number] if number else -1))).any()):
            wrong = f"tokens {token} in front of its end"
        elif not len(run):
            wrong = f"no token {token} behind it"
        elif int(run[-1] - run[0]) + 1 != len(run):
            wrong = f"tokens {token} behind it in several runs"
        if wrong:
            raise ConfigError(
                f"{name}: image {number} of row {row} has {wrong}; put one run of them "
                "behind each image, in front of the next (the id is the method's token_id; "
                "None is the last word of the model's vocabulary)"
            )
        stops.append(int(places[run[-1]]) + 1)
        runs.append(run)
    return torch.cat(runs), stops
