"""Attention maps of the language model: made for the length of a block."""

from collections.abc import Iterator
from contextlib import contextmanager

from vispress.adapters.model_adapter import ModelAdapter


@contextmanager
def eager_attention(adapter: ModelAdapter) -> Iterator[None]:
    """Let the language model's layers compute attention eagerly, as `output_attentions` needs."""
    before: str = adapter.language_model.config._attn_implementation
    adapter.language_model.set_attn_implementation("eager")
    try:
        yield
    finally:
        adapter.language_model.set_attn_implementation(before)
