"""Tables of the docs site, from committed results: `docs/generate.py` puts them into pages."""

import csv
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Final

from benchmarks.method_table import RESULTS, TABLE
from benchmarks.speed_table import MODELS, speed_markdown

from vispress.bench.plan.published import load_published
from vispress.kinds import PROMPT_SIGNALS, Signal
from vispress.listing import where
from vispress.registry import get_method, list_methods
from vispress.yaml_files import shipped_files

ROOT: Final = Path(__file__).parents[1]
SWEEPS: Final = {
    "offline": "LLaVA, 14 tasks of 1000 questions, 144 visual tokens",
    "offline_qwen": "Qwen2.5-VL, 9 tasks of 1000 questions, 64 visual tokens",
    "offline_clips": "Qwen2.5-VL on clips of 12 frames, 2 tasks of 1000 questions",
}
"""Committed sweeps on the reference models."""
SUPERSEDED: Final = {"offline_clips": ("dycoke", "framefusion", "holitom", "prunevid")}
"""By sweep, methods whose rule has been corrected since; the sweep's README says how."""
QUERIES: Final = {Signal.QUERY_ATTENTION, Signal.MEAN_ATTENTION}
"""What is read of the LLM's attention, which the text's rows are in."""
LEADERS: Final = 6
"""Rows of a table of leaders."""


