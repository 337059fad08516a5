"""What transom raises and warns.

Bad values and shapes raise ValueError, bad types and dtypes TypeError; both carry one line of the
form `<op>: <what was seen>; <what is expected>[; <what to do>]`, raised before anything is written.
"""

from __future__ import annotations

import reprlib
from typing import Any

LONGEST = 80
"""Characters that a value takes in a message."""


class NotSupported(RuntimeError):
    """No implementation can run this call, or the one asked for cannot; the text lists every
    reason."""


class PluginError(RuntimeError):
    """A plugin was refused or broke; the text names the plugin and what to do."""


class SlowPath(UserWarning):
    """A call fell back to a slower implementation; the text gives the reasons (once per operator
    and reasons)."""


def shown(value: Any) -> str:
    """A value as a message shows it: its repr on one line, cut in the middle where it is long.

    Nothing of a large value is formatted but what is shown: a text of a million characters, a
    tensor or a list of a million numbers costs no more than a short one.
    """
    text = " ".join(_brief.repr(value).split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 20]}...{text[-17:]}"


class _Brief(reprlib.Repr):
    """Tensors by dtype and shape; other objects by their type where their repr fails."""

    def repr1(self, x: Any, level: int) -> str:
        shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
        if shape is not None and dtype is not None:
            return f"{type(x).__name__} {str(dtype).removeprefix('torch.')}{list(shape)}"
        return super().repr1(x, level)

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 256:  # Python refuses to print those of thousands of digits
            return f"an int of {x.bit_length()} bits"
        return repr(x)


_brief = _Brief()
_brief.maxstring = _brief.maxother = LONGEST
