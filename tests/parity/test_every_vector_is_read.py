"""No official number lies unread, and methods that promise them keep them: evidence is checked."""

import importlib
import inspect
import itertools
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
from tests.parity.vectors import FOLDER, READ, load

from vispress.config import load_config
from vispress.kinds import EVIDENCE, Evidence
from vispress.methods.base import BUDGETS, Compressor
from vispress.registry import get_method, list_methods

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs" / "methods"
FILES = sorted(path.name.split(".")[0] for path in (HERE / "data").glob("*.npz.xz"))

ANOTHER_ORDER = "the kept tokens in another order or form, one of which is compared"
ANOTHER_VARIANT = "of one variant; the case runs another"
POSITIONS = "positions and text are the runtime's, which the laws test"
FOR_READERS = "for the reader of the vectors"

UNREAD = {
    "attention_bias": {
        "out/keep_sorted": POSITIONS,
        "param/text_len": POSITIONS,
        "param/tag": "picks the cases",
        "param/image_w": "of the baseline, whose mask is taken as it is",
        "param/image_h": "of the baseline, whose mask is taken as it is",
        "out/unpad_mask": "the baseline's rule, which is not the method's",
        "param/img": "sizes are relative to the picture's side",
        "out/exp_max_abs_residual_f64": FOR_READERS,
    },
    "cdpruner": {"out/select_sorted": ANOTHER_ORDER},
    "divprune": {"out/n_unique": "the official code repeats picks only where all are equal"},
    "evs": {"out/mrope": POSITIONS},
    "fastervlm": {"out/keep_mask": ANOTHER_ORDER, "out/topk_desc": ANOTHER_ORDER},
    "fastv": {"out/topk_desc": ANOTHER_ORDER, "out/topk_desc_rel": ANOTHER_ORDER},
    "fourier": {"out/coefficients": "their inverse, which the tokens are, is compared"},
    "framefusion": {"in/attn_rows": "where merging ends all, nothing is pruned"},
    "globalcom2": {
        **dict.fromkeys(
            ("in/features", "out/tokens_f16", "out/thumb_tokens", "out/written_mask"),
            "which tokens are kept is compared; the official code writes them at shifted places",
        ),
        **dict.fromkeys(
            ("out/crop_wh", "param/image_w", "param/image_h"), "the layout is that of unpad_mask"
        ),
    },
    "hiprune": {
        **dict.fromkeys(
            ("out/keep_mask", "out/register_desc", "out/register_count"), ANOTHER_ORDER
        ),
        **dict.fromkeys(("in/input_ids", "param/image_token_id", "out/sequence_mask"), POSITIONS),
    },
    "hired": {
        **dict.fromkeys(
            ("in/features", "out/tokens_out"),
            "which tokens are kept is compared; the official code lays crops out transposed",
        ),
        **dict.fromkeys(
            ("param/image_h", "param/image_w", "param/newline"), "of the layout, which is ours"
        ),
    },
    "holitom": dict.fromkeys(
        ("out/keep_sorted", "out/position_ids_after", "param/text_len"), POSITIONS
    ),
    "llava_scissor": {
        **dict.fromkeys(("in/order_frame", "in/order_all"), "no links are sampled here"),
        "out/closest": "the tokens that it leads to are compared",
    },
    "pmod": {
        "out/undecorated_curve_f64": "of shares that do not decay there is none",
        **dict.fromkeys(
            ("in/mlp_matrix", "in/residual_matrix"),
            "where weights tie, the official code routes text too, and gates alone are compared",
        ),
    },
    "prumerge": {
        "out/complement": ANOTHER_ORDER,
        "out/n_top": "the length of kept_order, where images decide",
        "param/fixed_ratio": "n_top says what it leads to",
        **dict.fromkeys(("out/n_outliers", "out/reduction_ratio_f64", "out/step"), ANOTHER_VARIANT),
        **dict.fromkeys(
            ("out/tokens", "param/k_neighbours"),
            "the training branch, which mixes up its rows, is not offered",
        ),
    },
    "prunevid": {
        "out/topk_desc_by_group": ANOTHER_ORDER,
        "out/keep_sorted": POSITIONS,
        "out/position_ids_after": POSITIONS,
        "out/kv_layer0_positions": "layers in front of the stage keep their cache here",
    },
    "scope": {"in/cls_feature": "the choice does not look at it"},
    "sparsevlm": {
        "out/position_ids_after": POSITIONS,
        "out/tokens_out": POSITIONS,
        "out/rank": "what it leads to is compared",
        "out/rater_scores": "which words they choose is compared",
        **dict.fromkeys(
            (
                *("in/density_noise", "out/cluster_num", "out/merged_tokens"),
                *("out/recycled_visual_rel", "param/head_dim", "param/layer", "param/retain"),
                *("param/rope_base", "param/rank_bias", "param/rank_scale"),
            ),
            ANOTHER_VARIANT,
        ),
    },
    "tome": {"out/unmerged_wavg": "the official code ignores the order of a distillation token"},
    "v2drop": {"out/final_positions": POSITIONS},
    "visionzip": {
        "out/all_indices": ANOTHER_ORDER,
        "param/contextual": ANOTHER_VARIANT,
        **dict.fromkeys(
            ("in/w_q", "out/cls_attn", "param/head_dim"),
            "[CLS] attention is the adapters', which have tests of their own",
        ),
    },
    "vtc_cls": {"out/topk_desc": ANOTHER_ORDER},
    "zoo_prune": {
        "out/selected_sorted": ANOTHER_ORDER,
        "out/selected_order": ANOTHER_ORDER,
        "out/importance_fp16_official": FOR_READERS,
        "out/selected_order_fp16_official": FOR_READERS,
    },
}
"""By file, keys that no test reads in some case, and why. Nor are all outputs of cases with ties
comparable, and flags say which those are.
"""

