"""Packaging: importing is light, and the wheel and the sdist hold what they must."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("transformers", "triton", "matplotlib", "sklearn", "PIL", "typer", "rich")


STEPS = (
    "import vispress; vispress.__all__; vispress.__version__",
    "from vispress import list_methods; assert len(list_methods()) > 10",
    "import vispress.runtime.kv_cache.dynamic",
)


@pytest.mark.slow
def test_importing_and_listing_methods_load_nothing_heavy() -> None:
    """What is loaded after each of a few steps in a fresh interpreter; the last loads much."""
    lines = ["import sys", f"sys.path[:0] = [{str(ROOT / 'src')!r}, {str(ROOT / 'kernels')!r}]"]
    for step in STEPS:
        lines += [step, f"print(*(name for name in {HEAVY!r} if name in sys.modules))"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    imported, listed, run = (set(line.split()) for line in done.stdout.split("\n")[: len(STEPS)])
    assert imported == set()
    assert listed & {"transformers", "triton", "matplotlib", "sklearn"} == set()
    assert "transformers" in run


def built(home: Path, out: Path) -> dict[str, Path]:
    """A wheel and an sdist, built offline."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def names_in(files: dict[str, Path]) -> dict[str, set[str]]:
    """What a wheel and an sdist hold."""
    with zipfile.ZipFile(files["wheel"]) as archive:
        names = set(archive.namelist())
    with tarfile.open(files["sdist"]) as archive:
        inside = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    return {"wheel": names, "sdist": inside}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return built(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def distributions(files: dict[str, Path]) -> dict[str, set[str]]:
    return names_in(files)


@pytest.mark.slow
def test_the_wheel_holds_every_module_of_both_source_roots(
    distributions: dict[str, set[str]],
) -> None:
    for base in ("src", "kernels"):
        expected = {
            str(path.relative_to(ROOT / base)) for path in (ROOT / base).glob("vispress*/**/*.py")
        }
        assert expected
        assert expected <= distributions["wheel"]


@pytest.mark.slow
def test_the_wheel_holds_every_configuration(distributions: dict[str, set[str]]) -> None:
    configs = {f"vispress/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert "vispress/configs/methods/fastv.yaml" in configs
    assert configs <= distributions["wheel"]


MODEL = (
    "MODEL_CARD.md",
    "config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
)
COMPRESSOR = ("compressor.yaml", "curve.json", "modules.safetensors", "vispress.json")


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_model_of_the_demo(distributions: dict[str, set[str]]) -> None:
    needed = {f"vispress/reference/checkpoint/{name}" for name in MODEL}
    needed |= {f"vispress/reference/compressor/{name}" for name in COMPRESSOR}
    assert needed <= distributions["wheel"]
    assert {f"src/{name}" for name in needed} <= distributions["sdist"]


@pytest.mark.slow
def test_the_wheel_is_small(files: dict[str, Path]) -> None:
    assert files["wheel"].stat().st_size < 10e6


@pytest.mark.slow
def test_the_other_models_have_a_distribution_of_their_own(tmp_path: Path) -> None:
    out = names_in(built(ROOT / "references", tmp_path))
    tops = ("checkpoint_qwen2_5_vl", "checkpoint_qwen2_5_vl_clips")
    needed = {f"vispress_references/{top}/{name}" for top in tops for name in MODEL}
    needed |= {f"vispress_references/compressor_qwen2_5_vl/{name}" for name in COMPRESSOR}
    assert needed <= out["wheel"]
    assert {f"src/{name}" for name in needed} <= out["sdist"]
    assert not [name for name in out["wheel"] if name.endswith(".py") and "__init__" not in name]


@pytest.mark.slow
def test_the_wheel_holds_the_template_of_the_page(distributions: dict[str, set[str]]) -> None:
    home = "vispress/bench/page/templates"
    names = {f"{home}/{path.name}" for path in (ROOT / "src" / home).iterdir()}
    assert f"{home}/page.html" in names
    assert names <= distributions["wheel"]


@pytest.mark.slow
def test_the_wheel_holds_nothing_else(distributions: dict[str, set[str]]) -> None:
    tops = {name.split("/")[0] for name in distributions["wheel"]}
    assert {re.sub(r"-\d.*", "", top) for top in tops} == {"vispress", "vispress_kernels"}
    assert not [name for name in distributions["wheel"] if "test" in name or "__pycache__" in name]


@pytest.mark.slow
def test_the_sdist_can_build_and_test_itself(distributions: dict[str, set[str]]) -> None:
    needed = {"pyproject.toml", "LICENSE", "src/vispress/api.py", "tests/laws/cases.py"}
    needed |= {"kernels/vispress_kernels/__init__.py", "configs/methods/fastv.yaml"}
    assert needed <= distributions["sdist"]


def test_no_test_is_skipped_for_a_package_that_make_installs_not() -> None:
    import tomllib

    skipped = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r'(?:importorskip|find_spec)\("(\w+)"\)', path.read_text("utf-8"))
    }
    assert "triton" in skipped
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    wanted = re.findall(r"-e \"\.\[([\w,]+)\]", (ROOT / "Makefile").read_text())
    brought = {
        re.split(r"[^\w-]", need)[0] for extra in wanted[0].split(",") for need in extras[extra]
    }
    assert skipped <= brought


def test_the_folder_kernels_is_no_package() -> None:
    """As a package it would shadow Hugging Face's `kernels`, which transformers imports."""
    assert (ROOT / "kernels" / "vispress_kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_version_is_one() -> None:
    import tomllib

    import vispress

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == vispress.__version__
    references = tomllib.loads((ROOT / "references" / "pyproject.toml").read_text())["project"]
    assert references["version"] == vispress.__version__
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {vispress.__version__}\n" in citation
