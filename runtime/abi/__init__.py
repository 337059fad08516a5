"""Plugins in C: libraries that answer csrc/include/transom_plugin.h, and how their functions are
called.

library        opening a library, checking its table
frame          a call as C sees it, made in Python
services       memory, copies and streams of a library's device
weight_forms   packed forms of weights
output_memory  memory of large outputs, used again
extension      transom._C, by which calls go where it is built
plugin         registering what a library offers, calling it
"""

from __future__ import annotations

from .library import Library, arguments, open_library, schema, schema_hash
from .plugin import CPlugin

__all__ = ["CPlugin", "Library", "arguments", "open_library", "schema", "schema_hash"]
