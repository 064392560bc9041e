"""Decide what this machine can do for a target: run it, build for it, or only export for it."""

import re
from dataclasses import dataclass
from typing import Literal

from deploypipe.errors import RuntimeUnavailableError
from deploypipe.installed_packages import find_package
from deploypipe.runtimes.onnxruntime import PROVIDERS, missing_provider
from deploypipe.runtimes.tensorrt_libraries import LIBRARIES, load_library
from deploypipe.runtimes.this_machine import Machine, this_machine
from deploypipe.target import Target


@dataclass(frozen=True, kw_only=True, slots=True)
class Ability:
    """A machine's ability for a target: run, build only or export only."""

    verdict: Literal["run", "build only", "export only"]
    reason: str = ""  # "" if everything can be done; ends with a remedy if there is one
    is_the_device: bool = True  # False: figures measured here would be those of another device


def can(target: Target) -> Ability:
    """Return what this machine can do for `target`. Starts nothing; inspects the machine once in a process."""
    machine = this_machine()
    misfits = find_misfits(target, machine)
    missing = _missing_package(target)
    if not misfits and not missing:
        return Ability(verdict="run")
    builds_here, why_not = _builds_here(target, missing)
    return Ability(
        verdict="build only" if builds_here else "export only",
        reason="; ".join([*misfits, why_not] if misfits and why_not else misfits or [missing]),
        is_the_device=not misfits,
    )


def find_misfits(target: Target, machine: Machine) -> list[str]:
    """List what the target requires of its machine and this one lacks, or does not report."""
    misfits = []
    if target.machine and target.machine != machine.architecture:
        misfits.append(f"this machine is {machine.architecture}, not {target.machine}")
    absent = [feature for feature in target.cpu_features if feature not in machine.cpu_features]
    if absent and not misfits:
        misfits.append(f"this processor has no {', '.join(absent)}")
    if target.board and target.board.lower() not in machine.board.lower():
        misfits.append(f"this machine is {machine.board or 'of no known board'}, not {target.board}")
    if target.is_portable is not None and target.is_portable is not machine.is_portable:
        kind = "a laptop" if target.is_portable else "a desktop or server"
        is_known = machine.is_portable is not None
        misfits.append(f"this machine is not {kind}" if is_known else f"it is unknown whether this machine is {kind}")
    if target.provider == "coreml" and machine.system != "Darwin":
        misfits.append(f"this machine runs {machine.system}, not macOS")
    if target.needs_gpu:
        misfits += _gpu_misfits(target, machine)
    return misfits


def _gpu_misfits(target: Target, machine: Machine) -> list[str]:
    if not machine.gpus:
        return ["no NVIDIA GPU is usable here"]
    gpu = machine.gpus[0]  # the one that CUDA uses
    misfits = []
    if target.gpu_names and not any(re.search(rf"\b{re.escape(name)}\b", gpu.name) for name in target.gpu_names):
        misfits.append(f"the GPU here is {gpu.name}, not {' or '.join(target.gpu_names)}")
    if target.compute_capabilities and gpu.compute_capability not in target.compute_capabilities:
        asked = ", ".join(target.compute_capabilities)
        misfits.append(f"the GPU here has compute capability {gpu.compute_capability}, not {asked}")
    return misfits


def _missing_package(target: Target) -> str:
    """Why the installed packages do not provide the runtime, with a remedy; "" if they do."""
    if target.runtime == "onnxruntime":
        if problem := missing_provider(PROVIDERS[target.provider]):
            return problem
        return _wrong_version(target, *_found("onnxruntime"))
    if target.runtime == "eager":
        return _wrong_version(target, *_found("torch"))
    try:
        module, _ = load_library(target.runtime)
    except RuntimeUnavailableError as error:
        return str(error)
    return _wrong_version(target, target.runtime, str(module.__version__))


def _wrong_version(target: Target, package: str, installed: str) -> str:
    wanted = target.runtime_version
    if not wanted or f"{installed}.".startswith(f"{wanted}."):
        return ""
    return f"{package} {installed} is installed and the target is for {wanted}; install {package} {wanted}"


def _found(module: str) -> tuple[str, str]:
    package = find_package(module)
    return package.name, package.version


def _builds_here(target: Target, missing: str) -> tuple[bool, str]:
    """Whether an engine for another device can be built here, and if not, the reason."""
    if target.runtime not in ("tensorrt", "tensorrt-rtx"):
        return False, ""
    if not any(row.ahead_of_time for row in LIBRARIES if row.runtime == target.runtime):
        return False, f"a {target.runtime} engine is built on its own device"
    if missing:
        return False, f"no engine is built: {missing}"
    if not target.compute_capabilities:
        return False, "name the device's compute_capabilities in the target to build an engine here"
    return True, ""
