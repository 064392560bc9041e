"""Read the machine's clocks, heat and load before and after a measurement, and decide whether it was steady.

Linux reports most of it; what a platform does not report is None. Paths are under `root`, so that tests can read a
copy.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from deploypipe.benchmark.gpu_state import read_gpu
from deploypipe.records import Conditions, MachineState, Names

_GPU_QUERY = "clocks.sm,temperature.gpu,clocks_throttle_reasons.active"
# NVML's nvmlClocksEventReason bits that mean 'slower than possible'; idle clocks and user-set clocks do not count.
_GPU_SLOWDOWNS = {
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
_SECONDS = 10.0  # for nvidia-smi to answer
_MIN_CLOCK = 0.9  # of the clock before
_MAX_STOLEN = 0.01  # share of the processors' time
_MAX_OF_FREE = 0.5  # share that others may use of the processors that the measurement leaves free
_ALLOWANCE = 0.1  # processors, for the system itself
MIN_SECONDS = 0.5  # counters tick a hundred times a second


def read_state(root: Path = Path("/")) -> MachineState:
    """Read the machine's state now."""
    busy, stolen = parse_stat(_read(root / "proc/stat"))
    clocks = _numbers(root, "sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")
    zones = _numbers(root, "sys/class/thermal/thermal_zone*/temp")
    throttles = _numbers(root, "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count")
    gpu_clock, gpu_temperature, slowdowns = _read_gpu()
    return MachineState(
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        clock_mhz=max(clocks) / 1e3 if clocks else None,
        temperature_c=max(zones) / 1e3 if zones else None,
        num_throttled=int(sum(throttles)) if throttles else None,
        num_quota_throttled=_quota_throttled(root),
        busy_s=busy,
        stolen_s=stolen,
        own_s=sum(os.times()[:4]),
        at_s=time.monotonic(),
        gpu_clock_mhz=gpu_clock,
        gpu_temperature_c=gpu_temperature,
        gpu_slowdowns=slowdowns,
    )


def judge_conditions(
    before: MachineState, after: MachineState, *, num_cpus: int, num_threads: int, unsteady: Sequence[str]
) -> Conditions:
    """Decide whether figures measured between two states can be trusted.

    unsteady: reasons found in the timings themselves. Throttled: heat, power or a quota slowed the machine down. Noisy:
    other processes used it, or the timings scatter. If it is both, the verdict is throttled.
    """
    elapsed = after.at_s - before.at_s
    capacity = elapsed * num_cpus
    is_long = elapsed >= MIN_SECONDS
    busy, stolen = _grown(before.busy_s, after.busy_s), _grown(before.stolen_s, after.stolen_s)
    others = max(0.0, (busy - (after.own_s - before.own_s)) / elapsed) if is_long and busy is not None else None
    share = stolen / capacity if is_long and stolen is not None else None
    throttled, noisy = _find_throttling(before, after), list(unsteady)
    free = max(0, num_cpus - num_threads)
    if others is not None and others > _MAX_OF_FREE * free + _ALLOWANCE:
        noisy.append(
            f"other processes kept {others:.1f} of {num_cpus} processors busy, and {num_threads} "
            f"{'was' if num_threads == 1 else 'were'} needed here"
        )
    if share is not None and share > _MAX_STOLEN:
        noisy.append(f"the hypervisor gave {share:.1%} of the processors' time to others")
    return Conditions(
        before=before,
        after=after,
        other_cpus=others,
        stolen_share=share,
        verdict="throttled" if throttled else "noisy" if noisy else "steady",
        reasons=(*throttled, *noisy),
    )


def parse_stat(text: str) -> tuple[float | None, float | None]:
    """/proc/stat -> processor seconds (busy, stolen) since boot; (None, None) for anything else."""
    fields = text.partition("\n")[0].split()
    if len(fields) < 9 or fields[0] != "cpu":
        return None, None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(f) for f in fields[1:9])
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / tick, steal / tick


def parse_throttled(text: str) -> int | None:
    """A control group's cpu.stat -> how often its quota stopped it; None if it does not say."""
    match = re.search(r"^nr_throttled (\d+)$", text, re.MULTILINE)
    return int(match[1]) if match else None


def parse_nvidia_smi(line: str) -> tuple[float | None, float | None, Names]:
    """`1980, 45, 0x0000000000000004` -> MHz, degrees, slowdowns; the first line if there are several GPUs."""
    cells = [cell.strip() for cell in line.partition("\n")[0].split(",")]
    if len(cells) != 3:
        return None, None, ()
    try:
        bits = int(cells[2], 16)
    except ValueError:  # [N/A]
        bits = 0
    return _number(cells[0]), _number(cells[1]), name_slowdowns(bits)


def name_slowdowns(bits: int) -> Names:
    return tuple(why for bit, why in _GPU_SLOWDOWNS.items() if bits & bit)


def _read_gpu() -> tuple[float | None, float | None, Names]:
    """MHz, degrees and slowdowns by NVML, or by nvidia-smi where the library cannot be loaded."""
    state = read_gpu()
    if state is None:
        return parse_nvidia_smi(_ask_nvidia_smi())
    return state.clock_mhz, state.temperature_c, name_slowdowns(state.slowdown_bits or 0)


def _find_throttling(before: MachineState, after: MachineState) -> list[str]:
    found = []
    if heat := _grown(before.num_throttled, after.num_throttled):
        found.append(f"heat slowed the processor down {heat:.0f} times")
    if quota := _grown(before.num_quota_throttled, after.num_quota_throttled):
        found.append(f"the control group's processor quota stopped this process {quota:.0f} times")
    if before.clock_mhz and after.clock_mhz and after.clock_mhz < _MIN_CLOCK * before.clock_mhz:
        found.append(f"the clock fell from {before.clock_mhz:.0f} to {after.clock_mhz:.0f} MHz")
    found += [f"GPU: {why}" for why in after.gpu_slowdowns]
    return found


def _grown(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else max(0.0, after - before)


def _quota_throttled(root: Path) -> int | None:
    """How often a quota stopped this process's control group (version 2, or version 1 as a container sees it)."""
    own = re.search(r"^0::/(.*)$", _read(root / "proc/self/cgroup"), re.MULTILINE)
    folder = root / "sys/fs/cgroup"
    places = [folder / own[1] / "cpu.stat"] if own else []
    for place in (*places, folder / "cpu.stat", folder / "cpu/cpu.stat"):
        if (count := parse_throttled(_read(place))) is not None:
            return count
    return None


def _ask_nvidia_smi() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", f"--query-gpu={_GPU_QUERY}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _numbers(root: Path, pattern: str) -> list[float]:
    """The numbers in all matching files; a zone that is switched off cannot be read."""
    return list(_finite(_number(_read(path).strip()) for path in sorted(root.glob(pattern))))


def _finite(values: Iterable[float | None]) -> Iterable[float]:
    return (value for value in values if value is not None)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
