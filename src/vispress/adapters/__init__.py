"""Model families; importing this package registers the built-in adapters."""

from vispress.adapters import llava as llava
