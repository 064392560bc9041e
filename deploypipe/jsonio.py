"""Records to JSON or TOML and back, as strict as a type checker. The only importer of pydantic."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from deploypipe.errors import ConfigError

T = TypeVar("T")


def to_plain(record: object) -> Any:
    """A record as JSON-ready dicts, lists, strings and numbers."""
    return TypeAdapter(type(record)).dump_python(record, mode="json")


def to_json(record: object) -> str:
    """A record as canonical JSON: sorted keys, so that equal records give equal bytes."""
    return json.dumps(to_plain(record), sort_keys=True)


def from_json(record_type: type[T], text: str | bytes, source: str) -> T:
    """JSON -> record. Unknown keys and wrong types raise ConfigError naming `source`, key, value and remedy."""
    try:
        return TypeAdapter(record_type).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        raise _explain(error, source, record_type) from None


def from_plain(record_type: type[T], value: object, source: str) -> T:
    """Plain data (parsed TOML, say) -> record, checked like `from_json`."""
    return from_json(record_type, json.dumps(value, default=str), source)


def load_toml(record_type: type[T], path: Path) -> T:
    """A TOML file -> record, checked like `from_json`."""
    return from_plain(record_type, read_toml(path), str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as plain data; ConfigError where it is absent or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), "", f"cannot be read ({error.strerror})", "check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), "", f"is not TOML ({error})", "fix the line named") from None


def override(record: T, assignments: Mapping[str, str], source: str = "--set") -> T:
    """`{"search.num_trials": "10"}` applied to a record. Values are TOML; a bare word is taken as a string."""
    plain = to_plain(record)
    for key, text in assignments.items():
        _assign(plain, key.split("."), _parse_value(text), key, source)
    return from_plain(type(record), plain, source)


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


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
    problem = _most_telling(error)
    place = [str(part) for part in problem["loc"]]
    key = ".".join(part for part in place if not part[:1].isupper())  # pydantic adds the class tried in a union
    if problem["type"] == "json_invalid":  # its value would be the whole text
        return ConfigError(source, key, f"is not JSON ({problem['ctx']['error']})", "check the path")
    if problem["type"] == "unexpected_keyword_argument":
        siblings = _keys_beside(record_type, problem["loc"])
        remedy = f"the keys here are: {', '.join(siblings)}" if siblings else "remove it or check the spelling"
        return ConfigError(source, key, "unknown key", remedy)
    if problem["type"] == "literal_error" and problem["loc"][-1] == "kind":
        kinds = [p["ctx"]["expected"] for p in error.errors(include_url=False) if p["loc"][-1] == "kind"]
        return ConfigError(source, key, f"there is no {problem['input']!r}", f"write one of {', '.join(kinds)}")
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if problem["type"] == "value_error":
        problem_text, _, remedy = message.partition("; ")
        return ConfigError(source, key, problem_text, remedy or "change the value")
    if problem["type"] == "missing_keyword_only_argument" or problem["type"] == "missing":
        return ConfigError(source, key, "is missing", "add it")
    return ConfigError(source, key, f"{problem['input']!r} does not fit", message[0].lower() + message[1:])


def _most_telling(error: ValidationError) -> Any:
    """Of a union, the variant whose `kind` was right has something to say; the others only say that it was wrong."""
    problems = error.errors(include_url=False)
    wrong_kind = {p["loc"][:-1] for p in problems if p["type"] == "literal_error" and p["loc"][-1] == "kind"}
    telling = [p for p in problems if p["loc"][:-1] not in wrong_kind]
    return (telling or problems)[0]


def _keys_beside(record_type: type[object], place: tuple[int | str, ...]) -> list[str]:
    """The field names allowed where an unknown key stood."""
    schema = TypeAdapter(record_type).json_schema()
    definitions = schema.get("$defs", {})
    here: Any = schema
    for part in place[:-1]:
        here = definitions.get(part) if part in definitions else here.get("properties", {}).get(part, {})
        if "$ref" in here:
            here = definitions[cast(str, here["$ref"]).rsplit("/", 1)[-1]]
    return sorted(here.get("properties", {}))
