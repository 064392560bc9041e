"""Progress of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One step of a long piece of work, for whoever shows progress."""

    stage: str
    done: int = 0
    total: int = 0  # 0: length unknown
    message: str = ""


Progress: TypeAlias = Callable[[Event], None]


def silent(event: Event) -> None:
    """The default listener: shows nothing."""
