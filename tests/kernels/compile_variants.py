"""Every configuration of every kernel that the launch rules can choose, for the compile probe."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

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
from vispress_kernels.query_attention import kernel as query
from vispress_kernels.transition_scores import kernel as transition

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
FLAGS = (True, False)
CUT_OFF = (40, 72, 200)
"""Heads narrower than their block, SigLIP's among them; fp32 takes all heads in like chunks."""
CUT_OFF_PARTS = (90, 112, 130, 150, 180)
"""Such heads that `column_attention` takes in two parts or in blocks of their own."""


@dataclass
class Variant:
    """One configuration: `types` are Triton types by argument, `constants` the constexprs.

    Arguments in neither are i32. Strides named in `units` are 1, as for contiguous tensors.
    `default` marks what a model runs by default; `even` sizes and strides are multiples of 16.
    """

    kernel: Any
    types: dict[str, Any]
    constants: dict[str, Any]
    units: tuple[str, ...] = ()
    default: bool = True
    tuples: dict[tuple[int, ...], Any] = field(default_factory=dict)
    even: bool = True

    @property
    def name(self) -> str:
        flat = {t if isinstance(t, str) else str(t[0]) for t in self.types.values()}
        types = "-".join(sorted(flat))
        parts = [f"{k}={v}" for k, v in self.constants.items()] + ["odd"] * (not self.even)
        return f"{self.kernel.__name__}[{types},{','.join(parts)}]"


def variants() -> list[Variant]:
    """Every block that the launch rules can choose; and each default again for odd strides."""
    parts = (_copies(), _attention(), _columns(), _selections(), _arithmetic())
    found = {v.name: v for part in parts for v in part}
    return [*_extremes(found.values()), *_odd(found.values())]


def _extremes(found: Iterable[Variant]) -> list[Variant]:
    """The defaults, and of each choice of blocks the variants with the most and the fewest flags.

    What lies between takes parts of both, and fp16 compiles as bf16 does: one choice of blocks a
    kernel stands for it. All of them would compile for a quarter of an hour.
    """
    groups: dict[Any, list[Variant]] = {}
    half: dict[str, Any] = {}
    for v in found:
        sizes = tuple((k, c) for k, c in v.constants.items() if not isinstance(c, bool))
        dtype = v.types.get("x_ptr", v.types.get("q_ptr"))
        if dtype == "*fp16" and half.setdefault(v.kernel.__name__, sizes) != sizes:
            continue
        groups.setdefault((v.kernel.__name__, sizes, dtype), []).append(v)
    kept: list[Variant] = []
    for group in groups.values():
        order = sorted(group, key=lambda v: sum(c is True for c in v.constants.values()))
        kept += [v for v in group if v.default or v is order[0] or v is order[-1]]
    return kept


def _odd(found: Iterable[Variant]) -> list[Variant]:
    """The defaults with strides other than 1 and sizes that no vector divides."""
    return [
        replace(v, units=(), even=False, default=False) for v in found if v.default and not v.tuples
    ]


def _fp32(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "*fp32")


