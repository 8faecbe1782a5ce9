"""Hook of mkdocs: makes a page a method, their index, and the tables that pages ask for.

A page is the method's docstring, its registry entry, its published setting, the laws that meet it
and what it scored. Nothing of it is written by hand, so nothing of it grows old. A line
`<!-- table: NAME ARGUMENTS -->` of a page becomes the table of that name in `docs/tables.py`.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Final

from met_by import laws_of
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from tables import TABLES, adds, own_of, papers, published_of, scores_of, speeds_of, trained_of

import vispress
from vispress.doctor import families
from vispress.kinds import EVIDENCE
from vispress.listing import PLACES, method_markdown
from vispress.method_facts import MethodFacts, Setting, facts_of
from vispress.registry import list_methods

FAMILIES: Final = families()
METHODS: Final = {name: facts_of(name, FAMILIES) for name in list_methods()}
INDEX: Final = "methods/index.md"
API: Final = "api.md"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the methods where the navigation says METHODS."""
    listed: list[object] = [INDEX]
    for heading, names in _by_place():
        listed.append({heading: [{name: f"methods/{name}.md"} for name in names]})
    config.nav = [
        {"Methods": listed} if entry == {"Methods": "METHODS"} else entry
        for entry in config.nav or ()
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of methods, and the API's."""
    pages = {INDEX: _index(), API: _api()}
    pages |= {f"methods/{name}.md": _page(facts) for name, facts in METHODS.items()}
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write the tables that a page asks for."""

    def table(match: re.Match[str]) -> str:
        name, *arguments = match[1].split()
        return TABLES[name](*arguments)

    return re.sub(r"^<!-- table: (.+) -->$", table, markdown, flags=re.MULTILINE)


def _by_place() -> list[tuple[str, list[str]]]:
    """List methods by where they act first, controls and compositions behind."""
    left = {n: f for n, f in METHODS.items() if f.evidence not in ("control", "composition")}
    found = []
    for heading, beginnings in PLACES:
        here = [name for name, facts in left.items() if facts.acts.startswith(beginnings)]
        found.append((heading[0].upper() + heading[1:], here))
        left = {name: facts for name, facts in left.items() if name not in here}
    assert not left, left
    for kind, heading in (("composition", "Made of other methods"), ("control", "Controls")):
        found.append((heading, [n for n, facts in METHODS.items() if facts.evidence == kind]))
    return found


def _index() -> str:
    head, rule, *rows = method_markdown().splitlines()
    row_of = {row.split("`")[1]: row for row in rows}
    lines = [
        "---\nhide: [toc]\n---\n\n# Methods\n",
        f"{len(METHODS)} methods and controls, by where they act first in a model. Layer numbers "
        "are of an LLM of 32 layers and are scaled to others. `vispress methods` lists the same, "
        "and `vispress methods --model MODEL` what works on a model.\n",
        "| evidence | means |\n|---|---|",
        *(f"| {word} | {meaning} |" for word, meaning in EVIDENCE.items()),
    ]
    for heading, names in _by_place():
        lines += [f"\n## {heading}\n", head, rule]
        for name in names:
            lines.append(row_of[name].replace(f"`{name}`", f"[`{name}`]({name}.md)", 1))
    return "\n".join(lines) + "\n"


def _page(facts: MethodFacts) -> str:
    title, _, about = facts.about.partition("\n")
    parts = [
        f"# `{facts.name}`\n",
        _text(title) + "\n",
        _facts(facts),
        _text(about),
        _use(facts),
        "## Settings\n",
        _settings(facts.settings),
        "## Models\n",
        _works(facts),
        "## Laws\n",
        _laws(facts.name),
        "## Measured\n",
        *_measured(facts.name),
    ]
    return "\n".join(parts) + "\n"


def _facts(facts: MethodFacts) -> str:
    rows = (
        ("does", facts.does),
        ("keeps", facts.keeps),
        ("acts", facts.acts),
        ("reads", facts.reads),
        ("source", facts.source),
        ("evidence", f"{facts.evidence}: {EVIDENCE[facts.evidence]}"),
    )
    return "\n".join(["| | |", "|---|---|", *(f"| {a} | {_cell(b)} |" for a, b in rows)]) + "\n"


def _use(facts: MethodFacts) -> str:
    if not facts.published:
        return ""
    shipped = f'```python\ncompress_model(model, config="{facts.name}")\n```'
    return f"## Published setting\n\n{shipped}\n\nis\n\n```yaml\n{facts.published}\n```\n"


def _settings(settings: Iterable[Setting]) -> str:
    rows = [f"| `{s.name}` | `{_cell(s.default)}` | {_cell(s.meaning)} |" for s in settings]
    if not rows:
        return "None.\n"
    return "\n".join(["| name | default | |", "|---|---|---|", *rows]) + "\n"


def _works(facts: MethodFacts) -> str:
    rows = [f"| {name} | {gap or 'works'} |" for name, gap in facts.works.items()]
    return "\n".join(["| family | |", "|---|---|", *rows]) + "\n"


def _laws(name: str) -> str:
    laws = laws_of(name)
    links = ", ".join(f"[{law}](../laws.md#{anchor})" for law, anchor in laws)
    text = f"Laws that meet it by name, on every family that it fits: {links}.\n"
    return text + (f"\n{costs}\n" if (costs := adds(name)) else "")


def _measured(name: str) -> Sequence[str]:
    tables = (scores_of, own_of, trained_of, speeds_of, published_of)
    found = [part for table in tables if (part := table(name))]
    note = "Small drawn scenes rank nothing on photographs: [how to read it](../results.md).\n"
    if not found:
        return ("Not measured yet in a committed sweep.\n",)
    return (*found, note)


def _api() -> str:
    """The page of public names; mkdocstrings fills it in."""
    lines = ["# API\n", "What is not on this page may change without notice.\n"]
    lines += ["## vispress\n", *(f"::: vispress.{name}\n" for name in vispress.__all__)]
    for module in (
        "vispress.report", "vispress.trainer", "vispress.voco_cache", "vispress.methods.base",
        "vispress.types", "vispress.errors", "vispress.reference", "vispress.adapters.base",
    ):  # fmt: skip
        options = "    options: {show_root_heading: false, show_root_toc_entry: false}\n"
        lines += [f"## {module}\n", f"::: {module}\n{options}"]
    return "\n".join(lines)


def _text(docstring: str) -> str:
    """Turn a docstring into Markdown: labels begin paragraphs, papers are links."""
    text = re.sub(r"^(Source|Differs|Reconstructed): ", r"\n**\1.** ", docstring, flags=re.M)
    text = re.sub(r"^(Follows|Control|Composition|Own)\b", r"\n**\1**", text, flags=re.M)
    text = re.sub(r"(?<![\w<(])https?://[^\s,;)]+[^\s,;).]", r"<\g<0>>", text)
    return papers(text)


def _cell(text: str) -> str:
    return papers(text.replace("|", "\\|"))
