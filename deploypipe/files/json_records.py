"""Records to JSON and back, and from TOML, with strict types. The only importer of pydantic."""

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

from pydantic import TypeAdapter, ValidationError

from deploypipe.errors import ConfigError
from deploypipe.text import strict_json
from deploypipe.text.field_bounds import shown
from deploypipe.text.printable_text import printable

_MAX_TOML_BYTES = 2**20
_MAX_DOTS = 1_000
_UNKNOWN_KEY = "unknown key"
T = TypeVar("T")


# One adapter for each record type: making it takes longer than reading a record.
_adapter: Callable[[Any], Any] = cache(TypeAdapter)


class _NotToml(ConfigError):
    """The text is not TOML at all, as opposed to TOML with values that no setting accepts."""


def to_plain(record: object) -> Any:
    """A record as JSON-ready dicts, lists, strings and numbers."""
    return _adapter(type(record)).dump_python(record, mode="json")


def to_json(record: object) -> str:
    """A record as canonical JSON: keys are sorted, so that equal records give equal bytes."""
    return strict_json.dumps(to_plain(record))


def from_json(record_type: type[T], text: str | bytes, source: str) -> T:
    """Read a record from JSON. Unknown keys and wrong types raise ConfigError with source, key, value and remedy."""
    try:
        plain = strict_json.loads_any_float(text)
    except ValueError as error:
        raise ConfigError(source, "", f"is not JSON ({error})", "check the path, or write the file again") from None
    return from_plain(record_type, plain, source)


def from_plain(record_type: type[T], value: object, source: str) -> T:
    """Read a record from plain data, such as parsed TOML, checked like `from_json`."""
    try:
        text = json.dumps(value, default=str)  # pydantic is strict about JSON's types, and reads tuples from lists
        record: T = _adapter(record_type).validate_json(text, strict=True, extra="forbid")
        return record
    except ValidationError as error:
        raise _explain(error, source, record_type) from None
    except RecursionError:
        raise ConfigError(source, "", "is nested too deeply", f"write at most {strict_json.MAX_DEPTH} levels") from None
    except ValueError as error:
        raise ConfigError(source, "", f"cannot be written as JSON ({_one_line(error)})", "use plain values") from None


def checked(record: T, source: str) -> T:
    """Check every type and bound of a record made by Python code, as if it came from a file."""
    try:
        plain = _adapter(type(record)).dump_python(record, mode="json", warnings="none")
    except (ValueError, TypeError, AttributeError) as error:  # pydantic's own class is the first
        raise ConfigError(source, "", f"has a value of a wrong type ({_one_line(error)})", "correct it") from None
    return from_plain(type(record), plain, source)


