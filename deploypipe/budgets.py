"""The budgets: one row for each figure of a model that a target can limit.

The target, the gate, the search, the report and the tables all read `BUDGETS`. To add a budget, add a row here and a
field of the same name to `deploypipe.target.Budget`. A figure that nothing measures yet also needs a field of
`Measurement` and of `Candidate`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from deploypipe.records import BenchmarkReport, Candidate, Interval, Measurement

# How a search knows a figure before the candidate's file exists.
Predictor: TypeAlias = Literal["latency_model", "mac_count", "param_count", "params_in_file"]

LATENCY_P50, PEAK_MEMORY, MACS = "latency_p50", "peak_memory", "macs"  # those with code of their own

_MIB_UNITS = {"MiB": 1.0, "KiB": 1 / 1024, "GiB": 1024.0}
_COUNT_UNITS = {"k": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetRow:
    """One figure that a target can limit. A reader returns None for what was not measured."""

    name: str  # in a target's [budget], in a check and in a search's records
    label: str  # for people
    unit: str  # of the figure; "" for a count
    units: Mapping[str, float]  # that a target may use -> factor to the figure
    source: Literal["timed", "measured", "counted"]  # timed, measured: only where the target runs; counted: anywhere
    of_measurement: Callable[[Measurement], Interval | float | None]  # an interval: its upper end decides
    of_candidate: Callable[[Candidate], float | None]
    ratio: Callable[[BenchmarkReport], Interval | None] | None = None  # compressed / dense; None: no interval is known
    predictor: Predictor | None = None  # None: a search knows the figure only once the candidate is measured
    margin: float = 0.0  # share of the limit that a search leaves free, because the gate measures once more
    is_in_overview: bool = True  # whether the table of several targets has a column for it

    def value(self, measurement: Measurement) -> float | None:
        """The figure alone, without its interval."""
        figure = self.of_measurement(measurement)
        return figure.value if isinstance(figure, Interval) else figure


_ROWS = (
    BudgetRow(
        name=LATENCY_P50,
        label="latency p50",
        unit="ms",
        units={"ms": 1.0, "us": 1e-3, "s": 1e3},
        source="timed",
        of_measurement=lambda m: m.latency.p50_ms if m.latency else None,
        of_candidate=lambda c: c.latency_p50_ms,
        ratio=lambda report: report.latency_ratio,
        predictor="latency_model",
        margin=0.03,
    ),
    BudgetRow(
        name=PEAK_MEMORY,
        label="peak memory",
        unit="MiB",
        units=_MIB_UNITS,
        source="measured",
        of_measurement=lambda m: m.peak_memory_mib,
        of_candidate=lambda c: c.peak_memory_mib,
        margin=0.05,
    ),
    BudgetRow(
        name="file_size",
        label="file size",
        unit="MiB",
        units=_MIB_UNITS,
        source="counted",
        of_measurement=lambda m: m.file.size_bytes / 2**20,
        of_candidate=lambda c: c.file_size_mib,
        predictor="params_in_file",
    ),
    BudgetRow(
        name="params",
        label="parameters",
        unit="",
        units=_COUNT_UNITS,
        source="counted",
        of_measurement=lambda m: m.num_params,
        of_candidate=lambda c: c.num_params,
        predictor="param_count",
        is_in_overview=False,  # file size says nearly the same, and the terminal is narrow
    ),
    BudgetRow(
        name=MACS,
        label="MACs",
        unit="",
        units=_COUNT_UNITS,
        source="counted",
        of_measurement=lambda m: m.num_macs,
        of_candidate=lambda c: c.num_macs,
        predictor="mac_count",
    ),
)
BUDGETS: Mapping[str, BudgetRow] = {row.name: row for row in _ROWS}


def figures(measurement: Measurement) -> dict[str, float | None]:
    """Every figure of a measurement, by the name of its budget."""
    return {name: row.value(measurement) for name, row in BUDGETS.items()}
