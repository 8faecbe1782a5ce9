"""Count the files that one FastV prefill runs through, and how often it changes file.

    python -m tests.laws.file_changes

A reader who follows a prefill opens as many files and turns as many pages. The second prefill of a
6-layer LLaVA is counted, so that what is made once is made; frames of generated code are not files.
"""

import sys
from collections import Counter
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from tests.tiny import Image, Sample, Text, build, make_inputs

from vispress import compress_model

SOURCES = ("/src/vispress/", "/kernels/vispress_kernels/")


class Walk(NamedTuple):
    """Calls of vispress's own functions, by file, and changes from file to file."""

    calls: Counter[str]
    changes: int


def walk(method: str = "fastv", **options: Any) -> Walk:
    """Follow one prefill through vispress's files."""
    model = build("llava", dtype=torch.float32)
    inputs = make_inputs("llava", [Sample([Text(5), Image(4, 4), Text(7)])], dtype=torch.float32)
    compress_model(model, method, **options)
    files: list[str] = []

    def note(frame: Any, event: str, arg: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and any(source in name for source in SOURCES):
            files.append(name)

    with torch.no_grad():
        model(**inputs)
        sys.setprofile(note)
        try:
            model(**inputs)
        finally:
            sys.setprofile(None)
    changes = sum(a != b for a, b in pairwise(files))
    return Walk(Counter(files), changes)


def main() -> None:
    """Print both counts, and the calls in each file."""
    found = walk(keep_ratio=0.5)
    out = [f"{len(found.calls)} files, {found.changes} changes, {found.calls.total()} calls"]
    out += [f"{count:5} {name}" for name, count in found.calls.most_common()]
    sys.stdout.write("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
