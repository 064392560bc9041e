"""The results of `deploypipe bench` as rows for the terminal."""

from collections.abc import Callable, Iterable, Sequence

from deploypipe.benchmark.bench_results import BenchResult, FileFigures, LayerTime, SweepPoint
from deploypipe.benchmark.latency import PERCENTILE_FLOORS
from deploypipe.records import Conditions, Interval, MachineState
from deploypipe.report.run_tables import NOT_MEASURED
from deploypipe.text.amounts import amount, bounded, mebibytes

Rows = list[tuple[str, ...]]
_NUM_LAYERS = 10
_LATENCY = "latency"
# Medians, in the words of trtexec.
_GPU_PARTS = (
    ("enqueue (host)", "enqueue_ms"),
    ("H2D", "h2d_ms"),
    ("GPU compute", "compute_ms"),
    ("D2H", "d2h_ms"),
    ("end to end (host)", "end_to_end_ms"),
)


def figure_rows(result: BenchResult) -> tuple[tuple[str, ...], Rows]:
    """Return heads and one row for each figure: of the file, and of the other file with the ratio of both."""
    files = [result.file, result.against] if result.against else [result.file]
    rows: Rows = []
    _add(rows, files, "file size", lambda f: (mebibytes(f.size_bytes), float(f.size_bytes)))
    if result.file.latency:
        _add_latency(rows, files, result)
        for name, part in _GPU_PARTS:
            _add(rows, files, f"  {name}", lambda f, part=part: _gpu_part(f, part))  # type: ignore[misc]
    _add(rows, files, "peak memory", _memory)
    _add(rows, files, "cold start", _cold_start)
    _add(rows, files, "  import of the runtime", lambda f: _milliseconds(f, "import_ms"))
    _add(rows, files, "  load", lambda f: _milliseconds(f, "load_ms"))
    _add(rows, files, "  first run", lambda f: _milliseconds(f, "first_run_ms"))
    _add(rows, files, "energy per run", _energy)
    heads = ("", "file", "against", "file / against") if result.against else ("", "file")
    return heads, [row[: len(heads)] for row in rows]


def layer_rows(layers: Sequence[LayerTime], most: int = _NUM_LAYERS) -> Rows:
    """List the slowest operators with their shares, and one row for all others."""
    rows: Rows = [(x.name, x.op_type, f"{x.time_us:.1f} us", f"{x.share:.1%}") for x in layers[:most]]
    if rest := layers[most:]:
        time_us, share = sum(x.time_us for x in rest), sum(x.share for x in rest)
        rows.append((f"{len(rest)} more", "", f"{time_us:.1f} us", f"{share:.1%}"))
    return rows


def sweep_rows(points: Sequence[SweepPoint], others: Sequence[SweepPoint], *, by_threads: bool) -> Rows:
    """One row for each batch size or number of threads; the columns of the other file follow if there is one."""
    rows: Rows = []
    for i, point in enumerate(points):
        cells = [str(point.num_threads if by_threads else point.batch_size), *_sweep_cells(point)]
        rows.append((*cells, *(_sweep_cells(others[i]) if others else ())))
    return rows


def condition_rows(conditions: Conditions) -> Rows:
    """Show the state of the machine before and after, as far as the platform reports it."""
    before, after = conditions.before, conditions.after
    rows: Rows = [("load average", f"{before.load:.2f}", f"{after.load:.2f}")]
    for name, read, unit in _STATES:
        values = read(before), read(after)
        if values != (None, None):
            rows.append((name, *("" if value is None else f"{value:.5g}{unit}" for value in values)))
    if conditions.other_cpus is not None:
        rows.append(("processors busy with others", "", f"{conditions.other_cpus:.2f}"))
    if conditions.stolen_share is not None:
        rows.append(("time stolen by the hypervisor", "", f"{conditions.stolen_share:.2%}"))
    return rows


