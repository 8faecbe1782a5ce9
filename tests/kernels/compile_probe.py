"""Compile every kernel to a cubin, without a GPU, and record what each takes on the device.

Run by test_compile.py in a process of its own: kernels decorated under TRITON_INTERPRET cannot be
compiled. `python compile_probe.py OUT.json CAPABILITY [--all]`.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vispress_kernels.assign_nearest import kernel as assign
from vispress_kernels.column_attention import kernel as column
from vispress_kernels.dct_lowpass import kernel as dct
from vispress_kernels.dpp_select import kernel as dpp
from vispress_kernels.gather_tokens import kernel as gather
from vispress_kernels.maxmin_select import kernel as maxmin
from vispress_kernels.merge_tokens import kernel as merge
from vispress_kernels.perturbation_scores import kernel as perturbation
from vispress_kernels.query_attention import kernel as query
from vispress_kernels.transition_scores import kernel as transition

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass
class Variant:
    """One configuration: `types` are Triton types by argument, `constants` the constexprs.

    Arguments in neither are i32. Strides named in `units` are 1, as for contiguous tensors.
    """

    kernel: Any
    types: dict[str, Any]
    constants: dict[str, Any]
    units: tuple[str, ...] = ()
    default: bool = True
    tuples: dict[tuple[int, ...], Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        flat = {t if isinstance(t, str) else str(t[0]) for t in self.types.values()}
        types = "-".join(sorted(flat))
        parts = [f"{k}={v}" for k, v in self.constants.items()]
        return f"{self.kernel.__name__}[{types},{','.join(parts)}]"


def variants() -> list[Variant]:
    """Everything the launch rules can choose; `default` marks what the quick run compiles."""
    return [*_copies(), *_attention(), *_selections(), *_arithmetic()]


def _copies() -> list[Variant]:
    found = []
    rules = sorted({gather.launch_rule(D) for D in range(1, 5000)})
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
    for dtype, weighted in product(DTYPES, (True, False)):
        types = {"order_ptr": "*i64", "start_ptr": "*i64", "weight_ptr": "*fp32"}
        for ratio in range(1, 33):
            constants = {"HAS_WEIGHT": weighted, **merge.launch_rule(ratio * 64, 64)}
            types = {**types, "x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
            default = weighted and dtype != "fp16"
            kernel = merge.merge_tokens_kernel
            found.append(Variant(kernel, dict(types), constants, ("stride_d",), default))
    return found


def _attention() -> list[Variant]:
    found = []
    fp32 = dict.fromkeys(("logits_ptr", "max_ptr", "sum_ptr", "out_ptr", "scale"), "fp32")
    fp32 = {k: v if k == "scale" else "*fp32" for k, v in fp32.items()}
    flags = (True, False)
    for mean in flags:
        constants = {"MEAN": mean, "BLOCK_S": query.MAX_SPLITS, "BLOCK_N": 128, "num_warps": 4}
        types = {k: v for k, v in fp32.items() if k != "scale"}
        found.append(Variant(query.weights_kernel, types, constants))
    for dtype, head, rows, valid, causal in product(DTYPES, (64, 80, 256), flags, flags, flags):
        default = rows and valid and causal and dtype != "fp16" and head != 256
        qk = {"q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}", "scale": "fp32"}
        units = ("stride_qd", "stride_kd")
        count = 16 if causal else 64
        types = {**fp32, **qk, "rows_ptr": "*i64", "valid_ptr": "*u8"}
        types.pop("out_ptr")
        constants = {
            "HAS_ROWS": rows,
            "HAS_VALID": valid,
            **query.launch_rule(count, head, DTYPES[dtype]),
        }
        quick = rows and valid and dtype != "fp16" and head != 256
        found.append(Variant(query.logits_kernel, types, constants, units, quick))
        constants = {
            "CAUSAL": causal,
            "HAS_BOUNDS": rows,
            "HAS_VALID": valid,
            **column.launch_rule(head, DTYPES[dtype]),
        }
        types = {**qk, "bounds_ptr": "*i64", "valid_ptr": "*u8", "lse_ptr": "*fp32"}
        found.append(Variant(column.row_lse_kernel, types, constants, units, default))
        types = {**types, "count_ptr": "*i64", "out_ptr": "*fp32"}
        found.append(Variant(column.column_mean_kernel, types, constants, units, default))
    return found


def _selections() -> list[Variant]:
    found = []
    for dtype, exclude in product(DTYPES, (True, False)):
        types = {"x_ptr": f"*{dtype}", "t_ptr": f"*{dtype}", "index_ptr": "*i64"}
        types |= dict.fromkeys(("x_inv_ptr", "t_inv_ptr", "cosine_ptr"), "*fp32")
        constants = {"EXCLUDE_SELF": exclude, **assign.launch_rule(DTYPES[dtype])}
        default = exclude and dtype != "fp16"
        units = ("stride_xd", "stride_td")
        found.append(Variant(assign.assign_nearest_kernel, types, constants, units, default))
    bests = {"value_ptr": "*fp32", "index_ptr": "*i32", "order_ptr": "*i64"}
    for dtype, N, D, weighted in product(DTYPES, (576, 131072), (64, 4096), (True, False)):
        types = {**bests, "x_ptr": f"*{dtype}"}
        rule = {"BLOCK_P": maxmin.MAX_BESTS, **maxmin.launch_rule(N, D)}
        default = weighted and D == 4096 and (N == 576 or dtype == "bf16") and dtype != "fp16"
        more = dict.fromkeys(("inv_ptr", "weight_ptr", "nearest_ptr"), "*fp32")
        constants = {"ZERO": maxmin.ZERO, "LOWEST": maxmin.LOWEST, "HAS_WEIGHT": weighted, **rule}
        kernel = maxmin.maxmin_step_kernel
        found.append(Variant(kernel, types | more, constants, ("stride_d",), default))
        if weighted:
            more = dict.fromkeys(
                ("inv_ptr", "relevance_ptr", "gain_ptr", "floor_ptr", "factor_ptr"), "*fp32"
            )
            kernel = dpp.dpp_step_kernel
            found.append(Variant(kernel, types | more, rule, ("stride_d",), default))
    return found


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
        kernel = dct.dct_lowpass_kernel
        found.append(Variant(kernel, types, dct.launch_rule(), ("stride_c",), default))
        for tanh in (False, True):
            types = dict.fromkeys(("hidden_ptr", "move_ptr", "norm_ptr"), "*fp32")
            types = {**types, "w2_ptr": x}
            constants = {"TANH": tanh, **perturbation.launch_rule()}
            kernel = perturbation.perturbation_scores_kernel
            quick = default and not tanh
            found.append(Variant(kernel, types, constants, ("stride_wk",), quick))
    return found


def compile_variant(variant: Variant, capability: int) -> dict[str, Any]:
    """Compile to a cubin; registers, stack (where spills go) and shared memory of the result."""
    constants = dict(variant.constants)
    options = {k: constants.pop(k) for k in ("num_warps", "num_stages") if k in constants}
    constants |= dict.fromkeys(variant.units, 1)
    names = variant.kernel.arg_names
    unknown = (set(variant.types) | set(constants)) - set(names)
    assert not unknown, f"{variant.kernel.__name__} has no arguments {unknown}"
    signature = {n: "constexpr" if n in constants else variant.types.get(n, "i32") for n in names}
    # pointers and widths as they are in practice: multiples of 16
    aligned = [
        i
        for i, n in enumerate(names)
        if str(signature[n]).startswith("*") or n in ("D", "Dh", "C") or n.startswith("stride_")
    ]
    source = ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs={(names.index(n),): v for n, v in constants.items()} | variant.tuples,
        attrs={
            (i,): [["tt.divisibility", 16]] for i in aligned if signature[names[i]] != "constexpr"
        },
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={**options, "enable_fp_fusion": True})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": compiled.metadata.shared,
        "num_warps": compiled.metadata.num_warps,
    }


def main(out: str, capability: str, *flags: str) -> None:
    """Compile, and write what was found, or the error, for each variant by name."""
    results = {}
    for variant in variants():
        if variant.name in results or not (variant.default or "--all" in flags):
            continue
        try:
            results[variant.name] = compile_variant(variant, int(capability))
        except Exception as error:  # every failure is reported, not only the first
            results[variant.name] = {"error": f"{type(error).__name__}: {error}"}
        results[variant.name]["kernel"] = variant.kernel.__name__
    Path(out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
