"""Prompts of a case are such that its method has something to act on."""

from collections.abc import Iterator

import pytest
from tests.laws.table import GISTS
from tests.tiny import gist_tokens


@pytest.fixture(autouse=True)
def _prompts_of_the_method(request: pytest.FixtureRequest) -> Iterator[None]:
    """Put a token behind each image in cases of methods for which it stands for the image."""
    case = getattr(request.node, "callspec", None)
    method = None if case is None else case.params.get("method")
    with gist_tokens(int(isinstance(method, str) and method in GISTS)):
        yield
