"""Numbers as people read them: three digits and a unit."""

from __future__ import annotations

NONE = "-"
"""What stands for a figure that was not measured."""


def seconds(value: float | None) -> str:
    """'812 us', '3.52 s': three significant digits."""
    if value is None:
        return NONE
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{digits(value / scale)} {unit}"
    return f"{digits(value / 1e-9)} ns" if value > 0 else "0 s"


def memory(value: float | None) -> str:
    """'312 MiB': bytes in binary units."""
    if value is None:
        return NONE
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= scale:
            return f"{digits(value / scale)} {unit}"
    return f"{value:.0f} B"


def operations(value: float) -> str:
    """'805 Mflop': floating-point operations in decimal units."""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{digits(value / scale)} {unit}flop"
    return f"{value:.0f} flop"


def fixed(value: float) -> str:
    """'1,234.50', '< 0.01': two decimals, for columns."""
    return "< 0.01" if 0 < value < 0.005 else f"{value:,.2f}"


def digits(value: float | None) -> str:
    """Three significant digits without an exponent, thousands separated: '0.0123', '12.3',
    '1,234'."""
    if value is None:
        return NONE
    size = abs(value)
    if size >= 100 or value == 0:
        return f"{value:,.0f}"
    places = 2
    while size < 1 and places < 8:
        size, places = size * 10, places + 1
    return f"{value:.{places - 1 if size >= 10 else places}f}"


def percent(value: float | None) -> str:
    """'41.2 %' of a share in 0..1."""
    return NONE if value is None else f"{100 * value:.1f} %"


def share(value: float | None) -> str:
    """'41.2 %', '< 0.1 %': where a small share is not none."""
    return "< 0.1 %" if value is not None and 0 < value < 0.0005 else percent(value)


def small(value: float | None) -> str:
    """'6.9e-07': for differences."""
    return NONE if value is None else f"{value:.1e}" if value else "0"
