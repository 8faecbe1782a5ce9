"""What the pages of `docs/` and CONTRIBUTING.md name in backticks is there, and the floors too."""

import ast
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib import import_module
from itertools import pairwise
from keyword import iskeyword
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import pytest
import yaml
from click import Context
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.main import get_command

from tests.test_imports import INNER
from vispress.bench.plan.plan import plan_from_mapping
from vispress.bench.tasks.yaml_task import parse_yaml_task
from vispress.cli import app
from vispress.config import load_config
from vispress.reference import load
from vispress.registry import list_methods

ROOT = Path(__file__).parents[1]
HOMES = (ROOT, ROOT / "src" / "vispress", ROOT / "src" / "vispress" / "runtime")
"""Where a path may begin."""
SOURCES = (ROOT / "src", ROOT / "kernels", ROOT / "tests")
DOCS = ROOT / "docs"
ARCHITECTURE = DOCS / "architecture.md"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "CONTRIBUTING.md"])
FILE = re.compile(r"[\w.<>-]+(/[\w.<>-]*)+|[\w-]+\.(py|md|ya?ml|json|toml)")
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
OUTSIDE = ("nn", "torch", "copy", "transformers", "vllm")
"""Packages of others, whose names are not looked for."""


def quoted(text: str) -> list[str]:
    """Everything in single backticks, fenced blocks left out."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def sources() -> list[Path]:
    """All Python files but this one, which names what is not there."""
    files = (path for home in SOURCES for path in home.rglob("*.py"))
    return [path for path in files if path != Path(__file__)]


@cache
def trees() -> dict[Path, ast.Module]:
    """What is written in each of them."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources()}


