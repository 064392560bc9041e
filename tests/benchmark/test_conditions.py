"""The output of Linux, nvidia-smi and tegrastats is parsed and judged; from text, since no test machine has all."""

import ctypes
import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finished_runs import finished_run

from deploypipe.benchmark import conditions, energy
from deploypipe.benchmark.conditions import (
    judge_conditions,
    name_slowdowns,
    parse_nvidia_smi,
    parse_stat,
    parse_throttled,
    read_state,
)
from deploypipe.benchmark.energy import Meter, find_meter, grown, measure_energy, parse_tegrastats, parse_watts
from deploypipe.benchmark.gpu_state import GpuState, read_nvml
from deploypipe.records import Conditions, MachineState
from deploypipe.report.html import render_report
from deploypipe.target import Target

STAT = """cpu  3834690 761182 634843 1813511 5490 10 1691 11996 0 0
cpu0 1808403 358041 297551 1059277 1246 0 267 5953 0 0
intr 1
"""
CPU_STAT = "usage_usec 12\nnr_periods 40\nnr_throttled 7\nthrottled_usec 99\n"
ORIN = (
    "11-21-2026 10:00:00 RAM 2448/7620MB (lfb 3x4MB) SWAP 0/3810MB (cached 0MB) CPU [3%@729,0%@729] EMC_FREQ 0% "
    "GR3D_FREQ 0% cpu@46.2C tj@47.4C VDD_IN 4998mW/5011mW VDD_CPU_GPU_CV 481mW/500mW VDD_SOC 1442mW/1450mW"
)
NANO = "RAM 1000/3956MB (lfb 1x4MB) CPU [1%@102] thermal@24.5C POM_5V_IN 1532/1532 POM_5V_GPU 0/0 POM_5V_CPU 160/160"
STATE = MachineState(
    load=0.1,
    clock_mhz=3000.0,
    temperature_c=50.0,
    num_throttled=3,
    num_quota_throttled=5,
    busy_s=100.0,
    stolen_s=1.0,
    own_s=10.0,
    at_s=1000.0,
)


def later(**changes: Any) -> MachineState:
    """Ten seconds on, during which this process kept one processor busy."""
    return replace(STATE, **{"at_s": 1010.0, "own_s": 20.0, "busy_s": 110.0, **changes})


def judged(after: MachineState, unsteady: tuple[str, ...] = ()) -> Conditions:
    return judge_conditions(STATE, after, num_cpus=4, num_threads=1, unsteady=unsteady)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


def test_processor_time() -> None:
    tick = os.sysconf("SC_CLK_TCK")
    busy, stolen = parse_stat(STAT)
    assert busy == (3834690 + 761182 + 634843 + 10 + 1691) / tick
    assert stolen == 11996 / tick
    assert parse_stat("") == parse_stat("cpu 1 2\n") == parse_stat("intr 1 2 3 4 5 6 7 8\n") == (None, None)


def test_quota() -> None:
    assert parse_throttled(CPU_STAT) == 7
    assert parse_throttled("usage_usec 12\n") is None


def test_gpu_state() -> None:
    assert parse_nvidia_smi("1980, 45, 0x0000000000000000\n210, 30, 0x1\n") == (1980.0, 45.0, ())
    assert parse_nvidia_smi("1005, 84, 0x0000000000000064") == (
        1005.0,
        84.0,
        ("software power cap", "software thermal slowdown", "hardware thermal slowdown"),
    )
    assert parse_nvidia_smi("210, 30, 0x0000000000000001") == (210.0, 30.0, ())  # idle
    assert parse_nvidia_smi("[N/A], 45, [N/A]") == (None, 45.0, ())
    assert parse_nvidia_smi("") == (None, None, ())


