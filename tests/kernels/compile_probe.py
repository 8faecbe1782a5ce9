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
from pathlib import Path
from typing import Any

import triton
from compile_variants import Variant, variants
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


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
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": compiled.metadata.shared,
        "num_warps": compiled.metadata.num_warps,
    }


def main(out: str, capability: str, *flags: str) -> None:
    """Compile, and write what was found, or the error, for each variant by name."""
    results = {}
    for variant in variants():
        if not (variant.default or "--all" in flags):
            continue
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
