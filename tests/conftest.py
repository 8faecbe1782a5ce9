"""Shared settings of all tests."""

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    # the same kernel tests run compiled on a GPU, interpreted elsewhere; read when triton is
    # imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
# tiny models: threads cost more than they bring, and workers run side by side
torch.set_num_threads(1)