def load_toml(record_type: type[T], path: Path) -> T:
    """Read a record from a TOML file, checked like `from_json`."""
    return from_plain(record_type, read_toml(path), str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file as plain data; ConfigError if it is missing, not TOML, or has values that no setting accepts.

    A byte order mark at its start is skipped, because some editors write one.
    """
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(str(path), "", "is not a file", "give the path of a TOML file")
        with path.open("rb") as stream:
            content = stream.read(_MAX_TOML_BYTES + 1)
    except OSError as error:
        raise ConfigError(str(path), "", f"cannot be read ({error.strerror})", "check the path") from None
    except ValueError as error:  # a NUL in the path
        raise ConfigError(ascii(str(path)), "", f"is not a path ({error})", "check the path") from None
    if len(content) > _MAX_TOML_BYTES:
        problem = f"has more than {_MAX_TOML_BYTES} bytes, too many for settings"
        raise ConfigError(str(path), "", problem, "check the path")
    try:
        return _parse_toml(content.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), "", f"is not UTF-8 (byte {error.start})", "save it as UTF-8") from None


def _parse_toml(text: str, source: str, key: str = "") -> dict[str, Any]:
    """key: the setting whose value the whole text is; "" for a file."""
    if any(line.count(".") > _MAX_DOTS for line in text.splitlines()):  # tomllib's time grows with their square
        raise ConfigError(source, key, f"has a line with more than {_MAX_DOTS} dots", "write shorter keys")
    try:
        value = tomllib.loads(text)
        too_deep = strict_json.is_too_deep(value)
    except tomllib.TOMLDecodeError as error:
        raise _NotToml(source, key, f"is not TOML ({_one_line(error)})", "correct that line") from None
    except RecursionError:
        too_deep, value = True, {}
    except ValueError:  # Python does not parse whole numbers of thousands of digits
        raise ConfigError(source, key, "has a number with thousands of digits", "write a smaller one") from None
    if too_deep:
        problem = f"nests lists or tables more than {strict_json.MAX_DEPTH} deep"
        raise ConfigError(source, key, problem, "use fewer brackets") from None
    if place := strict_json.find_not_finite(value):
        raise ConfigError(source, key or place, "is not a finite number", "write a number such as 1")
    return value


def override(record: T, assignments: Mapping[str, str], source: str = "--set") -> T:
    """Apply assignments such as `{"search.num_trials": "10"}` to a record. Values are TOML; a bare word is a string."""
    plain = to_plain(record)
    for key, text in assignments.items():
        _assign(plain, key.split("."), parse_setting(text, key, source), key, source)
    return from_plain(type(record), plain, source)


def parse_setting(text: str, key: str, source: str = "--set") -> Any:
    """The value of one `--set KEY=VALUE`, parsed as TOML; the text itself if it is not TOML."""
    try:
        found = _parse_toml(f"value = {text}", source, key)
    except _NotToml:
        return text
    if len(found) > 1:  # a line break, and then another key
        raise ConfigError(source, key, f"{shown(text)} sets more than one value", "use one --set for each")
    return found["value"]


def _assign(plain: Any, path: Sequence[str], value: Any, key: str, source: str) -> None:
    parent = plain
    for name in path[:-1]:
        parent = parent.get(name) if isinstance(parent, dict) else None
    if not isinstance(parent, dict):
        raise ConfigError(source, key, "no such key", f"the keys here are: {', '.join(sorted(plain))}")
    if path[-1] not in parent and parent is plain:
        raise ConfigError(source, key, "unknown key", f"the keys here are: {', '.join(sorted(plain))}")
    if path[-1] == "kind":  # another variant: its fields start from their defaults
        parent.clear()
    parent[path[-1]] = value


def _explain(error: ValidationError, source: str, record_type: type[object]) -> ConfigError:
    """One error for all that is wrong with a record, in one line."""
    found: dict[str, _Problem] = {}
    for detail in _useful(error):
        problem = _problem(detail, error, record_type)
        found.setdefault(problem.key, problem)  # of a union, the first variant's
    problems = [each for problem in found.values() for each in _by_line(problem)]
    problems = _with_unknown_keys_together(problems)
    if len(problems) == 1:
        return ConfigError(source, problems[0].key, problems[0].text, problems[0].remedy)
    listed = [f"({i}) {printable(p.key)}: {p.text}; {p.remedy}" for i, p in enumerate(problems, start=1)]
    return ConfigError(source, "", f"{len(problems)} problems", " ".join(listed))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Problem:
    key: str
    text: str
    remedy: str  # "": the text has it


def _by_line(problem: _Problem) -> list[_Problem]:
    """The problems of a record's own check, which has a line for each field, with the remedy in it."""
    if problem.remedy:
        return [problem]
    parts = [line.partition("; ") for line in problem.text.splitlines()]
    return [_Problem(key=problem.key, text=text, remedy=remedy or "change the value") for text, _, remedy in parts]


def _problem(detail: Any, error: ValidationError, record_type: type[object]) -> _Problem:
    classes = _adapter(record_type).json_schema().get("$defs", {})
    place = [str(part) for part in detail["loc"]]
    # For a union, pydantic adds the name of the class that it tried.
    key = ".".join(part for number, part in enumerate(place) if not number or part not in classes)
    if detail["type"] == "json_invalid":
        return _Problem(key=key, text=f"cannot be read ({detail['ctx']['error']})", remedy="use a plain value")
    if detail["type"] == "unexpected_keyword_argument":
        siblings = _sibling_keys(record_type, detail["loc"])
        remedy = f"the keys here are: {', '.join(siblings)}" if siblings else "remove it or check the spelling"
        return _Problem(key=key, text=_UNKNOWN_KEY, remedy=remedy)
    if detail["type"] == "literal_error" and detail["loc"][-1] == "kind":
        kinds = [p["ctx"]["expected"] for p in error.errors(include_url=False) if p["loc"][-1] == "kind"]
        return _Problem(
            key=key, text=f"there is no {shown(detail['input'])}", remedy=f"write one of {', '.join(kinds)}"
        )
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if detail["type"] == "value_error":
        return _Problem(key=key, text=message, remedy="")
    if detail["type"] == "missing_keyword_only_argument" or detail["type"] == "missing":
        return _Problem(key=key, text="is missing", remedy="add it")
    remedy = message[0].lower() + message[1:]
    if detail["type"] == "string_type" and type(detail["input"]) in (int, float):
        remedy = _text_for_number(record_type, detail["loc"], detail["input"]) or remedy
    return _Problem(key=key, text=f"{shown(detail['input'])} does not fit", remedy=remedy)


def _with_unknown_keys_together(problems: Sequence[_Problem]) -> list[_Problem]:
    """The problems; unknown keys with the same remedy, which lists the known ones, become one."""
    unknown: dict[str, list[str]] = {}
    for problem in problems:
        if problem.text == _UNKNOWN_KEY:
            unknown.setdefault(problem.remedy, []).append(problem.key)
    joined = [
        _Problem(key=", ".join(keys), text=_UNKNOWN_KEY + "s" * (len(keys) > 1), remedy=remedy)
        for remedy, keys in unknown.items()
    ]
    return [*joined, *(problem for problem in problems if problem.text != _UNKNOWN_KEY)]


def _text_for_number(record_type: type[object], place: Sequence[int | str], value: float) -> str:
    """The remedy that a record's class has for a number where text belongs; "" if it has none."""
    owner: Any = record_type
    for name in place[:-1]:
        owner = get_type_hints(owner).get(str(name)) if is_dataclass(owner) else None
    remedy = getattr(owner, "text_for_number", None)
    return str(remedy(str(place[-1]), value)) if remedy else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _useful(error: ValidationError) -> list[Any]:
    """The useful problems. Of a union, they are those of the variant with the given `kind`; the others report only
    another kind."""
    problems = error.errors(include_url=False)
    wrong_kind = {p["loc"][:-1] for p in problems if p["type"] == "literal_error" and p["loc"][-1] == "kind"}
    useful = [p for p in problems if p["loc"][:-1] not in wrong_kind]
    return useful or problems[:1]


def _sibling_keys(record_type: type[object], place: tuple[int | str, ...]) -> list[str]:
    """The field names allowed in place of an unknown key."""
    schema = _adapter(record_type).json_schema()
    definitions = schema.get("$defs", {})
    here: Any = schema
    for part in place[:-1]:
        here = definitions.get(part) if part in definitions else here.get("properties", {}).get(part, {})
        if "$ref" in here:
            here = definitions[cast(str, here["$ref"]).rsplit("/", 1)[-1]]
    return sorted(here.get("properties", {}))
