"""Check the fields of a record when it is made. A violation is a ValueError: the rule, the value, the remedy."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from deploypipe.text.printable_text import HIDDEN

MAX_SAMPLES = 10**9
_MAX_TEXT = 1_000
_SHOWN = 60  # characters of a value in an error


@dataclass(frozen=True, slots=True)
class Bound:
    """The allowed range of a number. is_above: `minimum` itself is excluded. is_whole: whole numbers only."""

    minimum: float
    maximum: float
    is_whole: bool = False
    is_above: bool = False


def whole(minimum: int, maximum: int) -> Bound:
    return Bound(minimum, maximum, is_whole=True)


def real(minimum: float, maximum: float) -> Bound:
    return Bound(minimum, maximum)


def above(minimum: float, maximum: float) -> Bound:
    return Bound(minimum, maximum, is_above=True)


SHARE = above(0, 1)  # 0 excluded
FRACTION = real(0, 1)


def require(record: object, **bounds: Bound) -> None:
    """Raise ValueError, with a line for each field that is not a number within its bound. None is not checked."""
    problems = []
    for name, bound in bounds.items():
        try:
            if (value := getattr(record, name)) is not None:
                require_value(name, value, bound)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))


def require_value(name: str, value: object, bound: Bound) -> None:
    """Raise ValueError if one value is not a number within its bound. name: the value's name in the error."""
    kind = "whole number" if bound.is_whole else "number"
    if not isinstance(value, int | float) or isinstance(value, bool) or (bound.is_whole and not isinstance(value, int)):
        rule = f"a {kind}"
    elif isinstance(value, float) and not math.isfinite(value):
        rule = "finite"
    elif value < bound.minimum or (bound.is_above and value <= bound.minimum):
        rule = f"{'>' if bound.is_above else '>='} {bound.minimum:g}"
    elif value > bound.maximum:
        rule = f"<= {_plain(bound.maximum)}"
    else:
        return
    raise ValueError(f"{name} must be {rule}, got {shown(value)}; write a {kind} {_range(bound)}")


def require_one_of(name: str, value: object, choices: Iterable[object]) -> None:
    known = tuple(choices)
    if value not in known:
        raise ValueError(f"{name} = {shown(value)} does not exist; write one of {', '.join(map(str, known))}")


def require_text(name: str, value: object, max_length: int = _MAX_TEXT) -> None:
    """Raise ValueError if `value` is not text on one line, without hidden characters."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {shown(value)}; write it in quotes")
    if len(value) > max_length:
        raise ValueError(f"{name} has {len(value)} characters, but at most {max_length} are allowed; shorten it")
    if found := HIDDEN.search(value):
        raise ValueError(f"{name} = {shown(value)} holds the hidden character U+{ord(found[0]):04X}; remove it")


def require_texts(name: str, values: Iterable[object]) -> None:
    """Check several texts like `require_text`: a tuple's items, or a mapping's keys and values."""
    items = [*values, *values.values()] if isinstance(values, Mapping) else values
    for value in items:
        require_text(name, value)


def shown(value: object) -> str:
    """A value for an error message: in ASCII, on one line, at most 60 characters."""
    if isinstance(value, int) and abs(value) > 10**30:
        return f"a number of {value.bit_length()} bits"
    text = ascii(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _range(bound: Bound) -> str:
    begin = f"above {bound.minimum:g}, up to" if bound.is_above else f"from {bound.minimum:g} to"
    return f"{begin} {_plain(bound.maximum)}"


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"
