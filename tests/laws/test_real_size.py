"""How many tensor operations a method adds to a prefill at the size of 7B models.

Depth and token counts are LLaVA-1.5's, LLaVA-NeXT's and Qwen2.5-VL's; all is 64 wide, so that a CPU
runs it. Settings are the published ones, the layout was seen before. Views launch nothing; an op of
`vispress_kernels`, which has a kernel on a GPU, counts as one, whatever its reference does, and a
helper of kernels that is called on its own counts as what it does. A method may add a tenth of the
untouched prefill, or 20 operations a place if that is more: a placement, or each layer in which one
acts that merges, masks, computes less or cuts the cache. What cannot says why, and has a bound of
its own (`DECLARED`). `benchmarks/results/ops_at_size.txt` keeps what this prints:

    python -m tests.laws.test_real_size [METHOD ...]
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from benchmarks.gpu import shapes
from benchmarks.gpu.budgets import fitting, published
from torch.utils._python_dispatch import TorchDispatchMode

from vispress import compressed, list_methods
from vispress.api import attachment_of
from vispress.kinds import Stage
from vispress.registry import get_method

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "ops_at_size.txt"
SHARE, PLACE = 0.1, 20
"""What a method may add: a share of the untouched prefill's operations, or these a place."""
DEEP = frozenset({Stage.MASK, Stage.CACHE, Stage.COMPUTE})
"""Stages whose placements act in each decoder layer from theirs on."""

_TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 128}
_VISION = {"hidden_size": 64, "intermediate_size": 96}
_LLAMA = _TEXT | {"num_key_value_heads": 4}
_CLIP = _VISION | {"num_attention_heads": 4}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_NARROW: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llava_1_5_7b": (_LLAMA, _CLIP),
    "llava_next_7b": (_LLAMA, _CLIP),
    "qwen2_5_vl_7b": (
        _TEXT | {"num_key_value_heads": 2, "rope_parameters": _ROPE},
        _VISION | {"num_heads": 4, "out_hidden_size": 64},
    ),
}
MODELS = tuple(_NARROW)


class Declared(NamedTuple):
    """Why a method is over the bound, and its own bound on each model where it is."""

    reason: str
    most: dict[str, int]


DECLARED = {
    "cmai": Declared(
        "chooses pairs of words and visual tokens in each of 24 (Qwen 21) layers from the "
        "attention there: 29 (33) operations each",
        {"llava_1_5_7b": 700, "llava_next_7b": 705, "qwen2_5_vl_7b": 700},
    ),
    "gamma_mod": Declared(
        "routes each of 28 (Qwen 24) layers by a norm, a softmax and a loss, and numbers the "
        "positions of the rows that run anew: 43 (30) operations each",
        {"llava_1_5_7b": 1205, "llava_next_7b": 1210, "qwen2_5_vl_7b": 715},
    ),
    "mmtok": Declared(
        "picks one token after another, each by what those before it do not cover: 8 operations a "
        "pick, and crops of another size are covered apart",
        {"llava_1_5_7b": 700, "llava_next_7b": 1100, "qwen2_5_vl_7b": 1300},
    ),
    "prumerge": Declared(
        "without a budget each of five crops decides its own count, one after the other",
        {"llava_next_7b": 370},
    ),
    "scope": Declared(
        "picks one token after another, each by what those before it do not cover: 8 operations a "
        "pick, and crops of another size are covered apart",
        {"llava_1_5_7b": 600, "llava_next_7b": 1050, "qwen2_5_vl_7b": 1300},
    ),
    "sparsevlm": Declared(
        "finds raters, ranks, clusters what is dropped and numbers positions anew at three depths, "
        "each time for what the depth before left: 90 operations each",
        {"llava_1_5_7b": 270, "llava_next_7b": 275},
    ),
    "tome": Declared(
        "matches and merges in each of 23 encoder layers what the layer before left: 27 (31) "
        "operations each",
        {"llava_1_5_7b": 630, "llava_next_7b": 725},
    ),
    "transprune": Declared(
        "sums up what layers did, each a softmax over all rows, and reads the next layer's "
        "attention before it runs, at three depths: 94 operations each",
        {"llava_1_5_7b": 285, "llava_next_7b": 290},
    ),
    "visiontrim": Declared(
        "three rounds in which targets gather tokens and are projected anew; crops of two shares "
        "are worked on apart",
        {"llava_next_7b": 310},
    ),
    "vmtc": Declared(
        "ten rounds of k-means, each on the centres of the one before: 18 operations a round",
        {"llava_1_5_7b": 320, "llava_next_7b": 335},
    ),
    "vscan": Declared(
        "crops of two shares are scanned apart, and a second placement follows in the LLM",
        {"llava_next_7b": 185},
    ),
}


