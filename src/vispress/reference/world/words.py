"""Words of the reference world: what can be drawn, how it is called, and the fixed vocabulary.

One list decides the token ids, so the order here is part of the checkpoint.
"""

from typing import Final, Literal, get_args

QuestionKind = Literal[
    "attribute",
    "place",
    "existence",
    "needle",
    "digit",
    "reading",
    "where",
    "relation",
    "count",
]
KINDS: Final[tuple[QuestionKind, ...]] = get_args(QuestionKind)

EpisodeKind = Literal["compare", "in_context", "multi_turn", "order", "change"]
EPISODE_KINDS: Final[tuple[EpisodeKind, ...]] = get_args(EpisodeKind)

ClipKind = Literal["clip_order", "clip_change"]
CLIP_KINDS: Final[tuple[ClipKind, ...]] = get_args(ClipKind)

LargeKind = Literal["fine_print", "small_object", "across_crops"]
LARGE_KINDS: Final[tuple[LargeKind, ...]] = get_args(LargeKind)

SHAPES: Final = ("circle", "square", "triangle", "diamond", "cross", "ring", "star", "crescent")
PLURALS: Final = (
    "circles",
    "squares",
    "triangles",
    "diamonds",
    "crosses",
    "rings",
    "stars",
    "crescents",
)
COLORS: Final = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
DIGITS: Final = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
NUMBERS: Final = ("zero", "one", "two", "three", "four", "five")
ROWS: Final = ("top", "middle", "bottom")
COLUMNS: Final = ("left", "center", "right")
SIDES: Final = ("left", "right", "above", "below")

PAD: Final = "<pad>"
BOS: Final = "<s>"
EOS: Final = "</s>"
UNKNOWN: Final = "<unk>"
IMAGE: Final = "<image>"
VIDEO: Final = "<video>"  # no word of the LLaVA reference, which reads no videos
SPECIAL: Final = (PAD, BOS, EOS, UNKNOWN, IMAGE)

_GLUE: Final = (
    "nothing",
    "first",
    "last",
    "sign",
    "digit",
    "dot",
    "shape",
    "shapes",
    "color",
    "number",
    "what",
    "which",
    "where",
    "how",
    "many",
    "is",
    "are",
    "there",
    "a",
    "the",
    "in",
    "on",
    "at",
    "of",
    "from",
    "side",
    "yes",
    "no",
    "above",
    "below",
    "?",
    ":",
)

# words of the episodes; new words go to the end, as an id never changes
_LATER: Final = ("picture", "second", "has", "comes", "or", "changed", "its")

VOCABULARY: Final[tuple[str, ...]] = (
    *SPECIAL,
    *SHAPES,
    *PLURALS,
    *COLORS,
    *DIGITS,
    *NUMBERS,
    *ROWS,
    *COLUMNS,
    *_GLUE,
    *_LATER,
)
WORD_ID: Final[dict[str, int]] = {word: index for index, word in enumerate(VOCABULARY)}

# what a patch can be called by the dense labels; index 0 is background in each list
WHAT_WORDS: Final = ("nothing", *SHAPES, *DIGITS)
COLOR_WORDS: Final = ("nothing", *COLORS, "first", "last")
DOT_WORDS: Final = ("nothing", *COLORS)
