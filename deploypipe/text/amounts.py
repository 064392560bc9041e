"""Figures for people: the one place that rounds them, so that tables, checks and sentences agree to the last digit."""

from math import floor, isfinite, log10

NO_LIMIT = "no limit"
_LOOSEST = 500.0  # times the dense figure; a fast development run asks for twice that, less a margin
_DIGITS = 4  # significant ones of a time or of a size
_PLACES = {"pp": 2, "x": 3, "%": 2}  # decimals of units whose figures have one magnitude


def amount(value: float, unit: str, *, signed: bool = False) -> str:
    """A figure with its unit: "4.800 ms", "0.672x", "+0.20 pp"; large counts, which have no unit, as "6.9 M"."""
    return _with_unit(_number(value, unit, value, signed=signed), unit)


def bounded(value: float, low: float, high: float, unit: str, *, signed: bool = False) -> str:
    """A figure with the ends of its interval, which have as many decimals: "0.672x (0.660 to 0.684)"."""
    ends = (_number(end, unit, value, signed=signed) for end in (low, high))
    return f"{amount(value, unit, signed=signed)} ({' to '.join(ends)})"


def limit_text(value: float, unit: str) -> str:
    """A limit, rounded like the figures that it bounds, without zeros at the end: "5 ms", "0.7x"."""
    text = _number(value, unit, value)
    return _with_unit(text.rstrip("0").rstrip(".") if "." in text and text[-1].isdigit() else text, unit)


def share_limit_text(share: float, digits: int = 3) -> str:
    """A limit as a share of the dense network's figure, or that there is none."""
    return NO_LIMIT if share >= _LOOSEST else f"{share:.{digits}g}x"


def count(value: float) -> str:
    """Four significant digits; thousands, millions and thousand millions get a k, M or G."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g} {suffix}"
    return f"{value:.4g}"


def mebibytes(num_bytes: float) -> str:
    """A file's size in the unit that a budget of file sizes has."""
    return amount(num_bytes / 2**20, "MiB")


def _number(value: float, unit: str, rounded_like: float, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    if not isfinite(value) or unit not in ("ms", "MiB", *_PLACES):
        return format(value, f"{sign}.4g") if abs(value) < 1e4 else count(value)
    text = format(value, f"{sign},.{_places(rounded_like, unit)}f")
    return text if text.strip("+-0.") else text.lstrip("+-")  # zero has no sign


def _places(value: float, unit: str) -> int:
    if unit in _PLACES:
        return _PLACES[unit]
    return max(0, _DIGITS - 1 - floor(log10(abs(value)))) if value and isfinite(value) else _DIGITS - 1


def _with_unit(text: str, unit: str) -> str:
    return f"{text}{unit}" if unit == "x" else f"{text} {unit}".strip()
