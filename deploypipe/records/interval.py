"""A figure with its confidence interval."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from math import isfinite
from typing import Literal, TypeAlias



@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A confidence interval around a measured value, in the value's own unit."""

    value: float
    low: float
    high: float
    confidence: float = 0.95
