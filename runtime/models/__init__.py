"""Plugging transom into Hugging Face models: `transom.patch(model)` and `transom.unpatch(model)`.

transformers is imported by the modules below, when a model is patched or made, never by this one.
"""

from __future__ import annotations

from .patching import patch, unpatch
from .report import PatchReport, Record

__all__ = ["PatchReport", "Record", "patch", "unpatch"]
