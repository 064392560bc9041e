"""Read what the user typed: settings, shapes, names of runs and searches."""

from collections.abc import Sequence

from deploypipe.errors import ConfigError
from deploypipe.text.safe_names import name_problem
from deploypipe.untrusted_files.onnx_file_check import MAX_RANK

_MAX_DIGITS = 15  # of a size in a shape


def require_name(name: str, source: str, key: str = "") -> None:
    """ConfigError, naming where the name comes from, unless it may become a folder or a tag."""
    problem, _, remedy = name_problem(name).partition("; ")
    if problem:
        raise ConfigError(source, "", f"{key} {problem}".strip(), remedy)


def split_settings(texts: Sequence[str], *, targets: bool = True) -> dict[str, dict[str, str]]:
    """`--set` texts, by what they change: the target (where there is one), the module's constants, or the recipe."""
    settings: dict[str, dict[str, str]] = {"target": {}, "pipeline": {}, "recipe": {}}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError("--set", text, "is not KEY=VALUE", "write it like --set search.num_trials=4")
        owner, _, rest = key.partition(".")
        if owner == "target" and not targets:
            raise ConfigError("--set", key, "there is no target here", "leave it out, or give it to `deploypipe run`")
        if owner in ("target", "pipeline") and rest:
            settings[owner][rest] = value
        else:
            settings["recipe"][key] = value
    return settings


def with_search_bounds(texts: Sequence[str], trials: int | None, minutes: float | None) -> list[str]:
    """`--set` texts with those that `--trials` and `--minutes` stand for; ConfigError if one field is given twice."""
    bounds = {"trials": ("search.num_trials", trials), "minutes": ("search.max_minutes", minutes)}
    added = []
    for option, (key, value) in bounds.items():
        if value is None:
            continue
        if any(text.partition("=")[0] == key for text in texts):
            raise ConfigError(f"--{option}", "", f"is given together with --set {key}", "give one of them")
        added.append(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}")
    return [*texts, *added]


def parse_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """`--shape` texts, NAME=1x128 (NAME= for a scalar)."""
    shapes = {}
    for text in texts:
        name, _, sizes = text.rpartition("=")
        parts = sizes.split("x") if sizes else []
        is_plain = len(parts) <= MAX_RANK and all(part.isdecimal() and len(part) <= _MAX_DIGITS for part in parts)
        if not name or not is_plain or not all(map(int, parts)):
            raise ConfigError("--shape", text, "is not a shape", "write it like --shape input_ids=1x128")
        shapes[name] = tuple(map(int, parts))
    return shapes
