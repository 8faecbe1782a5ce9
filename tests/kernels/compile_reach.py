"""What the launch rules choose over all shapes, against what the compile probe compiles.

Run by test_compile.py in a process of its own, as the probe is.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

from compile_variants import Variant, variants

from vispress_kernels import _greedy as greedy
from vispress_kernels import _products as products
from vispress_kernels.assign_nearest import kernel as assign
from vispress_kernels.column_attention import kernel as column
from vispress_kernels.cover_select import kernel as cover
from vispress_kernels.dct_lowpass import kernel as dct
from vispress_kernels.distinct_select import kernel as distinct
from vispress_kernels.dpp_select import kernel as dpp
from vispress_kernels.gather_tokens import kernel as gather
from vispress_kernels.kmeans_starts import kernel as starts
from vispress_kernels.maxmin_select import kernel as maxmin
from vispress_kernels.merge_tokens import kernel as merge
from vispress_kernels.perturbation_scores import kernel as perturbation
from vispress_kernels.query_attention import MAX_HEAD
from vispress_kernels.query_attention import kernel as query
from vispress_kernels.transition_scores import kernel as transition

Choice = tuple[Any, int, dict[str, Any]]
SIZES = {"u8": 1, "bf16": 2, "fp16": 2, "fp32": 4}
WIDTHS = (*range(1, 300), *range(300, 9000, 4))
COUNTS = (1, 2, 15, 16, 17, 100, 577, 2880, 8192, 8193, 16384, 70_000, 131_072, 2**21)


def chosen() -> Iterator[Choice]:
    """Kernel, bytes of an element (0: the rule does not ask) and blocks, over all shapes."""
    for count in COUNTS:
        yield merge.order_tokens_kernel, 0, merge.order_rule(1, count)
    # sizes that only multiply the registers: the least and the most of them stand for the others
    for H, N, mean in product((1, 32), COUNTS, (True, False)):
        for splits in (1, query.MAX_SPLITS) if N <= 65_536 else (query.MAX_SPLITS,):
            yield query.weights_kernel, 0, query.weights_rule(H, N, splits, mean)
    for size, head in product((2, 4), range(1, MAX_HEAD + 1)):
        for count in COUNTS:
            rule = {"HEAD": head, **query.launch_rule(count, head, size)}
            yield query.logits_kernel, size, rule
            rule = {"HEAD": head, **column.launch_rule(head, size, count)}
            yield column.row_stats_kernel, size, rule
            yield column.column_mean_kernel, size, rule
    for D in (1, 9000):
        yield assign.inverse_norms_kernel, 0, assign.norm_rule(D)
    for D in WIDTHS:
        yield transition.transition_scores_kernel, 0, transition.launch_rule(D)
        for size in (2, 4):
            for N, K in ((10, 10), (11, 10)):
                yield merge.merge_tokens_kernel, size, merge.launch_rule(N, K, D, size)
            for kernel in (maxmin.maxmin_kernel, dpp.dpp_kernel):
                yield kernel, size, greedy.whole_rule(D, size)
            for kernel, N in product((maxmin.maxmin_step_kernel, dpp.dpp_step_kernel), COUNTS):
                yield kernel, size, greedy.launch_rule(N, D)
        for K in (1, 2**20):
            yield gather.gather_tokens_kernel, 0, {"BLOCKS": gather.launch_rule(K, D)}
    for size, H, P, Q in product((2, 4), range(1, 300), (1, 16, 17, 40), (1, 16, 17, 40)):
        yield dct.dct_lowpass_kernel, size, dct.launch_rule(H, P, Q, size)
    for size, N, M in product((2, 4), range(1, 4000, 31), range(1, 4000, 31)):
        yield assign.assign_nearest_kernel, size, assign.launch_rule(N, M, size)
        yield products.products_kernel, size, products.products_rule(N, M, size)
    for N in range(1, maxmin.MOST + 1):
        yield maxmin.maxmin_held_kernel, 0, maxmin.held_rule(N)
        yield starts.kmeans_starts_kernel, 0, maxmin.held_rule(N)
        yield cover.cover_kernel, 0, cover.cover_rule(N)
    yield distinct.distinct_kernel, 0, distinct.distinct_rule()
    for splits in (2, 1024):
        yield assign.best_split_kernel, 0, assign.split_rule(splits)
    for size in (2, 4):
        yield perturbation.perturbation_scores_kernel, size, perturbation.launch_rule(size)


def key(kernel: Any, size: int, rule: dict[str, Any]) -> tuple[Any, ...]:
    """What makes another binary of a choice: of a head, whether its block is wider (cut off)."""
    rule = dict(rule)
    if "HEAD" in rule:
        wide = rule["BLOCK_D"] + rule.get("REST", 0)
        rule["HEAD"] = "any" if rule["CHUNKED"] else "cut" if rule["HEAD"] < wide else "whole"
    return kernel.__name__, size, *sorted(rule.items())


def missing() -> list[str]:
    """Choices that no variant compiles."""
    needed, names = {}, {}
    for kernel, size, rule in chosen():
        names[kernel.__name__] = set(rule)
        needed[key(kernel, size, rule)] = f"{kernel.__name__}, {size} bytes, {rule}"
    compiled = {choice for v in variants() for choice in _choices(v, names)}
    return [text for choice, text in needed.items() if choice not in compiled]


def _choices(variant: Variant, names: dict[str, set[str]]) -> Iterator[tuple[Any, ...]]:
    rule = {
        k: c for k, c in variant.constants.items() if k in names.get(variant.kernel.__name__, ())
    }
    pointers = (str(variant.types.get(name)) for name in ("x_ptr", "q_ptr", "w2_ptr"))
    sizes = {0, *(SIZES.get(pointer.strip("*"), 0) for pointer in pointers)}
    for size, blocks in product(sizes, rule.get("BLOCKS", (None,))):
        choice = key(variant.kernel, size, rule | ({"BLOCKS": blocks} if blocks else {}))
        yield choice
        # a head that is cut off takes all that a whole one does, and masks
        yield tuple(("HEAD", "whole") if part == ("HEAD", "cut") else part for part in choice)
