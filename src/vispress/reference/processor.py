"""Tokenizer and processor of the reference models, at their public path."""

from vispress.reference.model.processor import (
    PicturesProcessor,
    build_processor,
    build_qwen_processor,
    build_tokenizer,
    with_marks,
)

__all__ = [
    "PicturesProcessor",
    "build_processor",
    "build_qwen_processor",
    "build_tokenizer",
    "with_marks",
]
