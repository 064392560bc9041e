"""A figure with its confidence interval."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A confidence interval around a measured value, in the value's own unit."""

    value: float
    low: float
    high: float
    confidence: float = 0.95
