"""What one device is and what it allows: `targets/*.toml`."""

import re
from dataclasses import dataclass, field, fields
from typing import Literal

RELATIVE = "x"
_LIMIT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*")

# The units a budget may be given in, with the factor to the unit it is kept in (the one in the record's field names).
UNITS: dict[str, dict[str, float]] = {
    "latency_p50": {"ms": 1.0, "us": 1e-3, "s": 1e3},
    "peak_memory": {"MiB": 1.0, "KiB": 1 / 1024, "GiB": 1024.0},
    "file_size": {"MiB": 1.0, "KiB": 1 / 1024, "GiB": 1024.0},
    "params": {"k": 1e3, "M": 1e6, "G": 1e9},
    "macs": {"k": 1e3, "M": 1e6, "G": 1e9},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """An upper bound: `value` in the base unit of its budget, or as a fraction of the dense model's figure."""

    value: float
    is_relative: bool

    def absolute(self, dense: float) -> float:
        """The bound in the base unit, given the dense model's own figure."""
        return self.value * dense if self.is_relative else self.value


def parse_limit(name: str, text: str) -> Limit:
    """`"0.5x"` or `"4.0 ms"` -> Limit. Raises ValueError saying which units `name` takes."""
    units = UNITS[name]
    match = _LIMIT.fullmatch(text)
    if not match or match[2] not in {RELATIVE, *units}:
        example = f"'0.5x' of the dense model or '4 {next(iter(units))}'"
        problem = f"{name} = {text!r} is not a number with a unit"
        raise ValueError(f"{problem}; write {example} (units: x, {', '.join(units)})")
    number = float(match[1])
    if number <= 0:
        raise ValueError(f"{name} = {text!r} allows nothing; a budget is above zero")
    if match[2] == RELATIVE:
        return Limit(value=number, is_relative=True)
    return Limit(value=number * units[match[2]], is_relative=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Upper bounds the compressed model must meet. None: no bound.

    All but the accuracy take `"0.5x"` (of the dense model, measured in the same run) or a number with a unit.
    """

    latency_p50: str | None = None
    peak_memory: str | None = None
    file_size: str | None = None
    params: str | None = None
    macs: str | None = None
    accuracy_drop_pp: float = 1.0  # percentage points; the upper end of the paired interval must stay below

    def __post_init__(self) -> None:
        self.limits()
        if self.accuracy_drop_pp < 0:
            raise ValueError(f"accuracy_drop_pp = {self.accuracy_drop_pp} asks for a gain; write 0 or more")

    def limits(self) -> dict[str, Limit]:
        """The bounds that are set, by budget name."""
        texts = {f.name: getattr(self, f.name) for f in fields(self) if f.name in UNITS}
        return {name: parse_limit(name, text) for name, text in texts.items() if text is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One device."""

    runtime: Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
    name: str = ""  # the file's stem, when it came from a file
    description: str = ""
    precisions: tuple[Literal["fp32"], ...] = ("fp32",)
    batch_size: int = 1
    num_threads: int = 1
    channel_multiple: int = 1  # widths are kept at multiples of this
    num_latency_samples: int = 400  # at least; timed runs per file
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        least_values = {"batch_size": 1, "num_threads": 1, "channel_multiple": 1, "num_latency_samples": 200}
        for key, least in least_values.items():
            if getattr(self, key) < least:
                raise ValueError(f"{key} = {getattr(self, key)} is too small; write {least} or more")
