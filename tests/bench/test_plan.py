"""Plans: what they expand to, and what they refuse."""

from dataclasses import replace
from pathlib import Path

import pytest

from vispress.bench.plan.plan import load_plan, plan_from_mapping
from vispress.config import load_config
from vispress.errors import BudgetError, ConfigError, UnsupportedMethodError
from vispress.method_options import make_budgeted
from vispress.methods.gist_evictor import GistEvictor
from vispress.reference.world.words import CLIP_KINDS, EPISODE_KINDS, KINDS
from vispress.registry import get_method, list_methods

CONFIGS = Path(__file__).parents[2] / "configs" / "methods"
BASE = {
    "tasks": ["attribute"],
    "methods": ["divprune"],
    "keep_ratios": [0.5, 0.25],
    "controls": "none",
}

OTHERS = ("control", "composition")
"""What is no method of `all`."""


def keys(**changes):
    return [cell.key for cell in plan_from_mapping(BASE | changes).cells()]


def test_uncompressed_always_comes_first():
    assert keys() == ["none", "divprune--0.5", "divprune--0.25"]


def test_methods_without_a_budget_run_once():
    assert keys(methods=["no_image"]) == ["none", "no_image"]


@pytest.mark.parametrize("method", ["sd_rpn", "gamma_mod"])
def test_a_threshold_stands_in_place_of_the_plans_ratios(method):
    """Such a method takes no ratio, which is asked by trying one."""
    (own,) = [key for key in keys(methods=[{"method": method, "threshold": 0.25}]) if key != "none"]
    assert method in own
    assert not make_budgeted(method, {"threshold": 0.25}, 0.5).given_budget()


def test_own_budgets_replace_the_plans():
    assert keys(methods=[{"method": "divprune", "num_tokens": 9}]) == ["none", "divprune"]
    assert keys(methods=[{"method": "divprune", "keep_ratios": [0.1]}]) == ["none", "divprune--0.1"]
    published = {"method": "pyramiddrop", "keep_ratios": [], "label": "published"}
    assert keys(methods=[published]) == ["none", "published"]


def test_seeds_are_cells_of_one_group():
    methods = [{"method": "random", "seeds": [0, 7]}]
    cells = plan_from_mapping(BASE | {"methods": methods, "keep_ratios": [0.5]}).cells()
    assert [cell.key for cell in cells[1:]] == ["random--0.5--seed0", "random--0.5--seed7"]
    assert [cell.chain[0].seed for cell in cells[1:]] == [0, 7]
    assert {cell.group for cell in cells[1:]} == {"random"}


def test_a_chain_is_one_cell():
    parts = [{"method": "divprune", "keep_ratio": 0.5}, {"method": "fastv", "keep_ratio": 0.5}]
    assert keys(methods=[{"chain": parts}]) == ["none", "divprune+fastv"]


