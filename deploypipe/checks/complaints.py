"""What a check found: complaints, notes, and what was tried."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from deploypipe.errors import DataError, DeploypipeError
from deploypipe.trees import leaves


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """One thing that was tried, as a row of a table."""

    what: str
    detail: str  # sizes, shapes and types
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckReport:
    """All that is wrong, each with what to write; what is worth knowing; what was tried."""

    complaints: tuple[str, ...]
    notes: tuple[str, ...]
    tried: tuple[Tried, ...]

    @property
    def is_ready(self) -> bool:
        return not self.complaints


@dataclass
class Findings:
    """A report in the making."""

    errors: list[DeploypipeError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tried: list[Tried] = field(default_factory=list)

    def add(self, error: DeploypipeError) -> None:
        if str(error) not in map(str, self.errors):
            self.errors.append(error)

    @contextmanager
    def trying(self, what: str, detail: str = "") -> Iterator[None]:
        """Note what the block raises, or that it went well."""
        begun, count = time.perf_counter(), len(self.errors)
        try:
            yield
        except DeploypipeError as error:
            self.add(error)
            return
        if len(self.errors) == count:
            self.tried.append(Tried(what=what, detail=detail, seconds=time.perf_counter() - begun))

    def went_well(self, what: str) -> bool:
        """Whether the last thing that was tried was this one, without a complaint."""
        return bool(self.tried) and self.tried[-1].what == what

    def report(self) -> CheckReport:
        return CheckReport(complaints=tuple(map(str, self.errors)), notes=tuple(self.notes), tried=tuple(self.tried))

    def raise_all(self) -> None:
        """The one error as it is, or several as one."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            lines = "".join(f"\n  {number}. {error}" for number, error in enumerate(self.errors, start=1))
            raise DataError(f"{len(self.errors)} things have to be put right first:{lines}")


def described(tree: Any, name: str = "inputs") -> str:
    """Shapes and types of a batch's members, short."""
    parts = [
        f"{tuple(leaf.value.shape)} {str(leaf.value.dtype).removeprefix('torch.')}"
        if isinstance(leaf.value, Tensor)
        else f"{leaf.value!r:.20}"
        for leaf in leaves(tree, name)
    ]
    return ", ".join(parts[:4]) + (", ..." if len(parts) > 4 else "")
