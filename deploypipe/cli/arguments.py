"""What the user names: targets, settings, shapes."""

from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

from deploypipe.errors import ConfigError
from deploypipe.files.json_records import load_toml
from deploypipe.runtimes.provider_options import require_harmless_options
from deploypipe.target import Target
from deploypipe.text.safe_names import name_problem
from deploypipe.untrusted_files.onnx_file_check import MAX_RANK

_MAX_DIGITS = 15  # of a size in a shape


def load_target(name: str) -> Target:
    """The target at a path, or of a bare name; it is named after its file unless it names itself."""
    if name.endswith(".toml") or "/" in name:
        path = Path(name)
    elif found := named_targets().get(name):
        path = found
    else:
        known = ", ".join(sorted(named_targets())) or "none is here"
        raise ConfigError(name, "", "no target of this name", f"give a TOML file, or one of: {known}")
    target = load_toml(Target, path)
    require_harmless_options(target)
    if target.name:
        return target
    require_name(path.stem, str(path), "a target is named after its file, and")
    return replace(target, name=path.stem)


def require_name(name: str, source: str, key: str = "") -> None:
    """ConfigError, naming where the name comes from, unless it may become a folder or a tag."""
    problem, _, remedy = name_problem(name).partition("; ")
    if problem:
        raise ConfigError(source, "", f"{key} {problem}".strip(), remedy)


def named_targets() -> dict[str, Path]:
    """Bare name -> file. What lies in the working folder hides what lies beside the package."""
    folders = (Path(__file__).parents[2] / "targets", Path("targets"))
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml"))}


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


def parse_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """`--shape` texts, NAME=1x128 (NAME= for a scalar)."""
    shapes = {}
    for text in texts:
        name, _, sizes = text.rpartition("=")
        parts = sizes.split("x") if sizes else []
        is_plain = len(parts) <= MAX_RANK and all(part.isdecimal() and len(part) <= _MAX_DIGITS for part in parts)
        if not name or not is_plain or not all(map(int, parts)):
            raise ConfigError("--shape", text, "is no shape", "write it like --shape input_ids=1x128")
        shapes[name] = tuple(map(int, parts))
    return shapes


def template(name: str) -> str:
    return (resources.files("deploypipe") / "templates" / name).read_text(encoding="utf-8")