CASES_UNREAD = {
    ("dc2", "tree_"): "the division of pixels, which no method here does",
    ("hired", "attention"): "[CLS] attention is the adapters', which have tests of their own",
    ("mmtok", "keywords"): "words of a question, of which a method sees the tokens",
    ("mmtok", "padding_patches"): "how much of a patch is padding, which the adapters say",
    ("openvino_cdpruner", "fallback_kernel"): "reached where OpenVINO compiles no graph",
    ("llava_scissor", "long_chains"): "the official code loses tokens of chains",
    ("llava_scissor", "sampled"): "the official code samples links",
    ("visiontrim", "ltam"): "a score that the released code computes and does not use",
    ("scope", "add"): "attention added in place of multiplied, which was not published",
}
"""By file and the beginning of their names, cases that no test reads, and why."""


def calls(function):
    """Arguments of each call that pytest makes of a parametrised test."""
    sets = []
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "parametrize":
            names, values = mark.args[0], mark.args[1]
            names = names.split(",") if isinstance(names, str) else names
            sets.append(
                [
                    dict(zip(names, getattr(value, "values", (value,)), strict=True))
                    for value in values
                ]
            )
    for chosen in itertools.product(*sets):
        yield {name: value for part in chosen for name, value in part.items()}


@cache
def run_again():
    """Run the other tests of this folder once more.

    Returns:
        What they look at, and by method the settings of those that they make.
    """
    READ.clear()
    made, plain = {}, Compressor.__post_init__

    def noted(self):
        plain(self)
        made.setdefault(self.name, []).append(self.hyperparameters())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Compressor, "__post_init__", noted)
        for path in HERE.glob("test_parity_*.py"):
            module = importlib.import_module(f"tests.parity.{path.stem}")
            for name, function in inspect.getmembers(module, inspect.isfunction):
                if name.startswith("test_") and function.__module__ == module.__name__:
                    for arguments in calls(function):
                        function(**arguments)
    return frozenset(READ), made