@cache
def _scores() -> tuple[dict[str, str], ...]:
    with TABLE.open(encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _accuracy(row: dict[str, str]) -> str:
    return f"{row['accuracy']} ({row['low']} to {row['high']})"


def _p(text: str) -> str:
    return text if float(text) >= 0.001 else "< 0.001"


# --- what pages ask for


def sweep(name: str) -> str:
    """Every method and control of a sweep, by keep ratio; best at 0.222 first."""
    rows = [row for row in _scores() if row["sweep"] == name]
    ratios = sorted({row["keep_ratio"] for row in rows} - {""}, reverse=True)
    found = {(row["method"], row["keep_ratio"]): row["accuracy"] for row in rows}
    names = sorted(
        {row["method"] for row in rows if row["keep_ratio"]},
        key=lambda method: -float(found.get((method, "0.222"), 0)),
    )
    return _table(
        ("method", *ratios),
        ((_link(method), *(found.get((method, r), "") for r in ratios)) for method in names),
    )


def leaders(name: str, *ratios: str) -> str:
    """The methods of a sweep that are furthest ahead of random, and the controls, by keep ratio."""
    rows = []
    for ratio in ratios:
        here = [r for r in _scores() if (r["sweep"], r["keep_ratio"]) == (name, ratio)]
        methods = [r for r in here if r["p_holm"] and float(r["less_random"]) > 0]
        methods = sorted(methods, key=lambda row: -float(row["accuracy"]))[:LEADERS]
        best = "; ".join(f"{_link(row['method'])} {row['accuracy']}" for row in methods)
        control = {row["method"]: row["accuracy"] for row in here}
        rows.append((ratio, best, control.get("random", ""), control.get("uniform", "")))
    return _table(("keep ratio", "ahead, accuracy", "random", "grid"), rows)


def published(name: str) -> str:
    """What papers print of a model: a table a paper, by method and tokens."""
    model = load_published(name)
    parts = []
    for one in model.tables:
        tokens = sorted({n for row in one.relative.values() for n in row}, reverse=True)
        rows = (
            (_link(method), *(str(row[n]) if n in row else "" for n in tokens))
            for method, row in one.relative.items()
        )
        head = (f"{model.model}, of {model.whole}", *map(str, tokens))
        parts.append(f"{papers(one.source)}:\n\n{_table(head, rows)}")
    return "\n".join(parts)


def speed() -> str:
    """What compression saves on a GPU."""
    return speed_markdown() + "\n"


def blind() -> str:
    """Methods that act ahead of the LLM alone and read nothing of the text."""
    reads_text = PROMPT_SIGNALS | {Signal.INPUT_EMBEDDINGS} | QUERIES
    rows = []
    for name in list_methods():
        cls = get_method(name)
        ahead = where(cls) in ("before the LLM", "in the encoder")
        if ahead and not cls.reads & reads_text and cls.evidence not in ("control", "composition"):
            rows.append((_link(name), cls.summary))
    return _table(("method", "keeps"), rows)


def shipped_plans() -> str:
    """Plans that `vispress bench` knows by name, and what their first lines say."""
    rows = []
    for path in sorted((ROOT / "configs" / "bench").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        comment = " ".join(re.findall(r"^# ?(.*)$", text.split("\nmodel")[0], re.MULTILINE))
        rows.append((f"`{path.stem}`", re.split(r"(?<=\.) ", comment)[0]))
    return _table(("plan", "is"), rows)


def shipped_tasks() -> str:
    """Tasks over datasets that plans know by name."""
    files = sorted((ROOT / "configs" / "tasks").glob("*.yaml"))
    return _table(
        ("task", "is"),
        ((f"`{f.stem}`", f.read_text("utf-8").splitlines()[0].lstrip("# ")) for f in files),
    )


TABLES: Final[dict[str, Callable[..., str]]] = {
    "blind": blind,
    "sweep": sweep,
    "leaders": leaders,
    "published": published,
    "speed": speed,
    "shipped-plans": shipped_plans,
    "shipped-tasks": shipped_tasks,
}


def _link(method: str) -> str:
    known = method in list_methods()
    return f"[`{method}`](methods/{method}.md)" if known else f"`{method}`"


# --- what a method's page says of it


def scores_of(name: str) -> str:
    """What it scored in the sweeps, beside random."""
    parts = []
    for folder, title in SWEEPS.items():
        here = [row for row in _scores() if row["sweep"] == folder]
        random = {row["keep_ratio"]: row["accuracy"] for row in here if row["method"] == "random"}
        rows = [
            (
                row["keep_ratio"] or "its own",
                _accuracy(row),
                random.get(row["keep_ratio"], ""),
                *_against_random(row),
            )
            for row in sorted(here, key=lambda row: -float(row["keep_ratio"] or 0))
            if row["method"] == name
        ]
        if rows:
            source = f"[{folder}](../../benchmarks/results/{folder}/README.md)"
            uncompressed = next(row["accuracy"] for row in here if row["method"] == "none")
            head = ("keep ratio", "accuracy (95 %)", "random", "less random (95 %)", "p (Holm)")
            text = f"{title} ({source}); uncompressed {uncompressed} %:"
            if name in SUPERSEDED.get(folder, ()):
                text = f"Before its rule was corrected, which the folder explains. {text}"
            parts.append(f"{text}\n\n{_table(head, rows)}")
    return "\n".join(parts)


def _against_random(row: dict[str, str]) -> tuple[str, str]:
    if not row["p_holm"]:
        return "", ""
    low, high = row["less_random_low"], row["less_random_high"]
    return f"{row['less_random']} ({low} to {high})", _p(row["p_holm"])


def published_of(name: str) -> str:
    """What papers print of it."""
    rows = []
    for file in sorted(shipped_files("published")):
        model = load_published(file)
        for one in model.tables:
            if figures := one.relative.get(name):
                told = ", ".join(f"{value} at {tokens}" for tokens, value in figures.items())
                whole = model.whole.removesuffix(" tokens")
                rows.append((model.model, whole, told, papers(one.source)))
    if not rows:
        return ""
    what = "Papers print, in per cent of the whole model's score, at a number of kept tokens:"
    return f"{what}\n\n{_table(('model', 'tokens', 'relative accuracy', 'paper'), rows)}"


def papers(text: str) -> str:
    """Make arXiv ids links."""
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[\g<0>](https://arxiv.org/abs/\1)", text)


def trained_of(name: str) -> str:
    """Its rows in the table of trained compressors."""
    text = (RESULTS / "trained" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(rf"^\| {name}(?:[ ,][^|]*)? \| [\d.]+ \| [\d.]+ \| .*; .*$", text, re.M)
    if not rows:
        return ""
    head = "| method | keep ratio | accuracy | others: accuracy, it less theirs (95 %), p by Holm |"
    link = "[how](../../benchmarks/results/trained/README.md)"
    table = "\n".join([head, "|---|---|---|---|", *rows])
    return f"Trained on a reference model ({link}):\n\n{table}\n"


def own_of(name: str) -> str:
    """Tables of our own method, from its README."""
    if name != "relevance_dpp":
        return ""
    text = (RESULTS / "relevance" / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^## (.+)\n\n(\| keep ratio \| ours .*\n(?:\|.*\n)+)", text, re.MULTILINE)
    link = "[how](../../benchmarks/results/relevance/README.md)"
    return "\n".join(f"{title} ({link}):\n\n{table}" for title, table in found)


def speeds_of(name: str) -> str:
    """Its rows of the committed run on a GPU."""
    path = RESULTS / "gpu-nvidia-h200" / "models.json"
    rows = [
        (
            MODELS[row["model"]],
            str(row["batch"]),
            f"{row['visual_tokens']:,} to {row['kept_at_last_layer']:,}",
            " to ".join(
                f"{row['prefill_ms'][way]['median']:.0f}" for way in ("uncompressed", "compressed")
            ),
            f"{row['prefill_speedup']:.2f}",
            f"{row['ttft_speedup']:.2f}",
        )
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]
        if row.get("method") == name and "prefill_speedup" in row
    ]
    if not rows:
        return ""
    head = ("model", "batch", "visual tokens", "prefill, ms", "times", "first token, times")
    link = "[one H200](../../benchmarks/results/gpu-nvidia-h200/README.md)"
    return f"On {link}, bf16:\n\n{_table(head, rows)}"


def adds(name: str) -> str:
    """How many operations it adds to a prefill."""
    calls: dict[str, dict[str, int]] = json.loads(
        (ROOT / "tests" / "laws" / "calls.json").read_text(encoding="utf-8")
    )
    found = [f"{number[name]} ({family})" for family, number in calls.items() if name in number]
    if not found:
        return ""
    link = "[counts](../../tests/laws/calls.json)"
    what = "Operations that it adds to a prefill of a tiny model, outside kernels"
    return f"{what}: {', '.join(found)} ({link})."
