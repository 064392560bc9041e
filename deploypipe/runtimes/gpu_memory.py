"""Measure the memory of a GPU that work takes at its peak, through CUDA's driver.

The driver counts all processes of the GPU, so that nothing else may run there. The context and the driver's own memory
are there before, and do not count; kernels that libraries load at their first run do.
"""

import ctypes
import platform
import threading
from collections.abc import Callable

from deploypipe.errors import RuntimeUnavailableError

_INTERVAL = 0.001  # seconds between two readings


def peak_increase(read: Callable[[], int], work: Callable[[], object]) -> int:
    """How far `read()` rises above its first value while `work` runs, read every millisecond and at the end."""
    before = read()
    seen = [before]
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(_INTERVAL):
            seen.append(max(seen.pop(), read()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        work()
    finally:
        is_over.set()
        watcher.join()
    return max(*seen, read()) - before


def open_gpu(index: int) -> Callable[[], int]:
    """A function that returns the used bytes of a GPU, by CUDA's number of it. Creates its context.

    RuntimeUnavailableError if the driver refuses.
    """
    cuda = ctypes.CDLL("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()

    def require(status: int, doing: str) -> None:
        if status:
            raise RuntimeUnavailableError(
                f"CUDA's driver reports error {status} in {doing}; check the GPU with nvidia-smi"
            )

    require(cuda.cuInit(0), "cuInit")
    require(cuda.cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet")
    require(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")

    def used() -> int:
        require(cuda.cuCtxSetCurrent(context), "cuCtxSetCurrent")  # of the calling thread
        require(cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)), "cuMemGetInfo")
        return total.value - free.value

    return used
