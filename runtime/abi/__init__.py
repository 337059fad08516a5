"""Plugins in C: libraries that answer csrc/include/transom_plugin.h, called through cffi.

table   opening a library, checking its table, registering what it offers
frame   a call as C sees it
call    calling: outputs and workspace, errors
ranges  values of tensors, checked where a rule of the operator need not be asked
direct  eager inference: past torch's dispatcher to the plan of the call
"""

from __future__ import annotations

from .table import CPlugin, Library, arguments, open_library, schema, schema_hash

__all__ = ["CPlugin", "Library", "arguments", "open_library", "schema", "schema_hash"]
