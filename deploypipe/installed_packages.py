"""Installed packages: the name and version of the distribution behind an import.

Standard library only, so that it works on a device with only numpy and onnxruntime.
"""

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import Any

from deploypipe.errors import RuntimeUnavailableError

ONNXRUNTIME = "onnxruntime"
_UNKNOWN = "unknown"
_VARIANTS = "cpu, or gpu, openvino or qnn: one of them"


@dataclass(frozen=True, slots=True)
class Package:
    """A distribution: `onnxruntime-gpu` 1.24.1, say."""

    name: str
    version: str


def find_package(module: str) -> Package:
    """The distribution that `import module` loads; RuntimeUnavailableError if it is onnxruntime and missing.

    Several distributions bring a module called onnxruntime, so that one says itself what it is. The others are looked
    up under their own name, which is fast; where that fails (a source tree, a renamed build) the module is asked.
    """
    if module == ONNXRUNTIME:
        loaded = load_onnxruntime()
        try:
            name = str(import_module("onnxruntime.capi.build_and_package_info").package_name)
        except (ImportError, AttributeError):
            name = ONNXRUNTIME
        return Package(name, str(loaded.__version__))
    try:
        return Package(module, _version(module))
    except PackageNotFoundError:
        return Package(module, str(getattr(import_module(module), "__version__", _UNKNOWN)))


def package_versions(*modules: str) -> dict[str, str]:
    """The version of each module's distribution, by the distribution's name."""
    return {package.name: package.version for package in map(find_package, modules)}


def load_onnxruntime() -> Any:
    """The module onnxruntime; RuntimeUnavailableError, with the extra to install, where it is absent or broken."""
    try:
        return import_module(ONNXRUNTIME)
    except ModuleNotFoundError as error:
        if error.name != ONNXRUNTIME:
            raise RuntimeUnavailableError(_broken(error)) from error
        raise RuntimeUnavailableError(
            f"no package brings onnxruntime here; pip install 'deploypipe[cpu]' ({_VARIANTS}), or on a small device "
            "pip install onnxruntime"
        ) from None
    except (ImportError, OSError) as error:
        raise RuntimeUnavailableError(_broken(error)) from error


def find_missing() -> str:
    """Why onnxruntime cannot be imported, with a remedy; empty where it can. Asked when any import failed."""
    try:
        load_onnxruntime()
    except RuntimeUnavailableError as error:
        return str(error)
    return ""


def distributions_of(module: str) -> tuple[str, ...]:
    """All distributions that bring a module of this name. Reads every distribution's list of files: half a second."""
    return tuple(sorted(set(packages_distributions().get(module, ()))))


@cache
def _version(distribution: str) -> str:
    """A search asks for each candidate; reading the files of a distribution takes milliseconds."""
    return version(distribution)


def _broken(error: Exception) -> str:
    return (
        f"onnxruntime is installed but cannot be imported ({str(error).partition(chr(10))[0]}); "
        f"install it again with pip install --force-reinstall 'deploypipe[cpu]' ({_VARIANTS})"
    )
