"""Detect what decides whether this machine is a target's device. Starts no CUDA context."""

import ctypes
import platform
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_BOARD = Path("/proc/device-tree/model")
_CHASSIS = Path("/sys/class/dmi/id/chassis_type")
_DRIVER = Path("/sys/module/nvidia/version")
_L4T = Path("/etc/nv_tegra_release")
# SMBIOS 3.7 (DMTF DSP0134), table 17: portable, laptop, notebook, sub notebook, tablet, convertible, detachable.
_PORTABLE = frozenset({8, 9, 10, 14, 30, 31, 32})
_UNKNOWN_CHASSIS = frozenset({0, 1, 2})
_ARCHITECTURES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}
# CUDA driver API, CUdevice_attribute
_CC_MAJOR, _CC_MINOR = 75, 76


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    name: str
    compute_capability: str  # "8.9"


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """One machine. Fields are empty or None if the system does not report them."""

    system: str  # Linux, Darwin, Windows
    architecture: str  # x86_64, aarch64
    cpu_features: frozenset[str] = frozenset()
    board: str = ""
    is_portable: bool | None = None
    gpus: tuple[Gpu, ...] = ()
    driver: str = ""  # of the GPU: "580.95.05", "L4T 36.4.0" on a Jetson, "CUDA 12.6" if only that is known


@cache
def this_machine() -> Machine:
    """This machine, inspected once in a process."""
    gpus, cuda = _find_gpus()
    return Machine(
        system=platform.system(),
        architecture=_ARCHITECTURES.get(platform.machine().lower(), platform.machine()),
        cpu_features=_cpu_features(),
        board=_read(_BOARD).rstrip("\0\n"),
        is_portable=_is_portable(_read(_CHASSIS)),
        gpus=gpus,
        driver=_driver(cuda) if gpus else "",
    )


def _cpu_features() -> frozenset[str]:
    for line in _read(_CPUINFO).splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            return frozenset(value.split())
    return frozenset()


def _is_portable(chassis_type: str) -> bool | None:
    number = int(chassis_type) if chassis_type.strip().isdigit() else 0
    return None if number in _UNKNOWN_CHASSIS else number in _PORTABLE


def _driver(cuda: int) -> str:
    if match := re.search(r"R(\d+).*?REVISION: ([\d.]+)", _read(_L4T)):
        return f"L4T {match[1]}.{match[2]}"
    return _read(_DRIVER).strip() or f"CUDA {cuda // 1000}.{cuda % 1000 // 10}"


def _find_gpus() -> tuple[tuple[Gpu, ...], int]:
    """The NVIDIA GPUs that this process may use, and the driver's CUDA version (12060 is 12.6); ((), 0) if none."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1")
    except OSError:
        return (), 0
    count, version = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return (), 0
    cuda.cuDriverGetVersion(ctypes.byref(version))
    return tuple(_describe_gpu(cuda, i) for i in range(count.value)), version.value


def _describe_gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, number, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(128)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    parts = []
    for attribute in (_CC_MAJOR, _CC_MINOR):
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        parts.append(str(number.value))
    return Gpu(name=name.value.decode(errors="replace"), compute_capability=".".join(parts))


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
