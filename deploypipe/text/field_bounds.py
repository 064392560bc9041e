"""Bounds of a record's fields, checked where the record is made. A violation is a ValueError: name, value, remedy."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from deploypipe.text.printable_text import HIDDEN

MAX_SAMPLES = 10**9
_MAX_TEXT = 1_000
_SHOWN = 60  # characters of a value in an error


@dataclass(frozen=True, slots=True)
class Bound:
    """least to most; is_above: `least` itself is excluded. is_whole: whole numbers only."""

    least: float
    most: float
    is_whole: bool = False
    is_above: bool = False


def whole(least: int, most: int) -> Bound:
    return Bound(least, most, is_whole=True)


def real(least: float, most: float) -> Bound:
    return Bound(least, most)


def above(least: float, most: float) -> Bound:
    return Bound(least, most, is_above=True)


SHARE = above(0, 1)  # not nothing
FRACTION = real(0, 1)


def require(record: object, **bounds: Bound) -> None:
    """ValueError for the first field that is not a number within its bound. A field that is None is not checked."""
    for name, bound in bounds.items():
        if (value := getattr(record, name)) is not None:
            require_value(name, value, bound)


def require_value(name: str, value: object, bound: Bound) -> None:
    """The same for one value; `name` is what the error calls it."""
    if not isinstance(value, int | float) or isinstance(value, bool) or (bound.is_whole and not isinstance(value, int)):
        kind = "whole number" if bound.is_whole else "number"
        raise ValueError(f"{name} = {shown(value)} is no {kind}; write one {_range(bound)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} = {value} is not finite; write a number {_range(bound)}")
    if value < bound.least or (bound.is_above and value <= bound.least):
        least = f"a number above {bound.least:g}" if bound.is_above else f"{bound.least:g} or more"
        raise ValueError(f"{name} = {shown(value)} is too small; write {least}")
    if value > bound.most:
        raise ValueError(f"{name} = {shown(value)} is too large; write {_plain(bound.most)} or less")


def require_one_of(name: str, value: object, choices: Iterable[object]) -> None:
    known = tuple(choices)
    if value not in known:
        raise ValueError(f"{name} = {shown(value)} does not exist; write one of {', '.join(map(str, known))}")


def require_text(name: str, value: object, most: int = _MAX_TEXT) -> None:
    """ValueError where `value` is not a text of one line that can be printed."""
    if not isinstance(value, str):
        raise ValueError(f"{name} = {shown(value)} is no text; write one in quotes")
    if len(value) > most:
        raise ValueError(f"{name} has {len(value)} characters, which is too long; write {most} or fewer")
    if found := HIDDEN.search(value):
        raise ValueError(
            f"{name} = {shown(value)} holds the character U+{ord(found[0]):04X}, which is not printed; leave it out"
        )


def require_texts(name: str, values: Iterable[object]) -> None:
    """The same for each of several: a tuple's items, or a mapping's keys and values."""
    items = [*values, *values.values()] if isinstance(values, Mapping) else values
    for value in items:
        require_text(name, value)


def shown(value: object) -> str:
    """A value in an error: in ASCII, on one line, and short however large the value is."""
    if isinstance(value, int) and abs(value) > 10**30:
        return f"a number of {value.bit_length()} bits"
    text = ascii(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _range(bound: Bound) -> str:
    least = f"above {bound.least:g}, up to" if bound.is_above else f"from {bound.least:g} to"
    return f"{least} {_plain(bound.most)}"


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"
