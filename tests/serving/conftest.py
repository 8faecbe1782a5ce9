"""What every test of the vLLM plug-in has: the engine in this process, torchvision without CUDA."""

import os
import runpy
from pathlib import Path

import pytest

_ENVIRONMENT = Path(__file__).parent / "environment"
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
    HF_HUB_OFFLINE="1",
    PYTHONPATH=os.pathsep.join(
        filter(None, [str(_ENVIRONMENT), os.environ.get("PYTHONPATH")])
    ),  # vLLM looks at model classes in processes of their own
)
runpy.run_path(str(_ENVIRONMENT / "sitecustomize.py"))


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    """The shipped LLaVA reference: a folder that vLLM reads, the model and its processor."""
    from vispress.reference.folders import SHIPPED
    from vispress.reference.model.checkpoint import read

    folder = tmp_path_factory.mktemp("llava")
    model, processor = read(SHIPPED)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor
