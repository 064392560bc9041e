"""Note the pipeline and target of a run when it begins, for `deploypipe runs`: an interrupted run has no result."""

from dataclasses import dataclass
from pathlib import Path

from deploypipe.errors import ConfigError
from deploypipe.files.atomic import write_atomically
from deploypipe.files.json_records import from_json, to_json

ABOUT = "run.about"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunAbout:
    """The run that a folder belongs to."""

    pipeline: str = ""
    target: str = ""
    is_fast_dev_run: bool = False


def write_about(folder: Path, about: RunAbout) -> None:
    write_atomically(folder / ABOUT, to_json(about).encode())


def read_about(folder: Path) -> RunAbout:
    """The record; an empty one if the folder has none that can be read."""
    try:
        return from_json(RunAbout, (folder / ABOUT).read_bytes(), str(folder / ABOUT))
    except (OSError, ConfigError):
        return RunAbout()
