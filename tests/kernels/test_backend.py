"""Which implementation runs, and what importing the kernels costs."""

import os
import subprocess
import sys

import pytest
import torch

from vispress_kernels import has_triton, resolve_backend
from vispress_kernels._backend import needs_grad

LEAN = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(name)

if "triton" in {hide!r}:
    sys.meta_path.insert(0, Hidden())
    import importlib.util
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *a: None if name == "triton" else find_spec(name, *a)
before = set(sys.modules)
import pkgutil
import torch
from_torch = set(sys.modules)
import vispress_kernels
ops = [m.name for m in pkgutil.iter_modules(vispress_kernels.__path__) if m.ispkg]
for op in ops:
    __import__("vispress_kernels." + op)
new = {{m.partition(".")[0] for m in set(sys.modules) - from_torch}}
from vispress_kernels.gather_tokens import gather_tokens
x, keep = torch.ones(1, 2, 3), torch.zeros(1, 1, dtype=torch.int64)
assert gather_tokens(x, keep).shape == (1, 1, 3)
if "triton" in {hide!r}:
    try:
        gather_tokens(x, keep, backend="triton")
    except ImportError as error:
        print("refused:", error)
print(len(ops), "triton" in new or "transformers" in new)
{extra}
"""


AGAIN = """
import triton
print("triton" in set(sys.modules) - from_torch)
"""


def run_probe(hide, extra=""):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    code = LEAN.format(hide=hide, extra=extra)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_without_triton_everything_imports_and_the_reference_runs():
    refused, summary = run_probe(["triton"])
    assert "not installed" in refused
    assert summary == "13 False"


@pytest.mark.slow
def test_importing_does_not_import_triton_and_the_probe_can_fail():
    found = run_probe([], AGAIN if has_triton() else "")
    assert found == ["13 False", *["True"] * has_triton()]


def test_auto_is_the_reference_on_cpu():
    assert resolve_backend("auto", torch.ones(1)) == "torch"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_auto_is_triton_on_cuda_but_not_for_fp64_or_gradients():
    x = torch.ones(1, device="cuda")
    assert resolve_backend("auto", x, None) == "triton"
    assert resolve_backend("auto", x.double()) == "torch"
    x.requires_grad_()
    assert resolve_backend("auto", x, has_backward=False) == "torch"
    assert resolve_backend("auto", x, has_backward=True) == "triton"


@pytest.mark.skipif(not has_triton(), reason="needs triton")
def test_triton_is_chosen_when_asked_but_not_for_fp64(device):
    x = torch.ones(1, device=device)
    assert resolve_backend("triton", x) == "triton"
    assert resolve_backend("triton", x, x.double()) == "torch"
    assert resolve_backend("triton", x.double(), x) == "torch"


def test_a_gradient_is_needed_where_autograd_would_record_one():
    x = torch.ones(1, requires_grad=True)
    assert needs_grad(None, x)
    assert not needs_grad(x.detach(), None)
    with torch.no_grad():
        assert not needs_grad(x)


@pytest.mark.skipif(not has_triton(), reason="needs triton")
def test_a_kernel_without_backward_is_not_chosen_where_a_gradient_is_needed(device):
    x = torch.ones(1, device=device, requires_grad=True)
    assert resolve_backend("auto", x, has_backward=False) == "torch"
    with pytest.raises(ValueError, match="no backward"):
        resolve_backend("triton", x, has_backward=False)
    assert resolve_backend("triton", x, has_backward=True) == "triton"


@pytest.mark.skipif(not has_triton(), reason="needs triton")
def test_triton_is_refused_on_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"needs CUDA tensors, got \['cpu'\]"):
        resolve_backend("triton", torch.ones(1))


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match="'cuda'"):
        resolve_backend("cuda", torch.ones(1))