def test_every_key_is_read_or_says_why_not():
    read, _ = run_again()
    unexplained, listed_but_read = [], []
    for method in FILES:
        listed, unread = UNREAD.get(method, {}), set()
        for name, case in load(method).items():
            if any(method == own and name.startswith(begin) for own, begin in CASES_UNREAD):
                continue
            left = {key for key in case if (method, name, key) not in read}
            unread |= left
            ties = bool(dict.get(case, "flag/ties"))
            unexplained += [
                (method, name, key)
                for key in sorted(left)
                if not key.startswith("flag/")
                and key not in listed
                and not (ties and key.startswith("out/"))
            ]
            outputs = {key for key in case if key.startswith("out/")}
            if outputs <= left:
                unexplained.append((method, name, "compared with nothing"))
        listed_but_read += [(method, key) for key in sorted(set(listed) - unread)]
    assert not unexplained
    # another folder has other cases
    assert not listed_but_read or FOLDER != HERE / "data"


WHERE = {"layer", "layers", "start_layer", "transition_layers"}
"""Fields that the vectors have for models of other depths."""
OTHER_VALUES = {
    "debias": {
        "slope": "fitted to a model, the vectors' to theirs",
        "shrink": "fitted to a model, the vectors' to theirs",
    },
    "fourier": {
        "rescale": "ours, for models that were not fine-tuned; off in the vectors",
        "values": "the same transform behind the projector, which the vectors have none of",
    },
    "gamma_mod": {"threshold": "the code's in inference; by default its choice in training"},
    "holov": {"num_crops": "the vectors' numbers of runs; the published one follows from counts"},
    "sparsevlm": {
        "rank_scale": "v1.0's counts; what the default keeps and recycles is compared by its parts",
        "rank_bias": "v1.0's counts",
    },
    "sparsevlm_plus": {"preset": "the vectors have that of 64 tokens"},
    "transprune": {"ratios": "the vectors' stages"},
}
"""By method, fields in which the vectors' settings are not those of its configuration, and why."""
BUILT_IN = [n for n in list_methods() if get_method(n).__module__.startswith("vispress.")]


def differences(method, settings):
    """Fields in which settings are not the published ones; budgets and depths are no settings."""
    published = load_config(CONFIGS / f"{method}.yaml").hyperparameters()
    return {
        name
        for name, value in published.items()
        if name not in {*BUDGETS, *WHERE} and settings[name] != value
    }


def shown(method, made):
    """Whether official numbers were compared at the published setting, or nearly: what differs."""
    fewest = min((differences(method, one) for one in made.get(method, ())), key=len, default=None)
    return fewest if fewest is not None and fewest <= set(OTHER_VALUES.get(method, ())) else None


def test_code_is_what_official_numbers_show():
    _, made = run_again()
    promised = {name for name in BUILT_IN if get_method(name).evidence == "code"}
    found = {name: shown(name, made) for name in BUILT_IN}
    kept = {name for name, gap in found.items() if gap is not None}
    assert kept <= promised
    if FOLDER == HERE / "data":  # another folder may have other settings
        assert kept == promised
        assert {name: gap for name, gap in found.items() if gap} == {
            name: set(fields) for name, fields in OTHER_VALUES.items()
        }


def test_every_word_of_evidence_is_defined_and_used():
    assert set(EVIDENCE) == set(get_args(Evidence))
    assert {get_method(name).evidence for name in BUILT_IN} == set(EVIDENCE)


def test_methods_by_another_code_or_unseen_code_are_named():
    """A method with official numbers here does not say that there are none."""
    by = {"dart": "dart_port"}
    for name in BUILT_IN:
        evidence = get_method(name).evidence
        assert (evidence == "reimplementation") == (name in by)
        assert not (evidence in ("read", "paper") and name in FILES)
