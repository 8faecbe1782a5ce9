"""Questions about scenes of the reference world's training split."""

from collections.abc import Iterator
from itertools import count
from typing import Final

import numpy as np
from PIL import Image

from vispress.bench.tasks.task import Prompt
from vispress.reference.world.questions import mixture
from vispress.reference.world.scenes import draw_scene
from vispress.reference.world.words import KINDS

_A_SCENE: Final = 4
_OFFSET: Final = 5 << 32
"""Scenes of no other training are seen again."""


def training_prompts(n: int, seed: int = 0) -> Iterator[Prompt]:
    """Draw questions of all kinds about scenes that no held-out question is about.

    Args:
        n: How many; four about a scene, at most one of a kind.
        seed: Other seeds give other scenes.
    """
    left = n
    for index in count():
        scene = draw_scene(_OFFSET + seed, "train", index)
        rng = np.random.default_rng((seed, 7, index))
        picture = Image.fromarray(scene.pixels)
        for question in mixture(scene, rng, dict.fromkeys(KINDS, 1))[:_A_SCENE]:
            if not left:
                return
            left -= 1
            yield Prompt((picture,), question.prompt, question.answer, (question.patches,))
