"""Peak memory: exact on operations whose bytes are known; the GPU's own figures through a stub."""

import pytest
import torch

from vispress.bench.timing.memory import LiveBytes, peak_bytes
from vispress.bench.timing.timer import Timer

CPU = torch.device("cpu")
KB = 256
"""fp32 numbers of one KiB."""


@pytest.mark.parametrize(
    ("call", "kib"),
    [
        (lambda x: None, 0),
        (lambda x: x * 2, 4),
        (lambda x: x.view(2, -1).T[1].unsqueeze(0), 0),
        (lambda x: x.add_(1), 0),
        (lambda x: (x * 2).relu_().reshape(2, -1), 4),
        (lambda x: x.double(), 8),
        (lambda x: x.chunk(2)[0] + 1, 2),
        (lambda x: torch.cat([x, x[:KB]]), 5),
        (lambda x: [x * 2, x * 3], 8),
        (lambda x: (x * 2).sort(), 4 + 4 + 8),
        (lambda x: x.expand(3, -1).contiguous(), 12),
        (lambda x: torch.mm(x.view(-1, 1), x.view(1, -1)[:, :KB]), 4 * KB),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_known_operations_count_exactly(call, kib, inference):
    x = torch.ones(4 * KB)
    with torch.inference_mode(inference):
        assert peak_bytes(CPU, lambda: call(x)) == 1024 * kib


def test_what_is_freed_makes_room():
    def one_after_the_other():
        for _ in range(5):
            torch.ones(KB)

    def peaks_in_the_middle():
        first = torch.ones(KB)
        second = torch.ones(6 * KB)
        del second
        return first + torch.ones(2 * KB)[:KB]  # 1 + 2 + 1

    assert peak_bytes(CPU, one_after_the_other) == 1024
    assert peak_bytes(CPU, peaks_in_the_middle) == 7 * 1024


def test_what_stays_is_still_counted_and_leaves_when_it_goes():
    with LiveBytes() as live:
        held = torch.ones(KB)
        part = held[:3]
        del held
        assert live.now == live.peak == 1024  # the part holds all of it
    del part
    assert live.now == 0
    assert live.peak == 1024


def test_a_gpu_reports_its_allocators_peak(monkeypatch):
    log = []
    device = torch.device("cuda", 1)

    def stub(name, answer=None):
        monkeypatch.setattr(torch.cuda, name, lambda where: (log.append((name, where)), answer)[1])

    stub("synchronize")
    stub("memory_allocated", 100)
    stub("reset_peak_memory_stats")
    stub("max_memory_allocated", 350)
    assert peak_bytes(device, lambda: log.append("call")) == 250
    names = [entry if entry == "call" else entry[0] for entry in log]
    assert names == [
        "synchronize", "memory_allocated", "reset_peak_memory_stats", "call", "synchronize",
        "max_memory_allocated",
    ]  # fmt: skip
    assert {entry[1] for entry in log if entry != "call"} == {device}


def test_a_gpu_is_timed_by_events_on_the_devices_stream(monkeypatch):
    log = []

    class Event:
        made = 0

        def __init__(self, enable_timing):
            assert enable_timing
            self.number = Event.made
            Event.made += 1

        def record(self, stream):
            log.append(("record", self.number, stream))

        def synchronize(self):
            log.append(("wait", self.number))

        def elapsed_time(self, other):
            assert ("wait", other.number) in log, "read before it happened"
            return 2.5 * (other.number - self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append(("all", device)))
    device = torch.device("cuda", 1)
    timer = Timer(device, now=lambda: pytest.fail("the host's timer was asked"))
    first, last = timer.mark(), timer.mark()
    timer.synchronize()
    assert timer.between(first, last) == 2.5
    assert log[:3] == [
        ("record", 0, "stream of cuda:1"), ("record", 1, "stream of cuda:1"), ("all", device),
    ]  # fmt: skip