def _copies() -> list[Variant]:
    found = []
    rules = sorted({gather.launch_rule(K, D) for D in range(1, 5000) for K in (1, 2**20)})
    # three tensors a launch, as hidden states, a rotary table and position ids are
    launches = [tuple(rules[i::4]) for i in range(4)]
    for dtype, blocks in product(("u8", "bf16", "fp32", "i64"), launches):
        n = len(blocks)
        types = {
            "xs": (f"*{dtype}",) * n,
            "outs": (f"*{dtype}",) * n,
            "strides": (("i64", "i64", "constexpr"),) * n,
            "widths": ("i32",) * n,
            "starts": ("i32",) * (n + 1),
            "keep_ptr": "*i64",
        }
        ones = {(2, i, 2): 1 for i in range(n)}
        default = dtype == "bf16"
        found.append(
            Variant(gather.gather_tokens_kernel, types, {"BLOCKS": blocks}, (), default, ones)
        )
    for places in (2**10, 2**20):
        types = {"assign_ptr": "*i64", "order_ptr": "*i32", "start_ptr": "*i32"}
        constants = merge.order_rule(1, places)
        found.append(Variant(merge.order_tokens_kernel, types, constants, ("stride_n",)))
    # how it was ordered; the ratios and widths that the rule tells apart, Qwen2.5-VL's among them
    rules = product(("i32", "i64"), (1, 4), (64, 256, 3584, 4096))
    for order, ratio, D in rules:
        for dtype, weighted, mean in product(DTYPES, FLAGS, FLAGS):
            types = {"order_ptr": f"*{order}", "start_ptr": "*i32", "weight_ptr": "*fp32"}
            types |= {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
            constants = {"HAS_WEIGHT": weighted, "MEAN": mean}
            constants |= merge.launch_rule(ratio * 64, 64, D, DTYPES[dtype])
            default = weighted and dtype != "fp16" and mean == (order == "i32")
            kernel = merge.merge_tokens_kernel
            found.append(Variant(kernel, types, constants, ("stride_d",), default))
    return found


def _attention() -> list[Variant]:
    found = []
    sizes = product(FLAGS, (1, 28), (576, 16384, 131072), (1, 16, query.MAX_SPLITS))
    for mean, heads, N, splits in sizes:
        constants = {"MEAN": mean, **query.weights_rule(heads, N, splits, mean)}
        types = _fp32("logits_ptr", "stats_ptr", "out_ptr")
        default = heads > 1 or not mean
        found.append(Variant(query.weights_kernel, types, constants, (), default))
    units = ("stride_qd", "stride_kd")
    masks = (("none", False, False), ("keys", True, False), ("queries", True, True))
    # heads that the rules tell apart: CLIP, most LLMs, the widest; and those their blocks exceed
    for dtype, head in product(DTYPES, (64, 128, 256, *CUT_OFF)):
        if dtype != "bf16" and head in CUT_OFF:
            continue
        common = dtype != "fp16" and head in (64, 72, 128)
        qk = {"q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}", "scale": "fp32", "valid_ptr": "*u8"}
        for rows, (mask, valid, own), count in product(FLAGS, masks, (16, 64)):
            types = qk | _fp32("logits_ptr", "stats_ptr") | {"rows_ptr": "*i64"}
            constants = {"HAS_ROWS": rows, "HAS_VALID": valid, "PER_QUERY": own, "HEAD": head}
            constants |= query.launch_rule(count, head, DTYPES[dtype])
            usual = {(True, "keys"), (False, "queries"), (False, "none")}
            default = common and (rows, mask) in usual
            found.append(Variant(query.logits_kernel, types, constants, units, default))
    return found


def _columns() -> list[Variant]:
    found = []
    units = ("stride_qd", "stride_kd")
    # CLIP, Qwen's encoder (in two parts), the widest in one block, the widest; few rows and many
    heads = (64, 80, 128, 256, *CUT_OFF, *CUT_OFF_PARTS)
    for dtype, head, blocks in product(DTYPES, heads, (1, column.FEW_PROGRAMS)):
        if dtype != "bf16" and head not in (64, 80, 128, 256):
            continue
        common = dtype != "fp16" and head in (64, 72, 80)
        types = {"q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}", "scale": "fp32", "valid_ptr": "*u8"}
        types |= {"bounds_ptr": "*i64", "stats_ptr": "*fp32"}
        for causal, bounds, valid in product(FLAGS, FLAGS, FLAGS):
            constants = {"CAUSAL": causal, "HAS_BOUNDS": bounds, "HAS_VALID": valid, "HEAD": head}
            constants |= column.launch_rule(head, DTYPES[dtype], blocks)
            # as an encoder's images are: alone, or packed
            default = common and not causal and not valid
            found.append(Variant(column.row_stats_kernel, types, constants, units, default))
            more = {"count_ptr": "*i64", "out_ptr": "*fp32"}
            kernel = column.column_mean_kernel
            found.append(Variant(kernel, types | more, constants, units, default))
    return found


def _selections() -> list[Variant]:
    found = []
    found += _nearest()
    for dtype, N, D, weighted in product(DTYPES, (576, 131072), (64, 4096), FLAGS):
        default = D == 4096 and (N == 576 or dtype == "bf16") and dtype != "fp16"
        rule = {"BLOCK_P": greedy.MAX_BESTS, **greedy.launch_rule(N, D)}
        kernels = maxmin.maxmin_step_kernel, dpp.dpp_step_kernel
        found += _greedy(*kernels, dtype, rule, {}, default, weighted)
    widths = (64, 128, 256, 512, 1024, 2048, 4096)
    for dtype, D, P, weighted in product(DTYPES, widths, (1, 128, 1024), FLAGS):
        if D not in (64, 256, 4096) and P != 128:
            continue
        default = D == 4096 and P == 128 and dtype != "fp16"
        rule = {"BLOCK_P": P, **greedy.whole_rule(D, DTYPES[dtype])}
        more = {"first_ptr": "*i64", "given_ptr": "*fp32", "count_ptr": "*i32"}
        kernels = maxmin.maxmin_kernel, dpp.dpp_kernel
        found += _greedy(*kernels, dtype, rule, more, default, weighted)
    return found + _held()


def _held() -> list[Variant]:
    """All products, and selections that read a row of them a step."""
    found = []
    for dtype, even in product(DTYPES, FLAGS):
        size = DTYPES[dtype]
        rules = {tuple(products.products_rule(N, N, size).items()) for N in (1, 700, 1000, 4096)}
        types = {"x_ptr": f"*{dtype}"} | _fp32("inv_ptr", "out_ptr")
        for rule in sorted(rules):
            default = dtype != "fp16" and even
            constants = {"EVEN": even, **dict(rule)}
            found.append(
                Variant(products.products_kernel, types, constants, ("stride_d",), default)
            )
    types = _fp32("cosine_ptr", "weight_ptr") | {"first_ptr": "*i64", "order_ptr": "*i64"}
    shared = {"ZERO": maxmin.ZERO, "LOWEST": maxmin.LOWEST}
    for exponent, weighted in product(range(9, 13), FLAGS):
        constants = shared | {"HAS_WEIGHT": weighted, **maxmin.held_rule(1 << exponent)}
        default = exponent in (10, 12)
        found.append(Variant(maxmin.maxmin_held_kernel, types, constants, (), default))
    return found + _loops()


def _loops() -> list[Variant]:
    """Loops over held products that take all steps in one launch."""
    found = []
    types = _fp32("cosine_ptr", "fit_ptr", "first_ptr", "value_ptr", "gain_ptr")
    types |= {"index_ptr": "*i32", "count_ptr": "*i32", "order_ptr": "*i64"}
    drawn = _fp32("cosine_ptr") | {"drawn_ptr": "*fp64", "order_ptr": "*i64"}
    for exponent in range(9, 13):
        N, default = 1 << exponent, exponent in (10, 12)
        found.append(Variant(cover.cover_kernel, types, cover.cover_rule(N), (), default))
        rule = maxmin.held_rule(N)
        found.append(Variant(starts.kmeans_starts_kernel, drawn, rule, (), default))
    types = _fp32("cosine_ptr", "distance_ptr") | {"left_ptr": "*i32", "out_ptr": "*i64"}
    constants = {"LEAST": distinct.LEAST, **distinct.distinct_rule()}
    return [*found, Variant(distinct.distinct_kernel, types, constants)]


def _greedy(
    distances: Any,
    gains: Any,
    dtype: str,
    rule: dict[str, int],
    more: dict[str, str],
    default: bool,
    weighted: bool,
) -> list[Variant]:
    """One variant of each selection, in a launch a step or in one launch."""
    constants = {"ZERO": maxmin.ZERO, "LOWEST": maxmin.LOWEST, "HAS_WEIGHT": weighted, **rule}
    types = {"value_ptr": "*fp32", "index_ptr": "*i32", "order_ptr": "*i64", "x_ptr": f"*{dtype}"}
    names = ("inv_ptr", "weight_ptr", "nearest_ptr", "relevance_ptr", "gain_ptr", "floor_ptr")
    types |= _fp32(*names, "factor_ptr") | more
    again = {"BLOCK_S": dpp.BLOCK_S, **rule}
    if more:
        constants["EPS"] = again["EPS"] = maxmin.EPS
        again["NOISE"] = dpp.NOISE
    found = [Variant(distances, _own(distances, types), constants, ("stride_d",), default)]
    if weighted:
        found.append(Variant(gains, _own(gains, types), again, ("stride_d",), default))
    return found


def _own(kernel: Any, types: dict[str, str]) -> dict[str, str]:
    return {name: kind for name, kind in types.items() if name in kernel.arg_names}


def _arithmetic() -> list[Variant]:
    found = []
    for dtype in DTYPES:
        default = dtype != "fp16"
        x = f"*{dtype}"
        for D in (64, 4096):
            types = {"x_ptr": x, "y_ptr": x, "magnitude_ptr": "*fp32", "cosine_ptr": "*fp32"}
            constants = {"EPS": transition.EPS, **transition.launch_rule(D)}
            units = ("stride_xd", "stride_yd")
            kernel = transition.transition_scores_kernel
            found.append(Variant(kernel, types, constants, units, default))
        types = {"x_ptr": x, "out_ptr": x, "rows_ptr": "*fp32", "columns_ptr": "*fp32"}
        sizes = product((16, 24, 32, 64, 128, 256), (12, 32), (12, 32))
        for H, P, Q in sizes:
            constants = dct.launch_rule(H, P, Q, DTYPES[dtype])
            constants |= {"ONE_H": constants["BLOCK_H"] >= H, "SPLIT": DTYPES[dtype] == 2}
            kernel = dct.dct_lowpass_kernel
            found.append(Variant(kernel, types, constants, ("stride_c",), default and P == Q))
    return [*found, *_perturbation()]


def _nearest() -> list[Variant]:
    found = []
    units = ("stride_xd", "stride_td")
    for dtype in DTYPES:
        types = {"x_ptr": f"*{dtype}", "t_ptr": f"*{dtype}"}
        rules = {tuple(assign.launch_rule(N, M, DTYPES[dtype]).items()) for N, M in assign_sizes()}
        for D in (64, 4096):
            constants = {"EPS": assign.EPS, **assign.norm_rule(D)}
            default = D == 4096 and dtype != "fp16"
            more = _fp32("out_ptr")
            kernel = assign.inverse_norms_kernel
            found.append(Variant(kernel, types | more, constants, units, default))
        types |= _fp32("inv_ptr", "cosine_ptr")
        for exclude, even, rule, index in product(FLAGS, FLAGS, sorted(rules), ("i32", "i64")):
            constants = {"EXCLUDE_SELF": exclude, "EVEN": even, **dict(rule)}
            default = dtype != "fp16" and even and not exclude and index == "i32"
            kernel = assign.assign_nearest_kernel
            index_type = {"index_ptr": f"*{index}"}
            found.append(Variant(kernel, types | index_type, constants, units, default))
    types = _fp32("cosine_ptr", "out_cosine_ptr") | {"index_ptr": "*i32", "out_index_ptr": "*i64"}
    for splits in (2, 32, 1024):
        constants = assign.split_rule(splits)
        found.append(Variant(assign.best_split_kernel, types, constants, (), splits == 32))
    return found


def assign_sizes() -> Iterable[tuple[int, int]]:
    """Rows and targets that reach every rule."""
    return ((1, 1), (1300, 330), (2000, 600), (3000, 800))


def _perturbation() -> list[Variant]:
    found = []
    for dtype, tanh, even in product(DTYPES, FLAGS, FLAGS):
        default = dtype != "fp16"
        if even:
            types = _fp32("hidden_ptr", "move_ptr", "scale_ptr") | {"out_ptr": f"*{dtype}"}
            constants = {"TANH": tanh, **perturbation.change_rule()}
            kernel = perturbation.activation_change_kernel
            found.append(Variant(kernel, types, constants, (), default and not tanh))
        if tanh:
            types = _fp32("squares_ptr") | {"change_ptr": f"*{dtype}", "w2_ptr": f"*{dtype}"}
            constants = {"EVEN": even, **perturbation.launch_rule(DTYPES[dtype])}
            kernel = perturbation.perturbation_scores_kernel
            found.append(Variant(kernel, types, constants, ("stride_wk",), default and even))
    return found
