"""The shapes of `run.json` and of a cell: every name, type and range."""

import math
from datetime import datetime
from typing import Any, Final, get_args

from vispress.bench.model.loaded_model import DTYPES
from vispress.bench.plan.cells import BudgetMeaning
from vispress.bench.plan.controls import Controls
from vispress.bench.plan.saved import COMPRESSOR
from vispress.bench.results.schema import (
    Shape,
    anything,
    choice,
    either,
    flag,
    items,
    nullable,
    number,
    record,
    strings,
    table,
    text,
    whole,
)
from vispress.flops import CONVENTIONS
from vispress.types import Positions

_TIME: Final = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\+00:00)?"

_SHARE = number(low=0, high=1)
_SIZE = number(low=0)
_BITS = text("[01]+", "marks 0 and 1")
_SETTINGS = table(anything)


def _moment(value: Any, place: str) -> str | None:
    fault = text(_TIME, "a time in UTC, as 2026-01-02T03:04:05+00:00")(value, place)
    if fault is None:
        try:
            datetime.fromisoformat(value)
        except ValueError as error:
            fault = f"{place} is no time: {error}"
    return fault


def _spread(low: float) -> Shape:
    """Quantiles of a measurement, in order."""
    shape = record(dict.fromkeys(("p20", "median", "p80"), number(low=low)))

    def check(value: Any, place: str) -> str | None:
        fault = shape(value, place)
        if fault is None and not value["p20"] <= value["median"] <= value["p80"]:
            fault = f"{place} is not in order: {value}"
        return fault

    return check


IDENTITY = record(
    {"plan": text(), "commit": nullable(text()), "version": text(), "weights": text()}
)
_ASKED = record(
    {
        "key": text(r"[^/\\\0]+", "a file name"),
        "group": text(),
        "methods": items(_SETTINGS),
        "control": flag(),
        "keep_ratio": nullable(number(above=0, high=1)),
        "seed": nullable(whole()),
    },
    {
        COMPRESSOR: record(
            {
                "sha256": text("[0-9a-f]{64}", "a SHA-256"),
                "positions": nullable(choice(*get_args(Positions))),
            }
        )
    },
)
_TIMING = {"batch": 0, "rounds": 2, "repeats": 1, "decode_tokens": 0}
_PLAN = record(
    {
        "tasks": items(text(), least=1),
        "methods": items(either(text(), _SETTINGS)),
        "keep_ratios": items(number(above=0, high=1)),
        "budget": choice(*get_args(BudgetMeaning)),
        "model": text(),
        "questions": whole(low=1),
        "batch_size": whole(low=1),
        "seed": whole(),
        "positions": nullable(choice(*get_args(Positions))),
        "max_new_tokens": whole(low=1),
        "timing": record({name: whole(low=low) for name, low in _TIMING.items()}),
        "overrides": table(_SETTINGS),
        "controls": choice(*get_args(Controls)),
        "dtype": choice(*DTYPES),
        "cells": items(_ASKED, least=1),
    },
    {"sources": table(_SETTINGS), "imports": table(text()), "published": text()},
)
MANIFEST = record(
    {
        "identity": IDENTITY,
        "plan": _PLAN,
        "tasks": table(record({"chance": _SHARE, "needs": text()}, {"folder": text()})),
        "created": _moment,
    },
    {"joined": items(IDENTITY, least=2)},
)

_TASK = record(
    {
        "questions": whole(low=1),
        "mean": _SHARE,
        "low": _SHARE,
        "high": _SHARE,
        "right": _BITS,
        "answers": strings(),
    },
    {"scores": items(_SHARE), "turns": items(_BITS, least=2)},
)
_KEPT = record(
    {
        "images": whole(),
        "visual_tokens": _SIZE,
        "kept_at_end": _SIZE,
        "kept_mean_over_layers": _SIZE,
        "ratio_at_end": _SIZE,
        "ratio_mean_over_layers": _SIZE,
    }
)
_FLOPS = record({"compressed": _SIZE, "uncompressed": number(above=0), "ratio": _SIZE})
_TIMES: Final = ("encoder", "prefill", "ttft", "decode")
DECODE: Final = ("decode_ms", "uncompressed_decode_ms", "decode_ratio")
"""Null where no token was decoded."""
OVERHEAD: Final = ("overhead_ms", "overhead_share")
"""Null where there is no compressor."""


def _cost() -> Shape:
    times = [f"{way}{name}_ms" for name in _TIMES for way in ("", "uncompressed_")]
    shapes = {name: _spread(0) for name in (*times, *(f"{name}_ratio" for name in _TIMES))}
    # noise can make a difference of two times negative
    shapes |= {name: _spread(-math.inf) for name in OVERHEAD}
    shapes |= {name: nullable(shapes[name]) for name in (*DECODE, *OVERHEAD)}
    shapes |= {"batch": whole(low=1), "prompt_tokens": whole(low=1)}
    for name in ("kv_bytes", "peak_bytes"):
        shapes |= {name: _SIZE, f"uncompressed_{name}": number(above=0)}
    return record({**shapes, "flops": record(dict.fromkeys(CONVENTIONS, _FLOPS))})


_HEAD = {"key": text(), "identity": IDENTITY, "cell": _ASKED}
_FOOT = {
    "seed": whole(),
    "provenance": record(
        {
            "commit": nullable(text()),
            "versions": table(text()),
            "device": text(),
            "dtype": text(),
            "attention": nullable(text()),
        }
    ),
    "finished": _moment,
}
REFUSED = record({**_HEAD, "refused": text(), **_FOOT})
ANSWERED = record(
    {**_HEAD, "tasks": table(_TASK), "kept": _KEPT, "notes": items(text()), **_FOOT},
    {"cost": _cost()},
)