def test_gpu_state_of_nvml() -> None:
    """The library's functions fill what they are given a pointer to, and return 0."""

    class Nvml:
        def nvmlDeviceGetClockInfo(self, device: Any, kind: int, value: Any) -> int:
            value._obj.value = {1: 1005}[kind]
            return 0

        def nvmlDeviceGetTemperature(self, device: Any, sensor: int, value: Any) -> int:
            return 3  # not supported, as on a Jetson

        def nvmlDeviceGetCurrentClocksThrottleReasons(self, device: Any, value: Any) -> int:  # of an older driver
            value._obj.value = 0x44
            return 0

    state = read_nvml(Nvml(), ctypes.c_void_p())
    assert state == GpuState(clock_mhz=1005.0, temperature_c=None, slowdown_bits=0x44)
    assert name_slowdowns(0x44) == ("software power cap", "hardware thermal slowdown")


def test_a_whole_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions.shutil, "which", lambda name: None)
    nothing = read_state(tmp_path)
    assert (nothing.clock_mhz, nothing.temperature_c, nothing.num_throttled) == (None, None, None)
    assert (nothing.num_quota_throttled, nothing.busy_s, nothing.gpu_slowdowns) == (None, None, ())
    cpu = "sys/devices/system/cpu"
    write(
        tmp_path,
        {
            "proc/stat": STAT,
            "proc/self/cgroup": "0::/user.slice/mine\n",
            "sys/fs/cgroup/user.slice/mine/cpu.stat": CPU_STAT,
            f"{cpu}/cpu0/cpufreq/scaling_cur_freq": "2000000\n",
            f"{cpu}/cpu1/cpufreq/scaling_cur_freq": "3000000\n",
            f"{cpu}/cpu0/thermal_throttle/core_throttle_count": "2\n",
            f"{cpu}/cpu0/thermal_throttle/package_throttle_count": "1\n",
            "sys/class/thermal/thermal_zone0/temp": "45500\n",
            "sys/class/thermal/thermal_zone1/temp": "\n",
        },
    )
    state = read_state(tmp_path)
    assert (state.clock_mhz, state.temperature_c, state.num_throttled) == (3000.0, 45.5, 3)
    assert state.num_quota_throttled == 7
    write(tmp_path, {"proc/self/cgroup": "2:cpu:/\n", "sys/fs/cgroup/cpu/cpu.stat": "nr_throttled 9\n"})
    assert read_state(tmp_path).num_quota_throttled == 9  # version 1


def test_verdicts() -> None:
    steady = judged(later())
    assert (steady.verdict, steady.reasons, steady.other_cpus, steady.stolen_share) == ("steady", (), 0.0, 0.0)
    for changes, verdict, reason in (
        ({"num_throttled": 4}, "throttled", "heat slowed the processor down 1 times"),
        ({"num_quota_throttled": 25}, "throttled", "quota stopped this process 20 times"),
        ({"clock_mhz": 2000.0}, "throttled", "the clock fell from 3000 to 2000 MHz"),
        ({"gpu_slowdowns": ("power brake",)}, "throttled", "GPU: power brake"),
        ({"busy_s": 130.0}, "noisy", "other processes kept 2.0 of 4 processors busy"),
        ({"stolen_s": 2.0}, "noisy", "2.5% of the processors' time"),
    ):
        found = judged(later(**changes))
        assert found.verdict == verdict
        assert reason in found.reasons[0]
    both = judged(later(num_throttled=4), unsteady=("a.onnx: the median drifted",))
    assert (both.verdict, len(both.reasons)) == ("throttled", 2)
    assert judged(later(), unsteady=("x",)).verdict == "noisy"
    assert judged(later(busy_s=120.0)).verdict == "steady"  # one of the three processors that were left


def test_unknown_figures_do_not_decide() -> None:
    brief = judged(later(at_s=1000.1, busy_s=200.0))
    assert (brief.verdict, brief.other_cpus) == ("steady", None)
    unknown = judged(later(busy_s=None, stolen_s=None, num_throttled=None, clock_mhz=None))
    assert (unknown.verdict, unknown.other_cpus, unknown.stolen_share) == ("steady", None, None)


# --- energy -----------------------------------------------------------------------------------------------------------


class Counting:
    """A session whose every run costs two millijoules on the `meter`."""

    input_names = output_names = ()

    def __init__(self) -> None:
        self.joules = 0.0

    def run(self, inputs: Any) -> list[Any]:
        self.joules += 2e-3
        return []


