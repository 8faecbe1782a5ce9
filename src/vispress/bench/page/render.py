"""The page itself: everything gathered, one template, one file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vispress.bench.page.axes import AXES
from vispress.bench.page.frontier import colour_rule, overview
from vispress.bench.page.gallery import Gallery, gallery
from vispress.bench.page.geometry import MARKERS
from vispress.bench.page.heat import heat_maps
from vispress.bench.page.panels import panels
from vispress.bench.page.questions import shown_budget
from vispress.bench.page.results import Results, read
from vispress.bench.page.sources import sources
from vispress.bench.page.tables import cost_table, results_table, task_cards
from vispress.bench.page.verdicts import findings, places, verdict_tables
from vispress.bench.page.words import accuracy, bounds, counted, listed, percent, ratio
from vispress.bench.plan.cells import UNCOMPRESSED
from vispress.bench.results.files import write_text
from vispress.bench.results.published import beside_published
from vispress.bench.results.summary import BLIND
from vispress.bench.run.parts import Advance

PAGE = "report.html"
_TEMPLATES = Path(__file__).parent / "templates"


def write_page(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    pictures: bool = True,
    samples: int = 2,
    device: str | torch.device = "cpu",
    advance: Advance = lambda _what, _questions: None,
) -> Path:
    """Make one HTML file of a results folder; nothing else is needed to read it.

    Args:
        folder: Results of `vispress bench`, finished or not.
        out: The file; `report.html` in the folder by default.
        pictures: Draw sample questions and failures, and run the plan's model on them where it is
            at hand.
        samples: Sample questions of each task, at least 0.
        device: Where the model runs.
        advance: Progress.

    Returns:
        The file. The same folder gives the same bytes.

    Raises:
        ResultsError: The folder holds no results, a damaged cell or those of another version, or
            the page cannot be written.
        CheckpointError: The plan's model is at hand but damaged.
        ConfigError: The device cannot be used.
    """
    results = read(folder)
    shown = gallery(results, number=samples, device=device, advance=advance) if pictures else None
    path = Path(out) if out is not None else Path(folder) / PAGE
    write_text(path, page(results, shown))
    return path


def page(results: Results, shown: Gallery | None) -> str:
    """Render the HTML text.

    Args:
        results: A folder.
        shown: Its questions; None where pictures were not wanted.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"counted": counted, "listed": lambda names: listed(list(names))}
    return environment.get_template("page.html").render(context(results, shown))


def context(results: Results, shown: Gallery | None) -> Mapping[str, Any]:
    """Gather the template's variables."""
    plots = [
        (axis.name, overview(results, axis, wide=True), overview(results, axis, wide=False))
        for axis in AXES
    ]
    refused = [
        (row.group, ratio(row.keep_ratio), row.refused)
        for row in results.summary.rows
        if row.refused is not None
    ]
    plots = [plot for plot in plots if plot[1] is not None]
    budget = shown_budget(results)
    maps, tests = heat_maps(results), verdict_tables(results)
    made = {
        "plan": results.plan,
        "groups": results.groups,
        "controls": results.controls,
        "keep_ratios": [ratio(value) for value in results.keep_ratios],
        "finished": len(results.cells),
        "missing": results.missing,
        "refused": refused,
        "baseline": results.baseline is not None,
        "findings": findings(results),
        "plots": plots,
        "colour_rule": colour_rule(results),
        "panels": panels(results),
        "markers": MARKERS,
        "heat_maps": maps,
        "tests": tests,
        "places": places(results),
        "table": results_table(results),
        "costs": cost_table(results),
        "published": beside_published(results.summary),
        "cards": task_cards(results),
        "gallery": shown,
        "shown_budget": None if budget is None else ratio(budget),
        "sources": sources(results),
        "facts": facts(results),
        "most_panes": max(len(plots), len(maps), len(tests)),
    }
    return made | {"has_costs": made["costs"] is not None, "sections": _sections(made)}


def facts(results: Results) -> list[tuple[str, str, str]]:
    """List the figures on top: name, value, remark."""
    base, blind = results.summary.find(UNCOMPRESSED), results.summary.find(BLIND)
    figures = []
    for name, row in (("uncompressed", base), ("no image", blind)):
        if row is not None:
            value = accuracy(row)
            figures.append((f"{name}, accuracy", f"{percent(value.mean)} %", bounds(value)))
    if base is not None:
        figures.append(("visual tokens", f"{base.visual_tokens:.0f}", "an image"))
    planned = len(results.cells) + len(results.missing)
    refused = sum("refused" in cell for cell in results.cells)
    remark = f"{refused} of them not possible" if refused else ""
    figures.append(("cells finished", f"{len(results.cells)} of {planned}", remark))
    ends = sorted(cell["finished"] for cell in results.cells)
    if ends:
        commit = results.manifest["identity"].get("commit")
        figures.append(("measured", ends[-1][:10], f"commit {commit}" if commit else ""))
    return figures


def _sections(made: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List the sections that are there, for the navigation."""
    known = (
        ("findings", "What stands", made["findings"]),
        ("frontier", "Frontier", made["plots"]),
        ("methods", "Method by method", made["panels"]),
        ("tasks-heat", "By task", made["heat_maps"]),
        ("tests", "Significance", made["tests"]),
        ("results", "Results", made["table"].lines),
        ("published", "Published", made["published"]),
        ("cost", "Cost", made["costs"]),
        ("tasks", "Tasks", made["cards"]),
        ("kept", "Kept tokens", True),
        ("failures", "Failures", made["gallery"] is not None),
        ("refused", "Not run", made["refused"]),
        ("missing", "Missing", made["missing"]),
        ("sources", "Provenance", True),
    )
    return [(id_, title) for id_, title, there in known if there]
