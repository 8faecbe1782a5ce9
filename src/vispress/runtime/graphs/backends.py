"""Record what a function runs, and run it again on the same memory without Python.

On CUDA that is a graph. Elsewhere a tape of the operations stands for it, which has a graph's
limits: nothing that Python decided is decided again, and every operation reads and writes where it
did. So all around a graph is tested without a GPU; the tape is no faster than the function.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vispress.runtime.graphs.operations import UNWRITTEN, written_by
from vispress.runtime.graphs.watch import Watch

T = TypeVar("T")


class Recorded(Protocol):
    """What can be run again."""

    def replay(self) -> None:
        """Run it again: tensors that it gave hold what it gives now."""


class Backend(Protocol):
    """How functions are recorded."""

    name: str

    def aside(self) -> Any:
        """Give a context for runs ahead of a recording, and for what must be ready before it."""

    def turn(self) -> Any:
        """Give a context in which one thread fills, replays and reads."""

    def record(self, run: Callable[[], T]) -> tuple[Recorded, T]:
        """Record a function; what it gave is not filled before a replay."""


class CudaGraphs:
    """Record CUDA graphs, all in one pool of memory.

    Graphs of one pool may use the same memory for what is between their inputs and their results.
    So they are replayed one at a time, and results are copied before the next one.

    Args:
        device: A CUDA device.
    """

    name = "cuda"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()
        self._over: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run on the stream that graphs are recorded on."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait, on the device, for the turn before: it may have been on another stream."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self._over)
        try:
            yield
        finally:
            self._over.record(current)

    def record(self, run: Callable[[], T]) -> tuple[Recorded, T]:
        """Record a graph; other threads may go on using the device."""
        graph, error = torch.cuda.CUDAGraph(), None
        torch.cuda.synchronize(self.device)
        try:
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                try:
                    made = run()
                except BaseException as raised:
                    error = raised
                    raise
        except Exception:  # CUDA's own word on a recording that was broken off tells nothing
            if error is not None:
                raise error from None
            raise
        return graph, made


class Tapes:
    """Record operations, on any device: the reference of `CudaGraphs`."""

    name = "tape"

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Stay: there is no other stream."""
        yield

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Begin: nothing runs behind Python's back."""
        yield

    def record(self, run: Callable[[], T]) -> tuple[Recorded, T]:
        """Record a tape."""
        tape = Tape()
        with tape:
            made = run()
        return tape, made


class Tape(TorchDispatchMode):
    """Operations in order, with the tensors that they ran on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._steps: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        held = {one.untyped_storage()._cdata for one in given}
        if func in UNWRITTEN:  # holds nothing, and may be of another size by now
            return out
        if written_by(func):
            self._steps.append((func, args, kwargs, []))
        elif kwargs.get("generator") is None:  # what is drawn by a seed is drawn once
            fresh = [one for one in made if one.untyped_storage()._cdata not in held]
            if fresh:
                assert len(fresh) == len(made)
                self._steps.append((func, args, kwargs, made))
        return out

    def replay(self) -> None:
        """Run all operations again; what they give is written where it was."""
        with torch.inference_mode(False), torch.no_grad():
            for func, args, kwargs, made in self._steps:
                out = func(*args, **kwargs)
                again = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
                for into, one in zip(made, again, strict=False):
                    into.copy_(one)


def record(
    backend: Backend,
    run: Callable[[], T],
    watch: Callable[[Watch | None], Watch],
    before: Callable[[], None] = lambda: None,
) -> tuple[Recorded, T, object]:
    """Record a function that is a fixed sequence of operations.

    Args:
        backend: How.
        run: What is recorded.
        watch: Makes what watches a run, and is told what an earlier run has read, or None.
        before: What must be done before each run, and is not recorded.

    Returns:
        What runs it again, what it gave, and what must live as long as both.

    Raises:
        NotFixedError: The host reads values in it.
    """
    with torch.inference_mode(False), torch.no_grad():
        with backend.aside():
            before()
            run()
            first = watch(None)
            before()
            with first:
                run()
            before()
            second = watch(first)

        def watched() -> T:
            with second:
                return run()

        recorded, made = backend.record(watched)
        return recorded, made, (first, second.outside)