def test_power_lines() -> None:
    assert parse_tegrastats(ORIN) == pytest.approx(4.998)
    assert parse_tegrastats(NANO) == pytest.approx(1.532)
    assert parse_tegrastats("RAM 1000/3956MB") is None
    assert parse_watts(" 72.35\n") == 72.35
    assert parse_watts("[N/A]") is None


def test_energy_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "_IDLE_SECONDS", 0.01)
    monkeypatch.setattr(energy, "_MIN_SECONDS", 0.01)
    session = Counting()

    @contextmanager
    def counter() -> Any:
        yield lambda: session.joules

    found = measure_energy(session, {}, Meter(source="a test", open=counter))
    assert found.energy_mj == pytest.approx(2.0)
    assert found.idle_power_w == 0
    assert found.num_runs >= 3 and found.power_w > 0


def test_rapl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy.shutil, "which", lambda name: None)
    target = Target(runtime="onnxruntime")
    meter, reason = find_meter(target, tmp_path)
    assert meter is None and "no energy counter" in reason
    zone = tmp_path / "sys/class/powercap/intel-rapl:0"
    core = tmp_path / "sys/class/powercap/intel-rapl:0:0"
    write(zone, {"name": "package-0\n", "energy_uj": "9000000\n", "max_energy_range_uj": "10000000\n"})
    write(core, {"name": "core\n"})
    meter, reason = find_meter(target, tmp_path)
    assert meter is not None and meter.source == "RAPL, 1 package(s)" and not reason
    with meter.open() as joules:
        (zone / "energy_uj").write_text("9500000\n")
        assert joules() == pytest.approx(0.5)
        (zone / "energy_uj").write_text("1500000\n")  # it began again at ten joules
        assert joules() == pytest.approx(2.5)
    assert grown(9.0, 1.0, 10.0) == pytest.approx(2.0)
    (zone / "energy_uj").unlink()
    meter, reason = find_meter(target, tmp_path)
    assert meter is None and "cannot be read" in reason


def test_sampled_power_is_multiplied_by_time() -> None:
    program = "import time\nfor _ in range(40):\n    print('5.0', flush=True)\n    time.sleep(0.02)"
    with energy._sampled([sys.executable, "-c", program], parse_watts) as joules:
        while joules() == 0:
            pass
        begun, before = energy.time.perf_counter(), joules()
        energy.time.sleep(0.2)
        spent, elapsed = joules() - before, energy.time.perf_counter() - begun
    assert spent == pytest.approx(5.0 * elapsed, rel=0.5)  # the test itself may be held up


def test_gpu_meters(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(runtime="tensorrt")
    monkeypatch.setattr(energy, "is_installed", lambda *modules: False)
    monkeypatch.setattr(energy.shutil, "which", lambda name: None)
    assert "pynvml" in find_meter(target)[1]
    monkeypatch.setattr(energy.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "nvidia-smi" else None)
    meter, _ = find_meter(target)
    assert meter is not None and meter.source.startswith("nvidia-smi")
    counter = iter([0, 1_000, 4_000])
    fake = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=lambda device: next(counter),
        NVMLError=RuntimeError,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(energy, "is_installed", lambda *modules: True)
    meter, _ = find_meter(target)
    assert meter is not None and meter.source == "NVML, GPU 0"
    with meter.open() as joules:
        assert joules() == pytest.approx(3.0)  # counted in millijoules
    monkeypatch.setattr(energy.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "tegrastats" else None)
    meter, _ = find_meter(target)
    assert meter is not None and meter.source.startswith("tegrastats")


def test_a_runs_report_shows_the_verdict() -> None:
    pytest.importorskip("plotly")
    run = finished_run()
    noisy = judged(later(busy_s=130.0))
    page = render_report(replace(run, benchmark=replace(run.benchmark, conditions=noisy)))
    assert "noisy, 2.00 processors busy with others, 3000 MHz, 50 °C" in page
    assert "while timing" not in render_report(run)
