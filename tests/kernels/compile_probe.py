"""Compile every kernel to a cubin, without a GPU, and record what each takes on the device.

Run by test_compile.py in a process of its own: kernels decorated under TRITON_INTERPRET cannot be
compiled. From the repository's root, what is kept in `benchmarks/results/compile`:

    python tests/kernels/compile_probe.py benchmarks/results/compile/sm90.json 90 --all
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import triton
from compile_variants import Variant, variants
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

THROUGH = tuple(f"arith.{name}" for name in ("addi", "subi", "muli", "select", "minsi", "maxsi"))
THROUGH += ("tt.splat", "tt.broadcast", "tt.expand_dims")
"""What carries an offset's width from its operands to its result."""


def compile_variant(variant: Variant, capability: int) -> dict[str, Any]:
    """Compile to a cubin; registers, stack (where spills go) and shared memory of the result."""
    constants = dict(variant.constants)
    options = {k: constants.pop(k) for k in ("num_warps", "num_stages") if k in constants}
    constants |= dict.fromkeys(variant.units, 1)
    names = variant.kernel.arg_names
    unknown = (set(variant.types) | set(constants)) - set(names)
    assert not unknown, f"{variant.kernel.__name__} has no arguments {unknown}"
    params = {p.name for p in variant.kernel.params if p.is_constexpr}
    assert params <= set(constants), f"{variant.kernel.__name__} needs {params - set(constants)}"
    signature = {n: "constexpr" if n in constants else variant.types.get(n, "i32") for n in names}
    # torch's pointers are multiples of 16; widths and strides are in the usual shapes
    aligned = [
        i
        for i, n in enumerate(names)
        if str(signature[n]).startswith("*")
        or (variant.even and (n in ("D", "Dh", "C") or n.startswith("stride_")))
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
        "narrow": narrow_products(compiled.asm["ttir"]),
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": compiled.metadata.shared,
        "num_warps": compiled.metadata.num_warps,
    }


def narrow_products(ttir: str) -> list[str]:
    """Products of two variables in 32 bits that an address is made from; they may pass 2**31.

    Walks back from every address that is moved by 32 bits and from every value that is widened.
    """
    made, starts = {}, []
    for line in ttir.splitlines():
        found = re.match(r"\s*(%\w+)(?::\d+)? = \"?([\w.]+)\"?(.*)", line)
        if not found:
            continue
        name, op, rest = found.groups()
        operands = re.findall(r"%\w+", rest.split(" loc(")[0])
        made[name] = (op, operands, rest.strip())
        narrow = re.search(r"xi32>|, i32|: i32", rest)
        if (op == "tt.addptr" and narrow) or op == "arith.extsi":
            starts.append(operands[-1])
    flagged, seen = [], set()
    while starts:
        name = starts.pop()
        op, operands, rest = made.get(name, ("", [], ""))
        if name in seen or op not in THROUGH or "i64" in rest.rsplit(":", 1)[-1]:
            continue
        seen.add(name)
        variable = [o for o in operands if made.get(o, ("",))[0] != "arith.constant"]
        if op == "arith.muli" and len(variable) > 1:
            flagged.append(f"{name} = {op} {rest.split(' loc(')[0]}")
        starts += operands
    return flagged


def _asked(flags: Collection[str]) -> list[Variant]:
    """`--all`, or the defaults; `--even` of them; `--one` of each kernel, with the most flags."""
    found = [
        v
        for v in variants()
        if (v.default or "--all" in flags) and (v.even or "--even" not in flags)
    ]
    if "--one" not in flags:
        return found
    by_flags = sorted(found, key=lambda v: sum(c is True for c in v.constants.values()))
    return list({v.kernel: v for v in by_flags}.values())


def main(out: str, capability: str, *flags: str) -> None:
    """Compile, and write what was found, or the error, for each variant by name."""
    results = {}
    for variant in _asked(flags):
        try:
            found = compile_variant(variant, int(capability))
        except Exception as error:  # every failure is reported, not only the first
            found = {"error": f"{type(error).__name__}: {error}"}
        marks = {"kernel": variant.kernel.__name__, "default": variant.default}
        marks["even"] = variant.even
        results[variant.name] = found | marks
    data = {"capability": int(capability), "triton": triton.__version__, "variants": results}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
