"""Read a GPU's clock, temperature and reasons for slowing down from NVML, NVIDIA's management library.

NVML numbers all GPUs of the machine, CUDA those that it may use: the GPU is looked up by its place on the bus.
"""

import ctypes
import platform
from dataclasses import dataclass
from functools import cache
from typing import Any

# nvml.h: NVML_CLOCK_SM, NVML_TEMPERATURE_GPU
_CLOCK_SM, _TEMPERATURE_GPU = 1, 0
_BUS_ID_LENGTH = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuState:
    """What the GPU reports now; None: it does not."""

    clock_mhz: float | None
    temperature_c: float | None
    slowdown_bits: int | None  # nvmlClocksEventReasons


def read_gpu() -> GpuState | None:
    """The state of the first GPU that CUDA uses; None without NVML or a GPU."""
    found = _open()
    return read_nvml(*found) if found else None


def read_nvml(nvml: Any, device: ctypes.c_void_p) -> GpuState:
    """Read one device of the loaded library."""
    clock, degrees, bits = ctypes.c_uint(), ctypes.c_uint(), ctypes.c_ulonglong()
    reasons = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)  # named so since driver 535
    reasons = reasons or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
    has_clock = nvml.nvmlDeviceGetClockInfo(device, _CLOCK_SM, ctypes.byref(clock)) == 0
    has_degrees = nvml.nvmlDeviceGetTemperature(device, _TEMPERATURE_GPU, ctypes.byref(degrees)) == 0
    has_bits = reasons(device, ctypes.byref(bits)) == 0
    return GpuState(
        clock_mhz=float(clock.value) if has_clock else None,
        temperature_c=float(degrees.value) if has_degrees else None,
        slowdown_bits=bits.value if has_bits else None,
    )


@cache
def _open() -> tuple[Any, ctypes.c_void_p] | None:
    is_windows = platform.system() == "Windows"
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if is_windows else "libcuda.so.1")
        nvml = ctypes.CDLL("nvml.dll" if is_windows else "libnvidia-ml.so.1")
    except OSError:
        return None
    ordinal, bus, device = ctypes.c_int(), ctypes.create_string_buffer(_BUS_ID_LENGTH), ctypes.c_void_p()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(ordinal), 0):
        return None
    if cuda.cuDeviceGetPCIBusId(bus, len(bus), ordinal) or nvml.nvmlInit_v2():
        return None
    if nvml.nvmlDeviceGetHandleByPciBusId_v2(bus, ctypes.byref(device)):
        return None
    return nvml, device