@cache
def words() -> frozenset[str]:
    """Every name, attribute, parameter, keyword and string of the sources; variables of CI, too."""
    found = set(re.findall(r"\b[A-Z_]{4,}\b", (ROOT / ".ci" / "run").read_text("utf-8")))
    for path, tree in trees().items():
        found |= {path.stem, path.parent.name}
        for node in ast.walk(tree):
            for field in ("name", "id", "attr", "arg"):
                found.add(str(getattr(node, field, "")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return frozenset(found)


@cache
def members() -> dict[str, frozenset[str]]:
    """What stands directly in each class and module of the sources, by its short name."""
    found: dict[str, set[str]] = {}
    for path, tree in trees().items():
        home = path.parent if path.stem == "__init__" else path.with_suffix("")
        inside = {child.stem for child in home.iterdir()} if home.is_dir() else set[str]()
        found.setdefault(home.name, set()).update(inside, _names(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, set()).update(_names(node))
    return {name: frozenset(inside) for name, inside in found.items()}


def _names(node: ast.AST) -> set[str]:
    """Names that a class or module defines, imports or sets, `self.x` among them."""
    found = set()
    for child in ast.walk(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            found.add(child.name)
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            found.add(child.id)
        elif isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
            found.add(child.attr)
        elif isinstance(child, ast.alias):
            found.add((child.asname or child.name).split(".")[-1])
    return found


def missing(quote: str) -> bool:
    """Tell whether a quote looks like a file, a command or a name, and there is no such thing."""
    if quote.startswith("make "):
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        return not re.search(rf"^{quote.split()[1]}:", makefile, re.MULTILINE)
    if quote.startswith("python -m "):
        module = quote.split()[2]
        homes = (home / Path(*module.split(".")) for home in (ROOT, *SOURCES[:2]))
        return not any(h.is_dir() or h.with_suffix(".py").exists() for h in homes)
    if iskeyword(quote):
        return False
    if FILE.fullmatch(quote):
        if "<" in quote:  # a pattern: something must fit it
            pattern = re.sub(r"<\w+>", "*", quote)
            return not any(any(home.glob(pattern)) for home in HOMES)
        return not any((home / quote).exists() for home in HOMES)
    name = re.sub(r"\(.*\)$|=.*$", "", quote.lstrip("@"))
    if not NAME.fullmatch(name) or name.split(".")[0] in OUTSIDE:
        return False
    parts = name.split(".")
    if any(part not in words() for part in parts):
        return True
    return any(inside not in members().get(home, {inside}) for home, inside in pairwise(parts))


@pytest.mark.slow(cases=4)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [quote for quote in quoted(text) if missing(quote)] == []


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "README.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name
)
def test_its_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        target = page.parent / path if path else page
        if page.parent == DOCS and (path == "api.md" or target.parent == DOCS / "methods"):
            assert target.stem in ("api", "index", *list_methods()), link  # `docs/generate.py`
            continue
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}


def test_files_that_pages_lead_to_are_published() -> None:
    """What is left out is of `docs/` itself: mkdocs says nothing of links to what is left out."""
    settings = (ROOT / "mkdocs.yml").read_text("utf-8")
    (left_out,) = re.findall(r"^exclude_docs: \|\n((?:  .+\n)+)", settings, re.MULTILINE)
    assert all(line.strip().startswith("/") for line in left_out.splitlines())


def test_every_page_is_in_the_navigation() -> None:
    """`make docs` holds the same, for pages that are made too."""
    listed = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted([*(page.name for page in DOCS.glob("*.md")), "api.md"])


@pytest.mark.slow(cases=10)
@pytest.mark.parametrize(
    "quote",
    [
        "forward/select.py",
        "docs/lawes.md",
        "tests/nowhere/test_<name>.py",
        "make coffee",
        "python -m tests.mutant",
        "PairStepping",
        "ForwardState.rows_from",
        "prefill.enter_layers",
        "vispress.runtime.attach",
        "Stage.GATES",
    ],
)
def test_what_is_not_there_is_noticed(quote: str) -> None:
    assert missing(quote)


WRITTEN = [page for page in PAGES if page.parent == DOCS and page.name not in ("training.md",)]
"""Pages whose snippets are run here; those of training are for models that are not shipped."""


def blocks_of(page: Path, language: str) -> list[str]:
    """Fenced blocks in a language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow(cases=20)
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # from 5.24 on, `cache`
@pytest.mark.parametrize(
    "page", [p for p in WRITTEN if blocks_of(p, "python")], ids=lambda page: page.name
)
def test_its_python_runs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One after another, on the model that ships, in place of checkpoints that are fetched."""
    monkeypatch.chdir(tmp_path)
    for registry in ("registry._METHODS", "adapters.registry._ADAPTERS"):
        module, name = registry.rsplit(".", 1)
        known = getattr(import_module(f"vispress.{module}"), name)
        monkeypatch.setattr(f"vispress.{registry}", dict(known))
    model, processor = load()
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    blocks = blocks_of(page, "python")
    namespace: dict[str, object] = {"__name__": "page"}
    monkeypatch.setitem(sys.modules, "page", ModuleType("page"))
    for block in blocks:
        exec(compile(block, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_its_commands_are_understood(page: Path) -> None:
    for block in blocks_of(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["vispress"]:
                command = get_command(app).commands[words[1]]
                command.make_parser(Context(command)).parse_args(words[2:])


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_its_yaml_is_taken(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in blocks_of(page, "yaml"):
        data = yaml.safe_load(block)
        if "tasks" in data:
            assert plan_from_mapping(data).cells()
        elif "dataset" in data:
            assert parse_yaml_task(data, page.name).name == data["name"]
        else:
            assert load_config(data)


@pytest.mark.slow
def test_the_method_of_contributing_works_with_its_test() -> None:
    """In a process of its own: a method that is registered here would be one of ours."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"   ```python\n(.*?)   ```", text, flags=re.DOTALL)
    method, worked = map(dedent, blocks)
    worked = worked.replace("from vispress.methods import MyNorm\n", "")  # its import line
    code = f"{method}\n{worked}\ntest_keeps_the_longest()"
    paths = os.pathsep.join(map(str, (ROOT, *SOURCES[:2])))
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_floors_of_the_architecture_are_those_that_hold() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    (line,) = re.findall(r"^`hooks`.*?(?=\n\n)", text, flags=re.MULTILINE | re.DOTALL)
    rows = [re.findall(r"`([\w.]+)`", row) for row in line.split("<")]
    names = re.findall(r"`([\w.]+)`", line)
    floors = {name: INNER["vispress.runtime"][f"vispress.runtime.{name}"] for name in names}
    told = {f"vispress.runtime.{name}" for name in floors} | {"vispress.runtime"}
    assert told == set(INNER["vispress.runtime"])
    for lower, upper in pairwise(rows):
        assert max(floors[name] for name in lower) < min(floors[name] for name in upper)


def test_the_architecture_names_every_context_variable() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    for path in (ROOT / "src" / "vispress").rglob("*.py"):
        for name in re.findall(r"^(\w+): ContextVar\[", path.read_text("utf-8"), re.MULTILINE):
            if "/decoding/" not in path.as_posix():
                assert f"`{name}`" in text, f"{name} of {path.name}"
