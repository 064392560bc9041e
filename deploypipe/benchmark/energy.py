"""Measure the energy of one run with the platform's meter: RAPL (x86), NVML or nvidia-smi (GPU), tegrastats (board).

Counters are read; powers are sampled and multiplied by time. A meter includes everything that runs on its device.
"""

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from deploypipe.benchmark.bench_results import Energy
from deploypipe.runtimes import Array, Session, is_installed
from deploypipe.target import Target

_IDLE_SECONDS = 1.0
_MIN_SECONDS = 2.0  # of running: counters and samples come every 1 to 100 ms
_MIN_RUNS = 3
_SAMPLE_SECONDS = 0.1
# Rails of the whole board, as Jetsons name them; the first one that exists counts.
_RAILS = ("VDD_IN", "VIN_SYS_5V0", "POM_5V_IN", "VIN")

Joules = Callable[[], float]  # since the meter was opened


@dataclass(frozen=True, kw_only=True, slots=True)
class Meter:
    source: str
    open: Callable[[], AbstractContextManager[Joules]]


def find_meter(target: Target, root: Path = Path("/")) -> tuple[Meter | None, str]:
    """(meter, "") for the device that does the work for `target`, or (None, why there is none)."""
    if shutil.which("tegrastats"):
        return Meter(source="tegrastats, whole board", open=_tegrastats), ""
    if target.needs_gpu:
        return _find_gpu_meter()
    return _find_rapl(root)


def measure_energy(session: Session, inputs: Mapping[str, Array], meter: Meter) -> Energy:
    """Run a loaded and warm file for a few seconds. Raises what `Session.run` raises."""
    with meter.open() as joules:
        idle_begun, idle_from = time.perf_counter(), joules()
        time.sleep(_IDLE_SECONDS)
        begun, spent_idle = time.perf_counter(), joules()
        count = 0
        while count < _MIN_RUNS or time.perf_counter() - begun < _MIN_SECONDS:
            session.run(inputs)
            count += 1
        ended, spent = time.perf_counter(), joules()
    return Energy(
        energy_mj=1e3 * (spent - spent_idle) / count,
        power_w=(spent - spent_idle) / (ended - begun),
        idle_power_w=(spent_idle - idle_from) / (begun - idle_begun),
        source=meter.source,
        num_runs=count,
    )


# --- RAPL -------------------------------------------------------------------------------------------------------------


def _find_rapl(root: Path) -> tuple[Meter | None, str]:
    folder = root / "sys/class/powercap"
    packages = [
        zone for zone in sorted(folder.glob("intel-rapl:*")) if _read_name(zone).startswith("package-")
    ]  # AMD's counters go by the same name
    if not packages:
        return None, "the processor has no energy counter (no package in /sys/class/powercap); is it a virtual machine?"
    try:
        _read_joules(packages[0])
    except OSError as error:
        return None, f"{packages[0] / 'energy_uj'} cannot be read ({error.strerror}); run as root, or allow reading it"
    return Meter(source=f"RAPL, {len(packages)} package(s)", open=lambda: _rapl(packages)), ""


@contextmanager
def _rapl(packages: list[Path]) -> Iterator[Joules]:
    spans = [float((zone / "max_energy_range_uj").read_text()) / 1e6 for zone in packages]
    last = [_read_joules(zone) for zone in packages]
    total = 0.0

    def joules() -> float:
        nonlocal total
        for i, zone in enumerate(packages):
            now = _read_joules(zone)
            total += grown(last[i], now, spans[i])
            last[i] = now
        return total

    yield joules


def grown(before: float, after: float, span: float) -> float:
    """Increase of a counter that wraps at `span`, at most once between two readings."""
    return after - before if after >= before else after - before + span


def _read_joules(zone: Path) -> float:
    return float((zone / "energy_uj").read_text()) / 1e6


def _read_name(zone: Path) -> str:
    try:
        return (zone / "name").read_text().strip()
    except OSError:
        return ""


# --- NVIDIA -----------------------------------------------------------------------------------------------------------


def _find_gpu_meter() -> tuple[Meter | None, str]:
    if is_installed("pynvml"):
        import pynvml

        try:
            pynvml.nvmlInit()
            pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByIndex(0))
            return Meter(source="NVML, GPU 0", open=_nvml), ""
        except pynvml.NVMLError:  # GPUs before Volta have no counter
            pass
    if shutil.which("nvidia-smi"):
        return Meter(source="nvidia-smi, GPU 0, sampled", open=_nvidia_smi), ""
    return None, "neither pynvml (pip install nvidia-ml-py) nor nvidia-smi is installed"


@contextmanager
def _nvml() -> Iterator[Joules]:
    import pynvml

    pynvml.nvmlInit()
    try:
        device = pynvml.nvmlDeviceGetHandleByIndex(0)
        begun = pynvml.nvmlDeviceGetTotalEnergyConsumption(device)
        yield lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(device) - begun) / 1e3
    finally:
        pynvml.nvmlShutdown()


def _nvidia_smi() -> AbstractContextManager[Joules]:
    milliseconds = str(round(1e3 * _SAMPLE_SECONDS))
    query = ["--query-gpu=power.draw", "--format=csv,noheader,nounits", "--id=0"]
    return _sampled(["nvidia-smi", *query, f"--loop-ms={milliseconds}"], parse_watts)


def parse_watts(line: str) -> float | None:
    """`72.35` (nvidia-smi's power.draw) -> watts; None for [N/A]."""
    try:
        return float(line)
    except ValueError:
        return None


# --- Jetson -----------------------------------------------------------------------------------------------------------


def _tegrastats() -> AbstractContextManager[Joules]:
    return _sampled(["tegrastats", "--interval", str(round(1e3 * _SAMPLE_SECONDS))], parse_tegrastats)


def parse_tegrastats(line: str) -> float | None:
    """`... VDD_IN 4998mW/5011mW ...` -> watts of the board now; older releases leave `mW` out. None without a rail."""
    for rail in _RAILS:
        if match := re.search(rf"\b{rail} (\d+)(?:mW)?/", line):
            return int(match[1]) / 1e3
    return None


@contextmanager
def _sampled(command: list[str], parse: Callable[[str], float | None]) -> Iterator[Joules]:
    """Run a program that prints a power regularly. Energy: mean power since the last reading, times the seconds."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    watts: list[float] = []

    def listen() -> None:
        for line in process.stdout or ():
            if (power := parse(line)) is not None:
                watts.append(power)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    total, seen, since = 0.0, 0, time.perf_counter()

    def joules() -> float:
        nonlocal total, seen, since
        now, count = time.perf_counter(), len(watts)
        if recent := watts[seen:count] or watts[-1:]:
            total += fmean(recent) * (now - since)
        seen, since = count, now
        return total

    try:
        yield joules
    finally:
        process.terminate()
        process.wait()
        listener.join()
