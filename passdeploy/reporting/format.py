"""Numbers as people read them: three significant digits, a unit, and a dash where there is none."""

from __future__ import annotations

import math

NONE = "\u2013"  # en dash
MINUS = "\u2212"
TIMES = "\u00d7"


def significant(value: float, digits: int = 3) -> str:
    """`value` to `digits` significant digits without an exponent."""
    if value == 0:
        return "0"
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{value:.{decimals}f}".replace("-", MINUS)


def milliseconds(ms: float | None, digits: int = 3) -> str:
    """``1.97 ms``, ``281 µs``; a dash for None."""
    if ms is None:
        return NONE
    if ms >= 10_000:
        return f"{significant(ms / 1000, digits)} s"
    return f"{significant(ms, digits)} ms" if ms >= 1 else f"{significant(ms * 1000, digits)} µs"


def beside(ms: float | None, limit: float | None) -> str:
    """A time in as many digits as it takes to see on which side of a limit it lies: ``1.004 ms`` beside 1 ms."""
    if ms is None or limit is None or ms == limit:
        return milliseconds(ms)
    digits = next((d for d in (3, 4, 5) if milliseconds(ms, d) != milliseconds(limit, d)), 6)
    return milliseconds(ms, digits)


def capital(text: str) -> str:
    """With a capital at the start; the others stay as they are (``mAP``)."""
    return text[:1].upper() + text[1:]


def seconds(value: float | None) -> str:
    """``9.7 s``, ``1 min 28 s``, ``2 h 5 min``; a dash for None."""
    if value is None:
        return NONE
    if value < 60:
        return f"{value:.1f} s"
    whole = round(value)
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def count(value: float | None) -> str:
    """``41.2 M``, ``272 k``; a dash for None."""
    if value is None:
        return NONE
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{significant(value / size)} {letter}"
    return f"{value:g}"


def size(count: float | None) -> str:
    """``1.09 MB``, ``272 kB``; a dash for None."""
    if count is None:
        return NONE
    for unit, letter in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{significant(count / unit)} {letter}"
    return f"{count:g} bytes"


def percent(share: float | None, decimals: int = 2) -> str:
    """``92.72 %`` of a share in [0, 1]; a dash for None."""
    return NONE if share is None else f"{share * 100:.{decimals}f} %".replace("-", MINUS)


def points(difference: float | None, decimals: int = 2) -> str:
    """``−0.59 points``: a difference of shares, signed; a dash for None."""
    if difference is None:
        return NONE
    text = f"{difference * 100:+.{decimals}f}"
    text = text.replace("-", MINUS) if float(text) else f"±{0:.{decimals}f}"
    return f"{text} points"


def times(ratio: float | None, decimals: int = 2) -> str:
    """``2.07×``; a dash for None."""
    return NONE if ratio is None else f"{ratio:.{decimals}f}{TIMES}"


def interval(bounds: tuple[float, float] | None, decimals: int = 2) -> str:
    """``2.05 to 2.08``; a dash for None."""
    return NONE if bounds is None else f"{bounds[0]:.{decimals}f} to {bounds[1]:.{decimals}f}"


def tiny(value: float | None) -> str:
    """``1.9e-06``, ``0``; a dash for None."""
    return NONE if value is None else ("0" if value == 0 else f"{value:.1e}")