class Launches(TorchDispatchMode):
    """Counts operations, an op of the kernels as one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._last: Any = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            op = kernel_op(sys._getframe(1))
            self.count += op is None or op is not self._last
            self._last = op or self._last  # held, so that no later frame is taken for it
        return func(*args, **(kwargs or {}))


def kernel_op(frame: Any) -> Any:
    """The frame of the outermost op of `vispress_kernels` that runs, or None."""
    found = None
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.name == "__init__.py" and path.parent.parent.name == "vispress_kernels":
            found = frame
        frame = frame.f_back
    return found


def launches(run: Callable[[], Any]) -> int:
    """Operations of a call, what is made once left out."""
    run()
    with Launches() as seen:
        run()
    return seen.count


def shape_of(model: str) -> shapes.Shape:
    """A 7B shape, 64 wide."""
    whole, (text, vision) = shapes.SHAPES[model], _NARROW[model]
    return replace(whole, text=whole.text | text, vision=whole.vision | vision)


@cache
def prepared(model: str) -> tuple[Callable[[], Any], Any, int]:
    """A prefill to call, its model, and how many operations it has untouched."""
    shape, cpu = shape_of(model), torch.device("cpu")
    built = shapes.build(shape, cpu, torch.float32)
    inputs = shapes.prompt(shape, 1, cpu, torch.float32)

    @torch.no_grad()  # inference mode would hide the parts of some operations
    def prefill() -> Any:
        return built(**inputs, use_cache=True, logits_to_keep=1)

    return prefill, built, launches(prefill)


def methods_of(model: str) -> list[str]:
    """Methods for the model's picture, those left out that are refused there."""
    shape = shapes.SHAPES[model]
    refused = {"pvc"} if model == "qwen2_5_vl_7b" else set()
    return [name for name in fitting(shape.crops) if name not in refused]


@contextmanager
def attached(model: str, method: str) -> Iterator[int]:
    """The model with a method's published setting; how many places that has."""
    shape, (_, built, _) = shapes.SHAPES[model], prepared(model)
    options = published(method, shape.visual, has_cls=shape.family != "qwen2_5_vl")
    with compressed(built, **options):
        plan = attachment_of(built).plan
        depth, encoder = plan.num_layers, len(plan.adapter.encoder_attentions())
        merges = any(one.changes_encoder() for one in plan.methods)
        placements = [bound.placement for bound in plan.placements]
        acting = [depth - one.layer if one.stage in DEEP else 1 for one in placements]
        yield sum(acting) + encoder * merges


@cache
def added(model: str, method: str) -> tuple[int, int]:
    """Operations that a method adds, and the most that it may without being declared."""
    prefill, _, untouched = prepared(model)
    with attached(model, method) as places:
        more = launches(prefill) - untouched
    return more, max(int(SHARE * untouched), PLACE * places)


def _cases() -> list[Any]:
    """LLaVA-1.5 with some methods by default; other models are slow on a CPU."""
    found = []
    for turn, model in enumerate(MODELS):
        for method in methods_of(model):
            found.append(pytest.param(model, method, marks=pytest.mark.full if turn else ()))
    return found


@pytest.mark.slow(cases=8)
@pytest.mark.parametrize(("model", "method"), _cases())
def test_a_prefill_of_real_size_asks_for_few_operations(model: str, method: str) -> None:
    more, most = added(model, method)
    if method in DECLARED:
        most = max(most, DECLARED[method].most.get(model, 0))
    assert more <= most


def test_what_is_declared_is_needed() -> None:
    listed = {line.split()[0]: line for line in TABLE.read_text().splitlines() if line}
    for method, declared in DECLARED.items():
        assert set(declared.most) <= set(MODELS)
        assert listed[method].count("*") == len(declared.most)


def test_every_method_for_pictures_is_in_the_table() -> None:
    lines = TABLE.read_text().splitlines()
    listed = {line.split()[0] for line in lines if line}
    pictures = {name for name in list_methods() if get_method(name).needs != "video"}
    assert pictures <= listed


def test_an_op_of_the_kernels_counts_as_one_and_its_helpers_as_what_they_do() -> None:
    from vispress_kernels.maxmin_select import maxmin_select
    from vispress_kernels.products import gram

    x = torch.randn(1, 40, 8)
    assert launches(lambda: maxmin_select(x, 20)) == 1
    assert launches(lambda: [maxmin_select(x, 2) for _ in range(3)]) == 3
    assert launches(lambda: gram(x)) == launches(lambda: x @ x.mT)
    assert launches(lambda: x.exp().sin().view(-1)) == 2


def main(names: Sequence[str]) -> None:
    """Measure some methods, or all, and keep it."""
    columns = {model: methods_of(model) for model in MODELS}
    heads = [f"{model} ({prepared(model)[2]})" for model in MODELS]
    rows = {}
    if names and TABLE.exists():
        rows = {line.split()[0]: line for line in TABLE.read_text().splitlines()[2:] if line}
    every = sorted({name for column in columns.values() for name in column})
    for method in names or every:
        cells = [_cell(model, method) if method in columns[model] else "- " for model in MODELS]
        rows[method] = f"{method:16}" + "".join(f"{cell:>27}" for cell in cells)
        sys.stdout.write(rows[method] + "\n")
    lines = ["operations that a method adds to a prefill, by model (operations untouched):"]
    lines += [f"{'':16}" + "".join(f"{head + ' ':>27}" for head in heads)]
    lines += [rows[method] for method in every if method in rows]
    lines += ["", "* more than a tenth and than 20 a place, as declared:"]
    lines += [f"  {method}: {declared.reason}" for method, declared in sorted(DECLARED.items())]
    TABLE.write_text("\n".join(line.rstrip() for line in lines) + "\n")


def _cell(model: str, method: str) -> str:
    more, most = added(model, method)
    return f"{more:+} ({more / prepared(model)[2]:+.1%}){'*' if more > most else ' '}"


if __name__ == "__main__":
    main(sys.argv[1:])
