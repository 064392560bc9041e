"""How much memory a run may hold, and how much a network's activations take: the sizes that batches are chosen by."""

import ctypes
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deploypipe.networks.batch_trees import tensors
from deploypipe.untrusted_files.limited_process import free_memory

GIB = 2**30
AUTO_BYTES = 9 * GIB // 2  # "auto" takes no more, so that machines with 9 GiB free and more choose alike
_LEAST_BYTES = 2**28
_M_ARENA_MAX = -8  # glibc's malloc.h


def allowed_bytes(gib: float | None, device: torch.device) -> int:
    """The bytes that a run's stages may hold on the device, besides what the process holds already.

    gib: a recipe's limit. None: half of what is free here and now, or in the container, and at most `AUTO_BYTES`.
    """
    if gib is not None:
        return int(gib * GIB)
    return max(_LEAST_BYTES, min(_free_bytes(device) // 2, AUTO_BYTES))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return free_memory()
    except OSError:  # macOS reports all memory, not what is free of it
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def gibibytes(num_bytes: float) -> str:
    """A size for people: "4.8 GiB", "12 MiB"."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.0f} MiB"


def tree_bytes(*trees: Any) -> int:
    """The bytes of all tensors in batches."""
    return sum(tensor.nbytes for tree in trees for tensor in tensors(tree))


@contextmanager
def shared_heap() -> Iterator[None]:
    """Around work in threads that take turns: they share one heap.

    glibc gives each thread a heap of its own, which keeps what the thread freed: 32 threads that held 0.3 GiB together
    had taken 1.1 GiB. At the end, what is free is given back to the system. Does nothing without glibc.
    """
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if libc is None or not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(_M_ARENA_MAX, 1)
    try:
        yield
    finally:
        libc.mallopt(_M_ARENA_MAX, 0)  # glibc's own choice
        libc.malloc_trim(0)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of all tensors made within the block, by this thread, that are still alive.

    Each storage counts once, whatever views it has, from the end of the operation that made it until the last
    reference to it is gone: a hook's, a variable's in forward(), or one for a backward pass. Memory that an operation
    needs only while it runs is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0  # may be set back to `now`
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {value.untyped_storage()._cdata for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._alive:  # no view, no weight
                    self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def end(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, end)
        self.now += size
        self.peak = max(self.peak, self.now)
