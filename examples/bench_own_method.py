"""Measure a method of your own beside others: one class, one plan, one page. A minute on a CPU.

The plan has the controls that a claim wants: random and a grid at the same number of tokens. The
results folder goes on where it stopped, and `vispress report own_method/` makes its page.

python examples/bench_own_method.py
vispress bench my_plan.yaml --import examples/bench_own_method.py   # by name, in a plan of yours
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vispress import register_method
from vispress.methods.base import Evidence, ScorePruner, upcast
from vispress.types import Placement, Stage


@register_method("far_from_mean")
@dataclass(frozen=True, kw_only=True)
class FarFromMean(ScorePruner):
    """Keep the tokens that are least like the mean of their image."""

    summary: ClassVar[str] = "least like the mean"
    paper: ClassVar[str] = "an example"
    evidence: ClassVar[Evidence] = "own"

    def placements(self, num_layers):
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    def score(self, tokens):
        x = upcast(tokens.features)
        return torch.linalg.vector_norm(x - x.mean(dim=1, keepdim=True), dim=-1)


if __name__ == "__main__":
    from common import options
    from rich import print

    from vispress.bench.plan.plan import plan_from_mapping
    from vispress.bench.results.summary import summarise, write_summary
    from vispress.bench.results.table import tables
    from vispress.bench.run.engine import run

    asked = options(__doc__, questions=32, out="own_method")
    plan = {
        "model": asked.model or "reference",
        "tasks": ["attribute", "needle"],
        "questions": asked.questions,
        "methods": ["far_from_mean", "divprune", "random", {"method": "uniform", "dims": 2}],
        "keep_ratios": [0.5, 0.25],
        "controls": "none",
        "timing": {"batch": 0},  # accuracy alone; leave it out to measure time, too
    }
    run(plan_from_mapping(plan), asked.out)
    summary = summarise(asked.out)
    write_summary(summary, asked.out)
    print(tables(summary))
