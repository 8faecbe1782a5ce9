"""Kernels for choosing, gathering and merging visual tokens, each beside its plain-torch meaning.

Each op is a package of its own: `from vispress_kernels.gather_tokens import gather_tokens`.
Importing this package imports nothing but torch; Triton is imported when a kernel is launched, and
where it is missing `backend="auto"` runs the reference.
"""

from vispress_kernels._backend import Backend, has_triton, resolve_backend

__all__ = ["Backend", "has_triton", "resolve_backend"]
