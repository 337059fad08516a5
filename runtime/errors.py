"""What transom raises and warns.

Bad values and shapes raise ValueError, bad types and dtypes TypeError; both carry one line of the
form `<op>: <what was seen>; <what is expected>[; <what to do>]`, raised before anything is written.
"""

from __future__ import annotations


class NotSupported(RuntimeError):
    """No implementation can run this call, or the one asked for cannot; the text lists every
    reason."""


class PluginError(RuntimeError):
    """A plugin was refused or broke; the text names the plugin and what to do."""


class SlowPath(UserWarning):
    """A call fell back to a slower implementation; the text gives the reasons (once per operator
    and reasons)."""
