"""The plan that reproduces a method: its paper's own setting, and the budgets that papers print."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vispress.bench.plan.cells import BUDGETS, Entry
from vispress.bench.plan.plan import Plan, load_plan
from vispress.bench.plan.published import Published, load_published
from vispress.bench.tasks.yaml_task import register_entry
from vispress.config import config_path, from_mapping
from vispress.errors import BudgetError, ConfigError
from vispress.registry import get_method
from vispress.yaml_files import read_yaml


def reproduction(
    method: str, base: str = "llava15", *, tasks: Sequence[str] = (), **overrides: Any
) -> Plan:
    """Make the plan of one method on the model, tasks and questions of another plan.

    Args:
        method: A registered method with a shipped configuration, which is its paper's setting.
        base: A plan, by name or file; what papers print of its model is what it calls `published`.
        tasks: In place of the plan's: names, or YAML files.
        **overrides: Other fields of the plan, where not None.

    Raises:
        UnsupportedMethodError: Unknown method.
        ConfigError: It has no shipped configuration, or the plan is malformed.
    """
    get_method(method)
    plan = load_plan(base, **overrides)
    published = None if plan.published is None else load_published(plan.published)
    entries = entries_of(method, read_yaml(config_path(method)), published)
    named = tuple(register_entry(task, Path()) for task in tasks) or plan.tasks
    return replace(
        plan, methods=tuple(entries), keep_ratios=(), controls="none", overrides={}, tasks=named
    )


def entries_of(method: str, settings: Any, published: Published | None) -> list[Entry]:
    """Make the entries of a plan: a method's own setting, then every budget that papers print.

    Budgets are means over layers, as papers compare methods; a method whose schedule takes none has
    its own setting alone.

    Args:
        method: Registered name.
        settings: Its shipped configuration.
        published: What papers print of the model; None for nothing.
    """
    entries: list[Entry] = [{**settings, "label": method, "keep_ratios": []}]
    bare = {key: value for key, value in settings.items() if key not in BUDGETS}
    for tokens in [] if published is None else published.budgets(method):
        assert published is not None
        entry = {**bare, "mean_keep_ratio": round(tokens / published.tokens, 6)}
        try:
            from_mapping(entry)
        except (BudgetError, ConfigError):
            continue
        entries.append({**entry, "label": f"{method}-{tokens}", "keep_ratios": []})
    return entries
