"""`docs/laws.md` names every law and the files that hold it, and no file that is not there."""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "laws.md").read_text()
LAWS = 18


def sections(text: str) -> dict[str, str]:
    """Text of each section by its title."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def named(text: str) -> set[str]:
    """Test files that a text names."""
    return set(re.findall(r"tests/laws/test_\w+\.py", text))


def there() -> set[str]:
    """Test files in the folder of the laws; those of one law must be named, others may."""
    return {path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/laws/test_*.py")}


def wrong(text: str, files: Iterable[str]) -> list[str]:
    """What a document says of tests that is not so."""
    files = set(files)
    found = [f"{name} is named and missing" for name in sorted(named(text) - files)]
    laws = {
        int(title.split(".")[0]): body for title, body in sections(text).items() if "." in title
    }
    if sorted(laws) != list(range(1, LAWS + 1)):
        found.append(f"laws {sorted(laws)}")
    for law, body in laws.items():
        own = {name for name in files if f"/test_law{law:02}_" in name}
        if not own or not own <= named(body):
            found.append(f"law {law} does not name {sorted(own)}")
    return found


def test_every_law_names_its_tests_and_every_test_is_named() -> None:
    assert wrong(TEXT, there()) == []


@pytest.mark.parametrize(
    ("text", "more"),
    [
        (TEXT.replace("test_law07_cache", "test_law07_caches"), set()),
        (TEXT.replace("## 17. ", "## "), set()),
        (TEXT, {"tests/laws/test_law03_another.py"}),
    ],
    ids=["a missing file", "a missing law", "another file of a law"],
)
def test_what_is_wrong_is_noticed(text: str, more: set[str]) -> None:
    assert wrong(text, there() | more)
