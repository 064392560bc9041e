"""The facts that a tracker gets about a run: its name, parameters, figures and end."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deploypipe.text import strict_json


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    name: str
    parameters: Mapping[str, str]  # of recipe and target, by dotted names
    folder: Path  # of the run; what continues a tracked run is kept there


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    name: str
    value: float
    step: int | None = None  # of a series: a trial or an epoch; None: one value a run, the last one counts


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    status: Literal["FINISHED", "FAILED", "KILLED"]
    texts: Mapping[str, str]  # verdict and reason, or the error


def flat_parameters(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every leaf of plain data; a list counts as one leaf. What is unset is left out."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from flat_parameters(inner, f"{key}.{name}" if key else str(name))
    elif value not in (None, "", []):
        plain = "".join(c if c.isalnum() or c in "_-. /" else "_" for c in key)
        yield plain, value if isinstance(value, str) else strict_json.dumps(value)
