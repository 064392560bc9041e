"""Find and read a target's file, by its path or by its name."""

from dataclasses import replace
from pathlib import Path

from deploypipe.errors import ConfigError
from deploypipe.files.json_records import load_toml
from deploypipe.provider_options import require_harmless_options
from deploypipe.shipped_examples import shipped_folder
from deploypipe.target import Target
from deploypipe.text.safe_names import name_problem


def load_target(target: str | Path) -> Target:
    """Read the target at a path (`my/board.toml`) or of a bare name (`x86_cpu`).

    A bare name is looked up in targets/ of the working folder, then among the targets that come with deploypipe. The
    target is named after its file unless the file names it. Raises ConfigError.
    """
    name = str(target)
    if isinstance(target, Path) or name.endswith(".toml") or "/" in name:
        path = Path(target)
    elif found := named_targets().get(name):
        path = found
    else:
        known = ", ".join(sorted(named_targets())) or "none is here"
        raise ConfigError(name, "", "no target of this name", f"give a TOML file, or one of: {known}")
    loaded = load_toml(Target, path)
    require_harmless_options(loaded)
    if loaded.name:
        return loaded
    problem, _, remedy = name_problem(path.stem).partition("; ")
    if problem:
        raise ConfigError(str(path), "", f"a target is named after its file, but {problem}", remedy)
    return replace(loaded, name=path.stem)


def named_targets() -> dict[str, Path]:
    """Bare name -> file. A target in the working folder hides one of the same name that comes with deploypipe."""
    folders = (shipped_folder("targets"), Path("targets"))
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml"))}