def test_ratios_are_means_over_layers_unless_asked_otherwise():
    def method(**changes):
        return plan_from_mapping(BASE | {"methods": ["fastv"]} | changes).cells()[1].chain[0]

    assert method().mean_keep_ratio == 0.5
    assert method(budget="placement").keep_ratio == 0.5


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"tasks": ["atribute"]}, ConfigError, "did you mean 'attribute'"),
        ({"tasks": []}, ConfigError, "tasks must be"),
        ({"tasks": ["count", "count"]}, ConfigError, "different names"),
        ({"tasks": "count"}, ConfigError, "must be a list"),
        ({"methods": ["fastvv"]}, UnsupportedMethodError, "did you mean 'fastv'"),
        ({"methods": [{"method": "fastv", "leyer": 2}]}, ConfigError, "did you mean 'layer'"),
        ({"methods": ["fastv", "fastv"]}, ConfigError, "label"),
        ({"methods": [{"method": "fastv", "label": "../x"}]}, ConfigError, "label"),
        ({"methods": [{"method": "fastv", "label": "none"}]}, ConfigError, "label"),
        ({"methods": [3]}, ConfigError, "name or a mapping"),
        ({"methods": [{"chain": [], "seeds": [1]}]}, ConfigError, "non-empty"),
        ({"methods": [{"method": "random", "seeds": 3}]}, ConfigError, "seeds must be a list"),
        ({"keep_ratios": [0.0]}, BudgetError, "must be a number in"),
        ({"keep_ratios": ["half"]}, BudgetError, "must be a number in"),
        ({"budget": "cost"}, ConfigError, "budget must be one of"),
        ({"positions": "near"}, ConfigError, "positions must be one of"),
        ({"questions": 0}, ConfigError, "questions must be an integer >= 1"),
        ({"timing": {"round": 3}}, ConfigError, "did you mean 'rounds'"),
        ({"timing": {"rounds": 1}}, ConfigError, "timing.rounds"),
        ({"timing": {"decode_tokens": -1}}, ConfigError, "timing.decode_tokens"),
        ({"keep_ratio": [0.5]}, ConfigError, "did you mean 'keep_ratios'"),
        ({"controls": "some"}, ConfigError, "controls must be one of"),
        ({"dtype": "int4"}, ConfigError, "dtype must be one of"),
        ({"overrides": {"fastv": {}}}, ConfigError, "which the plan does not list"),
        ({"methods": "all", "overrides": {"fastvv": {}}}, ConfigError, "did you mean 'fastv'"),
        ({"methods": "all", "overrides": {"random": {}}}, ConfigError, "no method of `all`"),
        ({"methods": "all", "overrides": {"fastv": 3}}, ConfigError, "fastv must be a mapping"),
        ({"methods": "all", "overrides": {"fastv": {"leyer": 1}}}, ConfigError, "'layer'"),
        ({"methods": "all", "overrides": [1]}, ConfigError, "overrides must be a mapping"),
        ({"methods": [{"method": "oracle", "layer": 1}]}, ConfigError, "oracle has no key 'layer'"),
        ({"methods": [{"method": "downsample", "dims": 2}]}, ConfigError, "no key 'dims'"),
        (
            {"methods": [{"method": "random", "seeds": [0, 1]}], "controls": "standard"},
            ConfigError,
            "at least 3 seeds",
        ),
        (
            {"methods": [{"method": "random", "seed": 4}], "controls": "standard"},
            ConfigError,
            "at least 3 seeds",
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_mistakes_are_named(changes, error, words):
    with pytest.raises(error, match=words):
        plan_from_mapping(BASE | changes)


SHIPPED = sorted(path.stem for path in (CONFIGS.parent / "bench").glob("*.yaml"))
QUICK = {"smoke", "demo"}
STANDARD = {"random", "uniform", "avg_pool", "downsample", "oracle", "no_image", "vtw"}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_plans_hold_the_controls(name):
    plan = load_plan(name)
    groups = {cell.group for cell in plan.cells()}
    assert groups >= {"none", "random", "uniform", "avg_pool", "no_image"}
    if name not in QUICK:
        assert groups >= STANDARD
        seeds = [cell.seed for cell in plan.cells() if cell.group == "random"]
        assert {seeds.count(seed) for seed in (0, 1, 2)} == {len(plan.keep_ratios)}


@pytest.mark.parametrize("name", ["offline", "offline-qwen"])
def test_full_sweeps_hold_every_method_and_task(name):
    plan = load_plan(name)
    assert set(plan.tasks) == {*KINDS, *(EPISODE_KINDS if name == "offline" else ())}
    methods = published()
    assert {cell.group for cell in plan.cells()} >= methods
    assert plan.keep_ratios == (0.5, 0.333, 0.222, 0.111, 0.056)
    assert plan.questions == 1000


def published():
    """Methods that `all` stands for: the others need prompts that no task has."""
    methods = {name: get_method(name) for name in list_methods()}
    found = {name for name, method in methods.items() if method.evidence not in OTHERS} - {"vtw"}
    return {name for name in found if not issubclass(methods[name], GistEvictor)}


def test_the_sweep_over_videos_holds_every_method():
    plan = load_plan("offline-clips")
    assert plan.tasks == CLIP_KINDS
    methods = published()
    assert {cell.group for cell in plan.cells()} >= methods
    assert plan.keep_ratios == (0.5, 0.222, 0.111)
    # no compressor is shipped of the model that was trained on clips
    own = {**load_plan("offline-qwen").overrides}
    assert own.pop("relevance_dpp") == {"compressor": "reference-qwen"}
    assert plan.overrides == own


def test_missing_controls_are_added():
    cells = plan_from_mapping(BASE | {"controls": "standard"}).cells()
    keys = [cell.key for cell in cells]
    assert {cell.group for cell in cells} == STANDARD | {"none", "divprune"}
    assert [key for key in keys if key.startswith("random")] == [
        f"random--{ratio}--seed{seed}" for ratio in (0.5, 0.25) for seed in (0, 1, 2)
    ]
    assert {"no_image", "vtw", "oracle--0.25", "downsample--0.5"} <= set(keys)
    assert next(cell for cell in cells if cell.group == "uniform").chain[0].dims == 2


def test_listed_controls_are_not_doubled():
    own = ["random", {"method": "uniform", "dims": 1}, {"method": "avg_pool", "label": "pool"}]
    cells = plan_from_mapping(BASE | {"methods": own, "controls": "standard"}).cells()
    at_half = [cell for cell in cells if cell.keep_ratio == 0.5]
    assert [cell.seed for cell in at_half if cell.group == "random"] == [0, 1, 2]
    assert [cell.chain[0].dims for cell in at_half if cell.group == "uniform"] == [1]
    # under another label it is a row of its own
    assert {"pool", "avg_pool"} <= {cell.group for cell in at_half}


def test_without_keep_ratios_only_controls_without_a_budget_are_added():
    method = {"method": "divprune", "num_tokens": 9}
    plan = {"methods": [method], "keep_ratios": [], "controls": "standard"}
    assert keys(**plan) == ["none", "divprune", "no_image", "vtw"]


def test_all_is_every_method_that_is_no_control():
    plan = plan_from_mapping(
        BASE
        | {
            "methods": "all",
            "overrides": {"pyramiddrop": {"layers": [1, 2]}, "fastv": {"label": "f"}},
            "keep_ratios": [0.5],
        }
    )
    by_group = {cell.group: cell for cell in plan.cells()[1:]}
    methods = published()
    assert set(by_group) == methods - {"fastv"} | {"f"}
    assert by_group["pyramiddrop"].chain[0].layers == (1, 2)
    assert all(cell.optional for cell in by_group.values())
    more = {"methods": ["all", {"method": "fastv", "label": "late", "layer": 3}]}
    assert keys(**more, keep_ratios=[0.5])[-1] == "late--0.5"


def test_a_budget_that_a_method_of_all_refuses_is_noted(monkeypatch):
    def validate(self):
        if self.mean_keep_ratio == 0.25:
            raise BudgetError("divprune needs more")

    monkeypatch.setattr(get_method("divprune"), "validate", validate)
    with pytest.raises(BudgetError, match="needs more"):
        plan_from_mapping(BASE)
    cells = {cell.key: cell for cell in plan_from_mapping(BASE | {"methods": "all"}).cells()}
    assert cells["divprune--0.25"].refused == "divprune needs more"
    assert cells["divprune--0.5"].refused is None


def test_efficiency_has_the_published_budgets_of_the_methods_it_names():
    """A count of LLaVA-1.5's 576 tokens is the same share of the reference model's 144."""
    plan = load_plan("efficiency")
    by_group = {cell.group: cell.chain for cell in plan.cells()}
    for group in (*plan.overrides, "transprune-low", "vtw", "no_image", "avg_pool"):
        (ours,) = by_group[group]
        published = load_config(CONFIGS / f"{ours.name}.yaml")
        if group == "transprune-low":  # the other preset of a method with one file
            published = replace(published, preset="low")
        kept = [
            [placement.budget.resolve(visual) for placement in method.placements(32)]
            for method, visual in ((published, 576), (ours, 144))
        ]
        assert [round(count / 4) for count in kept[0]] == kept[1], group


def test_unknown_plans_name_the_shipped_ones():
    known = rf"did you mean 'smoke'\? known: {', '.join(SHIPPED)}"
    with pytest.raises(ConfigError, match=known):
        load_plan("smok")


def test_files_that_are_not_yaml_are_named(tmp_path):
    (path := tmp_path / "bad.yaml").write_text("tasks: [")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_plan(path)


def test_the_hash_follows_what_decides_results():
    plain = plan_from_mapping(BASE)
    assert plain.digest() == plan_from_mapping(dict(BASE)).digest()
    for change in ({"seed": 1}, {"keep_ratios": [0.5]}, {"positions": "compact"}):
        assert plan_from_mapping(BASE | change).digest() != plain.digest()
