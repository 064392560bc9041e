"""Examine what this machine can do, and what to install for the rest. Prints and changes nothing."""

import os
from dataclasses import dataclass
from typing import Literal

import torch

from deploypipe.benchmark.environment import describe_environment
from deploypipe.compute_device import find_device
from deploypipe.installed_packages import ONNXRUNTIME, distributions_of, find_package
from deploypipe.records import Environment
from deploypipe.runtimes import RUNTIMES, is_installed
from deploypipe.runtimes.ability_for_target import can
from deploypipe.runtimes.int8_arithmetic import saturates_here
from deploypipe.runtimes.onnxruntime import PROVIDERS, missing_provider
from deploypipe.runtimes.this_machine import this_machine
from deploypipe.target import Target
from deploypipe.training.training_precision import native_precision

_SPEED_FEATURES = ("avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "neon", "i8mm")

_MAIN_PACKAGES = ("python", "torch")  # onnxruntime has a line of its own

# extra -> the modules that must all be there, by alternative names, and what it is for
_EXTRAS: dict[str, tuple[tuple[tuple[str, ...], ...], str]] = {
    "report": ((("plotly",), ("jinja2",)), "the HTML report"),
    "demo": ((("sklearn",),), "the demonstration pipeline"),
    "mlflow": ((("mlflow",),), "publishing to an MLflow registry"),
    "postgres": ((("psycopg",), ("sqlalchemy",)), "one search on several machines"),
    "tensorrt": ((("tensorrt",),), "TensorRT targets (Jetson, data-centre GPUs)"),
    "tensorrt-rtx": (
        (("tensorrt_rtx", "tensorrt_rtx_bindings"),),
        "engines for RTX GPUs, with or without one",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The result of one check. `remedy` is empty if nothing has to be done."""

    name: str
    status: Literal["ok", "missing", "limited"]
    detail: str
    remedy: str = ""
    summary: str = ""  # in a few words, where the detail is long

    @property
    def brief(self) -> str:
        return self.summary or self.detail


def examine(target: Target | None) -> tuple[Finding, ...]:
    """Runtimes, packages, processor, GPU and extras; given a target, whether this machine can measure for it."""
    environment = describe_environment(target.num_threads if target else 1)
    findings = [
        _packages(environment),
        _runtimes(),
        _onnxruntime(),
        _providers(),
        _processor(environment),
        _int8_sums(),
        _clock(environment),
        _load(environment),
        _gpu(environment),
        _computing(),
        _training(),
        *(_extra(name) for name in _EXTRAS),
    ]
    if target is not None:
        findings += [_target_runtime(target), _target_threads(target, environment)]
    return tuple(findings)


def _packages(environment: Environment) -> Finding:
    listed = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    brief = ", ".join(f"{name} {environment.versions[name]}" for name in _MAIN_PACKAGES if name in environment.versions)
    return Finding(name="packages", status="ok", detail=listed, summary=brief)


def _runtimes() -> Finding:
    """The runtimes that are installed. One that a target may name, but that is an extra, has a line of its own."""
    absent = [name for name in sorted(RUNTIMES) if name in _EXTRAS and _absent_modules(name)]
    present = ", ".join(name for name in sorted(RUNTIMES) if name not in absent)
    detail = f"installed: {present}" + (f"; not installed: {', '.join(absent)}" if absent else "")
    return Finding(name="runtimes", status="ok", detail=detail, summary=present)


def _onnxruntime() -> Finding:
    """onnxruntime's packages (CPU, GPU, OpenVINO, QNN) write the same files: of two, the last one installed runs."""
    loaded, found = find_package(ONNXRUNTIME), distributions_of(ONNXRUNTIME)
    detail = f"{loaded.name} {loaded.version}"
    if len(found) < 2:
        return Finding(name=ONNXRUNTIME, status="ok", detail=detail)
    return Finding(
        name=ONNXRUNTIME,
        status="limited",
        detail=f"{detail}; {' and '.join(found)} are installed and overwrite each other's files",
        summary=f"{len(found)} packages overwrite each other's files",
        remedy=f"pip uninstall {' '.join(found)}, then install one of them",
    )


def _providers() -> Finding:
    """onnxruntime's providers. A missing one is not a fault: the error for a target that needs it names the package."""
    present = [name for name, provider in PROVIDERS.items() if not missing_provider(provider)]
    return Finding(name="providers", status="ok", detail=f"onnxruntime: {', '.join(present)}")


def _processor(environment: Environment) -> Finding:
    features = ", ".join(environment.cpu_features)
    brief = f"{environment.cpu}, {environment.num_cpus} usable, {environment.memory_gib:.1f} GiB"
    detail = f"{brief}: {features or '?'}"
    if any(feature in environment.cpu_features for feature in _SPEED_FEATURES):
        return Finding(name="processor", status="ok", detail=detail, summary=brief)
    return Finding(
        name="processor",
        status="limited",
        detail=f"{detail}; none of {', '.join(_SPEED_FEATURES)} was detected",
        summary=brief,
        remedy="it lacks fast INT8 and BF16; measure on the device that will run the model, which will differ",
    )


def _int8_sums() -> Finding:
    """Whether INT8 sums saturate. Nothing has to be done: INT8 files are made to fit the machine."""
    if not saturates_here():
        return Finding(name="int8 sums", status="ok", detail="exact: 8-bit products are added in 32 bits")
    detail = "saturate at 16 bits (no VNNI): INT8 files get 7-bit weights here, which give the same results everywhere"
    return Finding(name="int8 sums", status="ok", detail=detail, summary="16 bits, so weights have 7: equally good")


def _clock(environment: Environment) -> Finding:
    if environment.governor in ("", "performance"):
        detail = environment.governor or "the system does not report it"
        return Finding(name="clock governor", status="ok", detail=detail)
    return Finding(
        name="clock governor",
        status="limited",
        detail=f"{environment.governor}: the clock varies with the load, and timings with the clock",
        summary=f"{environment.governor}: timings will vary",
        remedy="sudo cpupower frequency-set -g performance",
    )


def _load(environment: Environment) -> Finding:
    detail = f"load average {environment.load_before:.2f} on {environment.num_cpus} processors"
    if environment.load_before <= 0.5 * environment.num_cpus:
        return Finding(name="load", status="ok", detail=detail)
    return Finding(name="load", status="limited", detail=detail, remedy="stop other work before latencies are measured")


def _gpu(environment: Environment) -> Finding:
    machine = this_machine()
    seen = ", ".join(f"{gpu.name} (compute capability {gpu.compute_capability})" for gpu in machine.gpus)
    if environment.gpu:
        detail = f"{seen or environment.gpu}, driver {machine.driver}"
        return Finding(name="gpu", status="ok", detail=detail, summary=environment.gpu)
    kind = "built for the CPU" if torch.version.cuda is None else "built for CUDA, but no GPU is usable"
    return Finding(
        name="gpu",
        status="limited",
        detail=f"{seen or 'none'}; torch {torch.__version__} is {kind}: networks are computed on the processor",
        summary="none that torch can use",
        remedy="for faster runs, use a machine with a GPU and a CUDA build of torch",
    )


def _computing() -> Finding:
    """Where a run observes, repairs, judges and trains networks."""
    return Finding(name="computing", status="ok", detail=f"recipe.device=auto is {find_device('auto').text}")


def _training() -> Finding:
    precision, reason = native_precision()
    brief = f"finetune.precision=auto is {precision}"
    return Finding(name="training", status="ok", detail=f"{brief}: {reason}", summary=brief)


def _extra(extra: str) -> Finding:
    purpose, absent = _EXTRAS[extra][1], _absent_modules(extra)
    if not absent:
        return Finding(name=f"extra {extra}", status="ok", detail=purpose)
    return Finding(
        name=f"extra {extra}",
        status="missing",
        detail=f"{purpose}: {', '.join(absent)} not installed",
        summary=purpose,
        remedy=f"pip install 'deploypipe[{extra}]'",
    )


def _absent_modules(extra: str) -> list[str]:
    return [names[0] for names in _EXTRAS[extra][0] if not is_installed(*names)]


def _target_runtime(target: Target) -> Finding:
    name = f"target {target.name or target.runtime}"
    ability = can(target)
    if ability.verdict == "run":
        detail = f"this machine runs {target.runtime}; figures hold for machines like it"
        return Finding(name=name, status="ok", detail=detail, summary=f"this machine runs {target.runtime}")
    files = "an ONNX file" if ability.verdict == "export only" else "an ONNX file and an engine"
    return Finding(
        name=name,
        status="missing",
        detail=f"this machine can make {files} for it, but cannot run or measure it: {ability.reason}",
        summary=f"{ability.verdict}: cannot be measured here",
        remedy=ability.reason.rpartition("; ")[2]
        if ability.is_the_device
        else f"on the device itself: deploypipe doctor {target.name or 'TARGET'}",
    )


def _target_threads(target: Target, environment: Environment) -> Finding:
    available = environment.num_cpus
    detail = f"{target.num_threads} asked for, {available} usable of {os.cpu_count()}"
    if target.num_threads <= available:
        return Finding(name="target threads", status="ok", detail=detail)
    return Finding(
        name="target threads",
        status="limited",
        detail=f"{detail}: threads would wait for each other",
        summary=detail,
        remedy=f"set num_threads = {available} or less, or measure on a larger machine",
    )
