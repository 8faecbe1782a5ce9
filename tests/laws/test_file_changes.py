"""How far a reader of one prefill has to go: files, changes from file to file, calls."""

from tests.laws.file_changes import walk

FILES, CHANGES, CALLS = 53, 282, 485


def test_a_prefill_does_not_wander_further() -> None:
    """FastV on six layers, the second prefill; `python -m tests.laws.file_changes` lists them."""
    found = walk(keep_ratio=0.5)
    assert len(found.calls) <= FILES
    assert found.changes <= CHANGES
    assert found.calls.total() <= CALLS


def test_what_is_counted_can_grow() -> None:
    fewer, more = walk(keep_ratio=0.5), walk("transprune")
    assert more.calls.total() > fewer.calls.total()
