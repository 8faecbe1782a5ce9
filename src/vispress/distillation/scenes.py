"""Questions about scenes of the reference world's training split."""

from collections.abc import Callable, Iterator
from itertools import count
from typing import Final

import numpy as np
from PIL import Image

from vispress.bench.tasks.task import Prompt
from vispress.reference.world.digits import Split
from vispress.reference.world.episodes import Shown, show_examples, show_pair
from vispress.reference.world.questions import mixture
from vispress.reference.world.scenes import draw_scene
from vispress.reference.world.videos import show_video
from vispress.reference.world.words import KINDS

_A_SCENE: Final = 4
_OFFSET: Final = 5 << 32
"""Scenes of no other training are seen again."""
_EPISODES: Final[tuple[Callable[[int, Split, int], Shown], ...]] = (
    show_pair,
    show_examples,
    show_video,
)
_OFTEN: Final = 4
"""One draw in so many is an episode."""


def training_prompts(n: int, seed: int = 0, *, episodes: bool = False) -> Iterator[Prompt]:
    """Draw questions of all kinds about scenes that no held-out question is about.

    Args:
        n: How many; four about a scene, at most one of a kind.
        seed: Other seeds give other scenes.
        episodes: One draw in four shows several pictures: two, examples in turn, or a video's
            frames.
    """
    left = n
    for index in count():
        episode = episodes and index % _OFTEN == _OFTEN - 1
        prompts = _of_episode(seed, index) if episode else _of_scene(seed, index)
        yield from prompts[:left]
        left -= len(prompts)
        if left <= 0:
            return


def _of_scene(seed: int, index: int) -> list[Prompt]:
    scene = draw_scene(_OFFSET + seed, "train", index)
    rng = np.random.default_rng((seed, 7, index))
    picture = Image.fromarray(scene.pixels)
    return [
        Prompt((picture,), question.prompt, question.answer, (question.patches,))
        for question in mixture(scene, rng, dict.fromkeys(KINDS, 1))[:_A_SCENE]
    ]


def _of_episode(seed: int, index: int) -> list[Prompt]:
    show = _EPISODES[index // _OFTEN % len(_EPISODES)]
    shown = show(_OFFSET + seed, "train", index)
    pictures = tuple(Image.fromarray(scene.pixels) for scene in shown.scenes)
    return [
        Prompt(pictures, f"{shown.prefix} {asked.text}", asked.answer, asked.evidence)
        for asked in shown.asked[:_A_SCENE]
    ]
