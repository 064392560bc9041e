"""Strict JSON (RFC 8259): parsed within bounds, written without NaN. Standard library only.

A number that is not finite is written as `{"not_finite": "nan"}` (or "inf", "-inf"), because JSON cannot express it.
"""

import json
import math
from collections.abc import Callable
from typing import Any, NoReturn

MAX_DEPTH = 64  # of lists and objects in each other; our own files have about ten
_NOT_FINITE = "not_finite"
_WORDS = ("nan", "inf", "-inf")


def loads(text: str | bytes) -> Any:
    """Parse one JSON value; ValueError, in one line, if it is not strict JSON.

    Also an error: NaN and Infinity, numbers beyond a float, whole numbers of thousands of digits, a repeated key,
    nesting deeper than MAX_DEPTH, half a surrogate pair, a byte order mark, bytes that are not UTF-8.
    """
    return _loads(text, _object)


def loads_any_float(text: str | bytes) -> Any:
    """Like `loads`, but reads the non-finite numbers that `dumps` writes. For our own files."""
    return _loads(text, _object_or_float)


def dumps(
    value: Any, *, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = True
) -> str:
    """Write JSON in ASCII. Non-finite numbers become objects that `loads_any_float` reads."""
    options: dict[str, Any] = {"sort_keys": sort_keys, "indent": indent, "separators": separators, "allow_nan": False}
    try:
        return json.dumps(value, **options)
    except ValueError:
        return json.dumps(_marked(value), **options)


def find_not_finite(value: Any) -> str | None:
    """The key ("budget.accuracy_drop_pp") of the first number that is NaN or infinite; None if there is none."""
    return next((key for key, leaf, _ in _leaves(value) if isinstance(leaf, float) and not math.isfinite(leaf)), None)


def is_too_deep(value: Any) -> bool:
    """Whether lists and objects are nested more than MAX_DEPTH deep."""
    return any(depth > MAX_DEPTH for _, _, depth in _leaves(value))


def _loads(text: str | bytes, as_object: Callable[[list[tuple[str, Any]]], Any]) -> Any:
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(decoded, parse_constant=_refuse, parse_float=_float, object_pairs_hook=as_object)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    if is_too_deep(value):
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if "\\u" in decoded:
        _require_whole_characters(value)
    return value


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is beyond the largest number")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:40]!r} is given twice")
    return found


def _object_or_float(pairs: list[tuple[str, Any]]) -> Any:
    if len(pairs) == 1 and pairs[0][0] == _NOT_FINITE and pairs[0][1] in _WORDS:
        return float(pairs[0][1])
    return _object(pairs)


def _require_whole_characters(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("holds half a surrogate pair, which is not a character") from None


def _marked(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {_NOT_FINITE: str(value)}
    if isinstance(value, dict):
        return {key: _marked(inner) for key, inner in value.items()}
    return [_marked(inner) for inner in value] if isinstance(value, list | tuple) else value


def _leaves(value: Any) -> Any:
    """(key, value, depth) of every value, without recursion."""
    waiting = [("", value, 0)]
    while waiting:
        key, found, depth = waiting.pop()
        yield key, found, depth
        if depth > MAX_DEPTH:
            continue
        dot = f"{key}." if key else ""
        if isinstance(found, dict):
            waiting += [(f"{dot}{name}", inner, depth + 1) for name, inner in found.items()]
        elif isinstance(found, list | tuple):
            waiting += [(f"{dot}{place}", inner, depth + 1) for place, inner in enumerate(found)]
