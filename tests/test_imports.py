"""Imports: arrows point down the floors only, methods and adapters are apart, files are short."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = (ROOT / "src" / "vispress", ROOT / "kernels" / "vispress_kernels")
FILES = sorted(path for source in SOURCES for path in source.rglob("*.py"))

FLOORS: dict[str, int] = {
    "vispress_kernels": 0,
    "vispress.errors": 1,
    "vispress.types": 1,
    "vispress.kinds": 1,
    "vispress.budget": 1,
    "vispress.checks": 1,
    "vispress.extras": 1,
    "vispress.patch_embedding": 2,
    "vispress.placement": 1,
    "vispress.prompts": 1,
    "vispress.context": 1,
    "vispress.crop_layout": 1,
    "vispress.memory": 1,
    "vispress.module_shape": 1,
    "vispress.devices": 1,
    "vispress.precision": 1,
    "vispress.projectors": 1,
    "vispress.registry": 1,
    "vispress.flops": 1,
    "vispress.versions": 1,
    "vispress.user_code": 1,
    "vispress.yaml_files": 1,
    "vispress.methods": 2,
    "vispress.adapters": 2,
    "vispress.chain": 3,
    "vispress.config": 3,
    "vispress.request": 3,
    "vispress.decoding": 3,
    "vispress.diffusion": 3,
    "vispress.runtime": 3,
    "vispress.weights": 4,
    "vispress.report": 4,
    "vispress.report_builder": 4,
    "vispress.report_html": 4,
    "vispress.report_view": 4,
    "vispress.api": 4,
    "vispress.capturing": 4,
    "vispress": 4,  # the public names
    "vispress.bench": 5,
    "vispress.analysis": 5,
    "vispress.reference": 5,
    "vispress.integrations": 5,
    "vispress.cli": 5,
    "vispress.cli_bench": 5,
    "vispress.cli_options": 5,
    "vispress.cli_search": 5,
    "vispress.doctor": 5,
    "vispress.saving": 5,
    "vispress.voco_cache": 5,
    "vispress.training": 6,
    "vispress.trainer": 6,
    "vispress.listing": 5,
    "vispress.method_facts": 5,
    "vispress.method_options": 5,
    "vispress.supported": 5,
    "vispress.cli_methods": 5,
    "vispress.model_folders": 5,
    "vispress.picture_files": 5,
    "vispress.distillation": 5,
    "vispress.distillation.answers": 6,
}

INNER: dict[str, dict[str, int]] = {
    "vispress.methods": {
        "vispress.methods.cache_evictor": 0,
        "vispress.methods.cached_selector": 0,
        "vispress.methods.compute_pruner": 0,
        "vispress.methods.encoder_merger": 0,
        "vispress.methods.encoder_pooler": 0,
        "vispress.methods.gist_evictor": 0,
        "vispress.methods.pair_masker": 0,
        "vispress.methods.ranking": 0,
        "vispress.methods.segment_shares": 0,
        "vispress.methods.base": 1,
        "vispress.methods.wrapper": 2,
        "vispress.methods._parts": 2,
        "vispress.methods._parts.clustering": 3,
        "vispress.methods._parts.geometry": 3,
        "vispress.methods._parts.video": 4,
        "vispress.methods": 5,  # each method
    },
    "vispress.bench": {
        "vispress.bench.tasks": 0,
        "vispress.bench.model": 1,
        "vispress.bench.plan": 2,
        "vispress.bench.results": 3,
        "vispress.bench.timing": 4,
        "vispress.bench.run": 5,
        "vispress.bench.search": 6,
        "vispress.bench.page": 7,
        "vispress.bench": 8,  # public faces
    },
    "vispress.reference": {
        "vispress.reference.folders": 0,
        "vispress.reference.world": 0,
        "vispress.reference.model": 1,
        "vispress.reference.evaluation": 2,
        "vispress.reference.train": 3,
        "vispress.reference": 4,  # public faces
    },
    "vispress.runtime": {
        "vispress.runtime.hooks": 0,
        "vispress.runtime.layout": 0,
        "vispress.runtime.modules": 0,
        "vispress.runtime.kv_cache": 1,
        "vispress.runtime.tokens": 2,
        "vispress.runtime.encoder": 1,
        "vispress.runtime.plan": 3,
        "vispress.runtime.forward": 5,
        "vispress.runtime.forward.state": 6,
        "vispress.runtime.forward.prompt_context": 7,
        "vispress.runtime.forward.documents": 7,
        "vispress.runtime.forward.survey": 7,
        "vispress.runtime.forward.gist_runs": 7,
        "vispress.runtime.forward.visual_rows": 7,
        "vispress.runtime.forward.visual_windows": 7,
        "vispress.runtime.forward.encoder_signals": 7,
        "vispress.runtime.forward.check_reads": 6,
        "vispress.runtime.forward.setup": 8,
        "vispress.runtime.forward.signals": 8,
        "vispress.runtime.forward.layer_inputs": 8,
        "vispress.runtime.forward.expand": 8,
        "vispress.runtime.forward.softening": 8,
        "vispress.runtime.forward.apply_placement": 9,
        "vispress.runtime.stages.base": 10,
        "vispress.runtime.forward.running": 11,
        "vispress.runtime.stages": 12,  # each stage
        "vispress.runtime.forward.dynamic_decode": 12,
        "vispress.runtime.forward.layer_patch": 12,
        "vispress.runtime.forward.static_decode": 12,
        "vispress.runtime.forward.prefill_record": 12,
        "vispress.runtime.forward.measuring": 12,
        "vispress.runtime.forward.gating": 13,
        "vispress.runtime.forward.handover": 12,
        "vispress.runtime.forward.feed_forward": 13,
        "vispress.runtime.forward.turns": 13,
        "vispress.runtime.forward.base_model": 13,
        "vispress.runtime.forward.prefill": 13,
        "vispress.runtime.footprint": 12,
        "vispress.runtime.forward.chunks": 14,
        "vispress.runtime.attachment": 15,
        "vispress.runtime.graphs": 16,
        "vispress.runtime": 17,
    },
}
"""Floors inside a part of the house; there imports for type checkers count, too."""

LATE = {("vispress.registry", "vispress.methods")}
"""Imports in a function that may go up: the registry loads the built-in methods on first use."""

FORBIDDEN = {
    "vispress_kernels": {"transformers", "vispress", "matplotlib", "numpy"},
    "vispress.methods": {"transformers", "triton", "matplotlib"},
    "vispress.errors": {"torch", "transformers"},
    "vispress.budget": {"torch", "transformers"},
    "vispress.registry": {"torch", "transformers"},
    "vispress.types": {"transformers"},
    "vispress.context": {"transformers"},
    "vispress.devices": {"transformers"},
    "vispress.projectors": {"transformers"},
}
"""Outside packages that part of the house must not know."""

MOST_LINES = 300


def module_name(path: Path, root: Path = ROOT) -> str:
    """Dotted name of a source file."""
    base = root / "src" if (root / "src") in path.parents else root / "kernels"
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def longest_prefix(module: str, names: Iterable[str]) -> str | None:
    """Find the longest of the names that a module is or belongs to."""
    found = [name for name in names if module == name or module.startswith(name + ".")]
    return max(found, key=len, default=None)


def part_of(module: str) -> str:
    """Find the entry of `FLOORS` that a module belongs to."""
    found = longest_prefix(module, FLOORS)
    if found is None or (found == "vispress" and module != "vispress"):
        raise AssertionError(f"{module} stands on no floor; add it to FLOORS")
    return found


def imports(tree: ast.Module, module: str) -> Iterator[tuple[str, bool, bool]]:
    """`(imported module, at module level, for type checkers only)` of every import statement."""

    def walk(node: ast.AST, top: bool, typing: bool) -> Iterator[tuple[str, bool, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, top, typing) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module}: relative import"
                assert child.module is not None
                yield child.module, top, typing
                if child.module in ("vispress", "vispress.runtime", "vispress.methods"):
                    names = (f"{child.module}.{alias.name}" for alias in child.names)
                    yield from ((n, top, typing) for n in names if is_module(n))
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                for inner in child.body:
                    yield from walk(ast.Module([inner], []), top, True)
                for inner in child.orelse:
                    yield from walk(ast.Module([inner], []), top, typing)
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, top and not function, typing)

    yield from walk(tree, True, False)


def goes_up_inside(module: str, target: str) -> bool:
    """Tell whether an import goes up between the floors of one part of the house."""
    for floors in INNER.values():
        own, other = longest_prefix(module, floors), longest_prefix(target, floors)
        if own is not None and other is not None and floors[other] > floors[own]:
            return True
    return False


def is_module(name: str) -> bool:
    path = ROOT / "src" / Path(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def bad_arrows(source: str, module: str) -> list[str]:
    """Imports of a module that go up, sideways between methods and adapters, or out of bounds."""
    own = part_of(module)
    bad = []
    for target, top, typing in imports(ast.parse(source), module):
        if goes_up_inside(module, target):
            bad.append(f"{module} -> {target}")
            continue
        if typing:
            continue
        package = target.split(".")[0]
        if package in FORBIDDEN.get(own, ()) or (
            package == "triton" and not may_use_triton(module)
        ):
            bad.append(f"{module} -> {target}")
            continue
        if package not in ("vispress", "vispress_kernels"):
            continue
        other = part_of(target)
        allowed = FLOORS[other] < FLOORS[own] or own == other
        # one floor: siblings see each other, but methods and adapters are apart
        allowed |= FLOORS[other] == FLOORS[own] and {own, other} != {
            "vispress.methods",
            "vispress.adapters",
        }
        allowed |= not top and (own, other) in LATE
        if not allowed:
            bad.append(f"{module} -> {target}")
    return bad


def may_use_triton(module: str) -> bool:
    """Launch files of kernels (imported when a kernel is launched), and the diagnosis."""
    return module.startswith("vispress_kernels.") or FLOORS[part_of(module)] == 5


def test_arrows_point_down() -> None:
    found = {
        name: bad_arrows(path.read_text(encoding="utf-8"), name)
        for path, name in zip(FILES, map(module_name, FILES), strict=True)
    }
    assert {name: bad for name, bad in found.items() if bad} == {}


def test_every_package_with_inner_floors_stands_on_one() -> None:
    for part, floors in INNER.items():
        home = ROOT / "src" / Path(*part.split("."))
        packages = {f"{part}.{path.parent.name}" for path in home.glob("*/__init__.py")}
        assert packages <= set(floors), part


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("vispress.budget", "from vispress.methods.base import Compressor"),
        ("vispress.registry", "import vispress.methods"),
        ("vispress.methods.fastv", "from vispress.adapters.base import find_adapter"),
        ("vispress.adapters.llava", "from vispress.methods.fastv import FastV"),
        ("vispress.methods.fastv", "from vispress.runtime.forward import prefill"),
        ("vispress.methods.fastv", "import transformers.cache_utils"),
        ("vispress.methods.base", "from vispress.methods.fastv import FastV"),
        ("vispress.bench.tasks.task", "from vispress.bench.model.loaded_model import DTYPES"),
        ("vispress.bench.results.store", "def f():\n    import vispress.bench.run.engine"),
        (
            "vispress.reference.world.words",
            "if TYPE_CHECKING:\n    from vispress.reference.model.qwen import QWEN_ID",
        ),
        ("vispress.reference.model.checkpoint", "from vispress.reference import load"),
        ("vispress.methods._parts.scoring.cosines", "from vispress.methods import fastv"),
        (
            "vispress.methods._parts.geometry.grids",
            "if TYPE_CHECKING:\n    from vispress.methods._parts.video.frames import Frames",
        ),
        ("vispress.methods.fastv", "def f():\n    from transformers import Cache"),
        ("vispress.runtime.forward.state", "from vispress.api import compress_model"),
        ("vispress.runtime.forward.state", "from vispress import api"),
        ("vispress.adapters.llava", "def f():\n    from vispress.runtime.forward import prefill"),
        ("vispress.api", "from vispress.bench.run.engine import run"),
        ("vispress_kernels.dct_lowpass", "from vispress.errors import VispressError"),
        ("vispress.runtime.forward.state", "import triton"),
        ("vispress.runtime.forward.state", "if x:\n    from vispress.cli import main"),
    ],
)
def test_a_bad_arrow_is_found(module: str, line: str) -> None:
    assert len(bad_arrows(line, module)) >= 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("vispress.registry", "def f():\n    import vispress.methods"),
        (
            "vispress.registry",
            "if TYPE_CHECKING:\n    from vispress.methods.base import Compressor",
        ),
        ("vispress.methods.fastv", "from vispress_kernels.dct_lowpass import dct_lowpass"),
        ("vispress.methods.fastv", "from vispress.methods._parts.scoring.cosines import unit"),
        ("vispress.runtime.forward.state", "from vispress.adapters.base import find_adapter"),
        ("vispress.bench.run.engine", "from vispress.reference.model.checkpoint import read"),
        ("vispress.bench.run.engine", "from vispress.bench.run.applied_cell import answer"),
        ("vispress.reference", "from vispress.reference.train.train import train_reference"),
    ],
)
def test_a_good_arrow_is_let_through(module: str, line: str) -> None:
    assert bad_arrows(line, module) == []


def test_a_module_on_no_floor_is_found() -> None:
    with pytest.raises(AssertionError, match="no floor"):
        part_of("vispress.elsewhere")


@pytest.mark.slow
def test_all_but_launch_files_import_where_there_is_no_triton() -> None:
    """Public faces, references and methods; the torch references then run."""
    launch = {"kernel"} | {path.stem for path in SOURCES[1].glob("_*.py")}
    names = [
        name
        for name in map(module_name, FILES)
        if part_of(name) in ("vispress_kernels", "vispress.methods")
        and name.rsplit(".", 1)[-1] not in launch
    ]
    assert len(names) > 20
    loads = "".join(f"import {name}\n" for name in names)
    paths = [str(ROOT / "src"), str(ROOT / "kernels")]
    blocked = f"import sys\nsys.path[:0] = {paths}\nsys.modules['triton'] = None\n"
    failing = "print('all are in')\nimport vispress_kernels.dpp_select.kernel"
    command = [sys.executable, "-c", blocked + loads + failing]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "all are in" in done.stdout, done.stderr
    assert "triton" in done.stderr


def test_source_files_stay_short() -> None:
    lines = {module_name(p): len(p.read_text(encoding="utf-8").splitlines()) for p in FILES}
    long = {name: number for name, number in lines.items() if number > MOST_LINES}
    assert long == {}, "split them"


def test_the_public_names_are_there() -> None:
    import vispress

    for name in vispress.__all__:
        assert callable(getattr(vispress, name))
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        _ = vispress.compres
