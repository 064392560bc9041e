"""The TensorRT libraries and their differences, one row each. Builder and sessions read the row, never a version."""

import importlib
import warnings
from dataclasses import dataclass, field
from typing import Any

from deploypipe.errors import RuntimeUnavailableError


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """One major version of one library. Names are those of its Python bindings."""

    runtime: str  # the name in targets
    major: int
    modules: tuple[str, ...]  # any of them is imported
    network_flags: tuple[str, ...] = ()  # NetworkDefinitionCreationFlag
    # BuilderFlags that a file of each precision needs; None: every network is strongly typed, by the file's types.
    precision_flags: dict[str, tuple[str, ...]] | None = None
    has_timing_cache: bool = True
    # Compute capabilities that an engine can be built for without the GPU; empty: only on the GPU that runs it.
    ahead_of_time: tuple[str, ...] = field(default=())


_TENSORRT = ("tensorrt",)
_RTX = ("tensorrt_rtx", "tensorrt_rtx_bindings")
_RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")

# Names checked in the wheels tensorrt_cu12_bindings 10.3.0 (JetPack 6.1) and 10.13.3.9, tensorrt_cu13_bindings
# 11.4.0.106 and tensorrt_rtx_cu13_bindings 1.7.1.116, all on PyPI; tests/export/test_tensorrt_engine.py has the list.
LIBRARIES: tuple[Library, ...] = (
    Library(
        runtime="tensorrt",
        major=10,
        modules=_TENSORRT,
        network_flags=("EXPLICIT_BATCH",),
        precision_flags={"fp32": (), "fp16": ("FP16",), "int8": ("INT8",)},
    ),
    Library(runtime="tensorrt", major=11, modules=_TENSORRT),
    Library(runtime="tensorrt-rtx", major=1, modules=_RTX, has_timing_cache=False, ahead_of_time=_RTX_CAPABILITIES),
)


def load_library(runtime: str) -> tuple[Any, Library]:
    """The bindings' module and its row; RuntimeUnavailableError if no known version is installed."""
    rows = [row for row in LIBRARIES if row.runtime == runtime]
    module = _import(runtime, rows[0].modules)
    version = str(module.__version__)
    for row in rows:
        if version.split(".")[0] == str(row.major):
            return module, row
    known = ", ".join(f"{row.major}.x" for row in rows)
    raise RuntimeUnavailableError(
        f"{runtime} {version} is installed, and this version of deploypipe supports {known}; "
        f"pip install 'deploypipe[{runtime}]'"
    )


def _import(runtime: str, names: tuple[str, ...]) -> Any:
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in names:  # the module exists, and a module that it imports does not
                raise RuntimeUnavailableError(_broken(runtime, error)) from error
        except (ImportError, OSError) as error:
            raise RuntimeUnavailableError(_broken(runtime, error)) from error
    raise RuntimeUnavailableError(f"the package {names[0]!r} is not installed; pip install 'deploypipe[{runtime}]'")


def _broken(runtime: str, error: Exception) -> str:
    return (
        f"{runtime} is installed but cannot be imported ({str(error).partition(chr(10))[0]}); "
        f"install it again with pip install 'deploypipe[{runtime}]'"
    )