def verdict_lines(result: BenchResult) -> list[str]:
    """State the comparison of both files, and the conditions."""
    lines = []
    if result.latency_ratio and result.comparison:
        ratio = result.latency_ratio
        why = f", as the machine was {result.conditions.verdict}" if result.comparison == "unknown" else ""
        lines.append(
            f"{result.comparison} at {ratio.confidence:.0%}{why}: the time is "
            f"{bounded(ratio.value, ratio.low, ratio.high, 'x')}"
        )
    lines.append("; ".join((f"conditions: {result.conditions.verdict}", *result.conditions.reasons)))
    return lines


def missing_lines(result: BenchResult) -> list[str]:
    """List the measurements that were asked for but not possible, with the reasons."""
    files = [result.file, *([result.against] if result.against else [])]
    return sorted({f"{part}: {NOT_MEASURED}: {reason}" for file in files for part, reason in file.missing.items()})


_STATES: tuple[tuple[str, Callable[[MachineState], float | None], str], ...] = (
    ("clock", lambda s: s.clock_mhz, " MHz"),
    ("temperature", lambda s: s.temperature_c, " C"),
    ("times slowed by heat", lambda s: s.num_throttled, " times"),
    ("times stopped by quota", lambda s: s.num_quota_throttled, " times"),
    ("GPU clock", lambda s: s.gpu_clock_mhz, " MHz"),
    ("GPU temperature", lambda s: s.gpu_temperature_c, " C"),
)


def _add(
    rows: Rows, files: Iterable[FileFigures], name: str, read: Callable[[FileFigures], tuple[str, float] | None]
) -> None:
    """Add a row, unless no file has the figure."""
    cells = [read(file) for file in files]
    if not any(cells):
        return
    texts = [cell[0] if cell else NOT_MEASURED for cell in cells]
    values = [cell[1] if cell else 0.0 for cell in cells]
    rows.append((name, *texts, amount(values[0] / values[1], "x") if len(values) == 2 and all(values) else ""))


def _add_latency(rows: Rows, files: Sequence[FileFigures], result: BenchResult) -> None:
    ratio = result.latency_ratio
    shown = bounded(ratio.value, ratio.low, ratio.high, "x") if ratio else ""
    latencies = [file.latency for file in files if file.latency]
    rows.append(("latency p50", *(_interval(latency.p50_ms) for latency in latencies), shown))
    for name, share in (("p90", 0.9), ("p99", 0.99)):
        intervals = [latency.p90_ms if share == 0.9 else latency.p99_ms for latency in latencies]
        few = f"needs {PERCENTILE_FLOORS[share]} samples, has {len(latencies[0].samples_ms)}"
        rows.append((f"latency {name}", *(_interval(i) if i else few for i in intervals), ""))
    rows.append(("samples", *(str(len(latency.samples_ms)) for latency in latencies), ""))
    rows.append(("throughput", *(amount(latency.throughput, "/s") for latency in latencies), ""))


def _memory(file: FileFigures) -> tuple[str, float] | None:
    return None if file.peak_memory_mib is None else (amount(file.peak_memory_mib, "MiB"), file.peak_memory_mib)


def _cold_start(file: FileFigures) -> tuple[str, float] | None:
    if file.cold_start is None:
        return None
    least, middle, most = file.cold_start.total_ms
    return f"{bounded(middle, least, most, 'ms')} in {file.cold_start.repeats} starts", middle


def _milliseconds(file: FileFigures, field: str) -> tuple[str, float] | None:
    if file.cold_start is None:
        return None
    value: float = getattr(file.cold_start, field)
    return amount(value, "ms"), value


def _gpu_part(file: FileFigures, part: str) -> tuple[str, float] | None:
    if file.gpu is None:
        return None
    value: float = getattr(file.gpu, part)
    return amount(value, "ms"), value


def _energy(file: FileFigures) -> tuple[str, float] | None:
    if file.energy is None:
        return None
    e = file.energy
    return f"{e.energy_mj:.4g} mJ ({e.power_w:.1f} W, idle {e.idle_power_w:.1f} W; {e.source})", e.energy_mj


def _interval(interval: Interval) -> str:
    return bounded(interval.value, interval.low, interval.high, "ms")


def _sweep_cells(point: SweepPoint) -> tuple[str, str]:
    if point.p50_ms is None or point.throughput is None:
        return NOT_MEASURED, point.reason
    return _interval(point.p50_ms), amount(point.throughput, "/s")
