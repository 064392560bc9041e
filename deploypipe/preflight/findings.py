"""The result of a check: complaints, notes, and what was tried."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from deploypipe.errors import DataError, DeploypipeError
from deploypipe.networks.batch_trees import leaves

_SPLIT = re.compile(r"\bthe (calib|train|val|test) split")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """One thing that was tried, as a row of a table."""

    what: str
    detail: str  # sizes, shapes and types
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckReport:
    """complaints: problems with their remedies. notes: worth knowing. tried: the checks that passed."""

    complaints: tuple[str, ...]
    notes: tuple[str, ...]
    tried: tuple[Tried, ...]

    @property
    def is_ready(self) -> bool:
        return not self.complaints


@dataclass
class Findings:
    """Collects errors and notes for a `CheckReport`."""

    errors: list[DeploypipeError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tried: list[Tried] = field(default_factory=list)
    count: int = 0  # of all that was wrong
    first_of_text: dict[str, DeploypipeError] = field(default_factory=dict)  # key: the text without names of splits

    def add_if(self, error: DeploypipeError | None) -> None:
        if error is not None:
            self.add(error)

    def add(self, error: DeploypipeError) -> None:
        """Add an error. The same problem of several splits becomes one complaint."""
        self.count += 1
        key = _SPLIT.sub("", str(error))
        first = self.first_of_text.setdefault(key, error)
        if first is error:
            self.errors.append(error)
        elif (split := _SPLIT.search(str(error))) and f" {split[1]} split" not in str(first):
            first.args = (f"{first} (and the {split[1]} split)",)

    @contextmanager
    def trying(self, what: str, detail: str = "") -> Iterator[None]:
        """Record the DeploypipeError that the block raises, or that it succeeded."""
        begun, count = time.perf_counter(), self.count
        try:
            yield
        except DeploypipeError as error:
            self.add(error)
            return
        if self.count == count:
            self.tried.append(Tried(what=what, detail=detail, seconds=time.perf_counter() - begun))

    def went_well(self, what: str) -> bool:
        """Whether the last check was this one and had no complaint."""
        return bool(self.tried) and self.tried[-1].what == what

    def report(self) -> CheckReport:
        return CheckReport(complaints=tuple(map(str, self.errors)), notes=tuple(self.notes), tried=tuple(self.tried))

    def raise_all(self) -> None:
        """Raise the only error as it is, or one error that lists several."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            lines = "".join(f"\n  {number}. {error}" for number, error in enumerate(self.errors, start=1))
            raise DataError(f"{len(self.errors)} problems; correct them and run again:{lines}")


def described(tree: Any, name: str = "inputs") -> str:
    """Shapes and types of a batch's first four members."""
    parts = [
        f"{tuple(leaf.value.shape)} {str(leaf.value.dtype).removeprefix('torch.')}"
        if isinstance(leaf.value, Tensor)
        else f"{leaf.value!r:.20}"
        for leaf in leaves(tree, name)
    ]
    return ", ".join(parts[:4]) + (", ..." if len(parts) > 4 else "")
