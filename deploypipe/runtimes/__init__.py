"""Run model files on the target device. A runtime is one file with a `Session`, and one line in `RUNTIMES`.

Imports no torch, so that a small process can measure a file's memory.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from deploypipe.errors import RuntimeUnavailableError
from deploypipe.provider_options import require_harmless_options
from deploypipe.runtimes.ability_for_target import can
from deploypipe.runtimes.bound_runs import BoundRun
from deploypipe.runtimes.onnxruntime import PROVIDERS, OnnxRuntime
from deploypipe.runtimes.tensorrt import TensorRtRuntime
from deploypipe.runtimes.torch_program import EagerRuntime
from deploypipe.target import Target

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class Session(Protocol):
    """One loaded model file."""

    @property
    def input_names(self) -> tuple[str, ...]: ...

    @property
    def output_names(self) -> tuple[str, ...]: ...

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """Return the outputs in the order of `output_names`, in arrays that the caller owns.

        DataError if the inputs' names, types or shapes do not fit the file.
        """
        ...

    def bind(self, inputs: Mapping[str, Array]) -> BoundRun:
        """Prepare many runs of one batch. On a GPU, all memory is allocated and pinned here, once."""
        ...


class Runtime(Protocol):
    """A way to load model files."""

    def open(self, path: Path, *, num_threads: int) -> AbstractContextManager[Session]:
        """Load `path` and free it at the end of the block; ModelError if it is absent or cannot be loaded."""
        ...


def _onnxruntime(target: Target, _: bool) -> Runtime:
    return OnnxRuntime(
        provider=PROVIDERS[target.provider],
        options=target.provider_options,
        allow_cpu_fallback=target.allow_cpu_fallback,
        cuda_graph=target.cuda_graph,
    )


def _tensorrt(target: Target, _: bool) -> Runtime:
    return TensorRtRuntime(library=target.runtime, cuda_graph=target.cuda_graph)


# By the runtime's name in a target: the function that makes it. The second argument is `make_runtime`'s trust_program.
RUNTIMES: dict[str, Callable[[Target, bool], Runtime]] = {
    "onnxruntime": _onnxruntime,
    "tensorrt": _tensorrt,
    "tensorrt-rtx": _tensorrt,
    "eager": lambda target, trust_program: EagerRuntime(device=target.provider, is_trusted=trust_program),
}


def make_runtime(target: Target, *, trust_program: bool = False) -> Runtime:
    """The runtime of `target`, whether or not this machine is the device.

    trust_program: let eager torch open .pt2 programs, which can run any code when they are loaded. ConfigError if
    provider options may load a library (`provider_options`).
    """
    require_harmless_options(target)
    return RUNTIMES[target.runtime](target, trust_program)


def find_runtime(target: Target, *, trust_program: bool = False) -> Runtime:
    """The runtime of `target`, to measure with; RuntimeUnavailableError if this machine has none
    for it (`ability_for_target.can`).

    trust_program: as in `make_runtime`.
    """
    ability = can(target)
    if ability.verdict != "run":
        source = f"target {target.name!r}" if target.name else "target"
        raise RuntimeUnavailableError(f"{source}: {ability.reason}")
    return make_runtime(target, trust_program=trust_program)


def is_installed(*modules: str) -> bool:
    """Whether one of these top-level modules can be imported, without importing it."""
    return any(find_spec(module) is not None for module in modules)
