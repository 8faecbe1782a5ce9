"""Training in tests: as it is, but for the precision of Muon's directions."""

from collections.abc import Iterator

import pytest

from vispress.reference.train import optim


@pytest.fixture(scope="module")
def one_iteration() -> Iterator[None]:
    """Let Muon iterate once: five times at the models' width are half of a short training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "_STEPS", 1)
        yield
