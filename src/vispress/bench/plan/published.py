"""What papers print, as data: `configs/published`."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from vispress.checks import check_choice
from vispress.yaml_files import check_keys, read_yaml, shipped_files


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """What one paper prints of several methods.

    Args:
        source: Paper and table.
        relative: Mean over its benchmarks of score over the whole model's, in %, by method and
            tokens.
        scores: By method and tokens, scores by our names of tasks; `whole` is the whole model's.
    """

    source: str
    relative: Mapping[str, Mapping[int, float]]
    scores: Mapping[str, Mapping[int, Mapping[str, float]]]


@dataclass(frozen=True, kw_only=True)
class Published:
    """What papers print of one model.

    Args:
        model: Its name.
        tokens: Visual tokens of a picture.
        tables: One a paper.
        per_cent: Whether tokens are per cent of a video's, whose frames differ by paper; `tokens`
            is 100 then.
    """

    model: str
    tokens: int
    tables: tuple[PublishedTable, ...]
    per_cent: bool = False

    @property
    def whole(self) -> str:
        """What all tokens are called: 576 tokens, or 100 % of them."""
        return "100 % of the tokens" if self.per_cent else f"{self.tokens:,} tokens"

    def budgets(self, method: str) -> list[int]:
        """List the tokens at which a method is printed, most first."""
        printed = [(t.relative.get(method, {}), t.scores.get(method, {})) for t in self.tables]
        return sorted({n for pair in printed for one in pair for n in one}, reverse=True)


@cache
def load_published(name: str) -> Published:
    """Read a shipped file of `configs/published`.

    Raises:
        ConfigError: There is none of that name, or it is malformed.
    """
    files = shipped_files("published")
    check_choice("published", name, sorted(files))
    data = check_keys(read_yaml(files[name]), Published, str(files[name]))
    tables = []
    for number, one in enumerate(data["tables"]):
        table = check_keys(one, PublishedTable, f"{files[name]}, tables[{number}]")
        tables.append(PublishedTable(**{"relative": {}, "scores": {}} | table))
    return Published(**data | {"tables": tuple(tables)})
