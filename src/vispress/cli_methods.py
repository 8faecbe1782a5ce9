"""`vispress methods`: what there is, what one method is, and what works on a model."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from vispress.bench.model.names import REFERENCES, check_model_name
from vispress.checks import suggest
from vispress.cli_options import Imports, Json, quiet, terminal
from vispress.errors import ConfigError
from vispress.kinds import EVIDENCE
from vispress.user_code import import_files

if TYPE_CHECKING:
    from vispress.doctor import Family
    from vispress.method_facts import MethodFacts

Name = Annotated[str | None, typer.Argument(help="Of one method, to read all about it.")]
Which = Annotated[
    str | None,
    typer.Option(
        help="What works on it, and why not: a family (qwen2_5_vl), 'reference', a checkpoint's "
        "folder, or a hub id. Of a checkpoint only the configuration is read."
    ),
]


def methods(
    name: Name = None, model: Which = None, imports: Imports = None, as_json: Json = False
) -> None:
    """List methods, read about one, or ask what a model takes."""
    quiet()
    import_files(imports or ())
    from vispress.doctor import families
    from vispress.method_facts import facts_of
    from vispress.supported import list_methods

    known = families()
    if name is not None and model is None:
        facts = facts_of(name, known)
        _write(asdict(facts)) if as_json else _tell(facts, terminal())
        return
    names = list_methods() if name is None else [name]
    every = [facts_of(one, known) for one in names]
    refused = {} if model is None else _refused(model, every, known)
    if as_json:
        _write([asdict(facts) | {"refused": refused.get(facts.name)} for facts in every])
        return
    console = terminal()
    _list([facts for facts in every if facts.name not in refused], console)
    if model is not None:
        _reasons(model, {one: refused[one] for one in names if one in refused}, console)
    elif name is None:
        console.print(f"{len(every)} methods; about one: vispress methods NAME", style="dim")


def _write(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def _refused(model: str, every: "list[MethodFacts]", known: "list[Family]") -> dict[str, str]:
    """Why methods do not work on a family or checkpoint."""
    if any(family.name == model for family in known):
        gaps = {facts.name: facts.works[model] for facts in every}
        return {name: gap for name, gap in gaps.items() if gap is not None}
    try:
        check_model_name(model)
    except ConfigError as error:
        names = [*(family.name for family in known), *REFERENCES]
        raise ConfigError(f"{error}, or a family; {suggest(model, names)}") from None
    from vispress.bench.model.checkpoints import open_skeleton
    from vispress.supported import unsupported_methods

    return unsupported_methods(open_skeleton(model))


def _list(every: "list[MethodFacts]", console: Console) -> None:
    """Print a line or two a method, under where it acts first."""
    from vispress.listing import PLACES

    left = list(every)
    for heading, beginnings in PLACES:
        here = [facts for facts in left if facts.acts.startswith(beginnings)]
        left = [facts for facts in left if facts not in here]
        if here:
            console.print(heading, style="bold")
            console.print(_lines([(f.name, f"{f.does}; keeps {f.keeps}") for f in here]))
    assert not left, left


def _lines(rows: list[tuple[str, str]], *, indent: int = 2) -> Padding:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for left, right in rows:
        table.add_row(left, escape(right))
    return Padding(table, (0, 0, 1, indent))


def _reasons(model: str, refused: dict[str, str], console: Console) -> None:
    if refused:
        console.print(escape(f"not on {model}"), style="bold")
        console.print(_lines(list(refused.items())))


def _tell(facts: "MethodFacts", console: Console) -> None:
    """Print all about one method."""
    works = [name for name, gap in facts.works.items() if gap is None]
    gaps = [f"{name}: {gap}" for name, gap in facts.works.items() if gap is not None]
    rows = [
        (facts.does, ""),
        ("keeps", facts.keeps),
        ("acts", facts.acts),
        ("reads", facts.reads),
        ("source", facts.source),
        ("evidence", f"{facts.evidence}: {EVIDENCE[facts.evidence]}"),
        ("models", ", ".join(works)),
        *(("not on", gap) for gap in gaps),
    ]
    console.print(escape(facts.name), style="bold")
    console.print(_lines([(left, right) for left, right in rows if right], indent=2))
    console.print(escape(facts.about) + "\n", soft_wrap=False)
    console.print("settings", style="bold")
    console.print(_lines([(f"{s.name} = {s.default}", s.meaning) for s in facts.settings]))
    if facts.published:
        console.print(escape(f'shipped as config="{facts.name}"'), style="bold")
        console.print(Padding(escape(facts.published), (0, 0, 1, 2)))
