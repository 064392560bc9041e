"""What runs a model file on the target device. A runtime is one file with a `Session` and one line in `RUNTIMES`.

This version runs onnxruntime only. TensorRT and TensorRT-RTX may be named in a target, and asking for a session of
theirs is an error that says what is missing. Imports no torch, so that a small process can measure a file's memory.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from deploypipe.errors import RuntimeUnavailableError
from deploypipe.runtimes.onnxruntime import OnnxRuntime
from deploypipe.target import Target

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class Session(Protocol):
    """One loaded model file."""

    @property
    def input_names(self) -> tuple[str, ...]: ...

    @property
    def output_names(self) -> tuple[str, ...]: ...

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """Outputs in the order of `output_names`, in arrays the caller owns.

        DataError where the inputs' names, types or shapes do not fit the file.
        """
        ...


class Runtime(Protocol):
    """A way to load model files."""

    def open(self, path: Path, *, num_threads: int) -> AbstractContextManager[Session]:
        """Load `path` and free it at the end of the block; ModelError where it is absent or not loadable."""
        ...


RUNTIMES: dict[str, Runtime] = {"onnxruntime": OnnxRuntime()}

# Runtimes a target may name and this version cannot run: the modules that hold them, and the extra that installs them.
_NOT_BUILT: dict[str, tuple[tuple[str, ...], str]] = {
    "tensorrt": (("tensorrt",), "tensorrt"),
    "tensorrt-rtx": (("tensorrt_rtx", "tensorrt_rtx_bindings"), "tensorrt-rtx"),
}


def find_runtime(target: Target) -> Runtime:
    """The runtime of `target`. RuntimeUnavailableError names what is missing and the extra that installs it."""
    name = target.runtime
    if name in RUNTIMES:
        return RUNTIMES[name]
    modules, extra = _NOT_BUILT[name]
    source = f"target {target.name!r}" if target.name else "target"
    supported = ", ".join(sorted(RUNTIMES))
    if is_installed(*modules):
        problem = f"the package is installed, but this version of deploypipe runs {supported} only"
        remedy = f"set runtime = {supported!r}"
    else:
        problem = f"the package {modules[0]!r} is not installed, and this version of deploypipe runs {supported} only"
        remedy = f"set runtime = {supported!r}; the package itself comes with pip install 'deploypipe[{extra}]'"
    raise RuntimeUnavailableError(f"{source}: runtime {name!r}: {problem}; {remedy}")


def is_installed(*modules: str) -> bool:
    """Whether one of these top-level modules can be imported, without importing it."""
    return any(find_spec(module) is not None for module in modules)
