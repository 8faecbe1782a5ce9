"""A stopped training goes on as if it had not been stopped, or is refused by name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.distillation.test_distil import examples, network

from vispress import remove_compression
from vispress.bench.model.loaded_model import LoadedModel, load_named_model
from vispress.distillation import unfinished as state
from vispress.distillation.answers import teach
from vispress.distillation.distil import Curve, distil, divergence
from vispress.distillation.lessons import Pupil
from vispress.distillation.scenes import training_prompts
from vispress.distillation.unfinished import Unfinished
from vispress.errors import ConfigError
from vispress.methods import VisionSelector


class StoppedError(Exception):
    """Somebody pressed a key."""


def stopping(at: int) -> Callable[[float], None]:
    left = iter(range(at))

    def advance(_: float) -> None:
        if next(left, None) is None:
            raise StoppedError

    return advance


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "EVERY", 3)


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole, stopped = network(), network()
    told: dict[str, Any] = {"loss": divergence, "steps": 10, "batch": 8}
    expected = distil(whole, examples(), **told)
    kept = Unfinished(tmp_path / "o" / "u.safetensors", {"steps": 10})
    with pytest.raises(StoppedError):
        distil(stopped, examples(), **told, advance=stopping(7), unfinished=kept)
    again, steps = network(), []
    found = distil(again, examples(), **told, unfinished=kept, advance=steps.append)
    assert len(steps) == 4  # behind the sixth
    assert found.loss == expected.loss
    assert found.held_out == expected.held_out
    for one, other in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)
    kept.clear()
    assert not list((tmp_path / "o").iterdir())


def test_other_settings_and_damage_are_named(tmp_path: Path) -> None:
    module, file = network(), tmp_path / "u.safetensors"
    kept = Unfinished(file, {"steps": 3, "lr": 0.1, "path": tmp_path})
    distil(module, examples(), loss=divergence, steps=3, batch=8, unfinished=kept)
    optimizer = torch.optim.AdamW(module.parameters())
    assert kept.restore(module, optimizer, Curve()) == 3
    other = replace(kept, settings={"steps": 3, "lr": 0.2, "path": tmp_path})
    with pytest.raises(ConfigError, match=r"stopped with lr=0\.1, and now it is 0\.2; give it"):
        other.restore(module, optimizer, Curve())
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"u\.safetensors cannot be read .*; delete it"):
        kept.restore(module, optimizer, Curve())
    (tmp_path / "file").touch()
    nowhere = Unfinished(tmp_path / "file" / "u", {})
    with pytest.raises(ConfigError, match="cannot write"):
        distil(module, examples(), loss=divergence, steps=3, batch=8, unfinished=nowhere)


@pytest.mark.slow
def test_training_by_answers_goes_on_too(tmp_path: Path) -> None:
    loaded: LoadedModel = load_named_model("reference", "cpu", "fp32")
    kept = Unfinished(tmp_path / "u.safetensors", {})

    def taught(begin: Any = None, **options: Any) -> Any:
        more = {} if begin is None else {"begin": lambda *_: begin}
        method = VisionSelector(num_tokens=24)
        pupil = Pupil(
            loaded, method, training_prompts(20), steps=5, lr=1e-3, batch_size=2, **options, **more
        )
        try:
            return teach(pupil)
        finally:
            remove_compression(loaded.model)

    expected = taught()
    with pytest.raises(StoppedError):
        taught(stopping(4), unfinished=kept)
    assert taught(unfinished=kept).loss == expected.loss
