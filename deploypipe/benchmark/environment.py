"""Describe the machine and software that a figure is measured on. What a platform does not report stays empty."""

import hashlib
import json
import os
import platform
from pathlib import Path

import torch

from deploypipe.installed_packages import ONNXRUNTIME, package_versions
from deploypipe.records import Environment

# Instruction sets that decide how fast a network runs. Arm's names for neon: asimd (64 bit), neon (32 bit).
_FEATURES = (
    "avx2",
    "fma",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "neon",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
    "sve2",
)
_PACKAGES = ("deploypipe", "torch", "onnx", "onnxruntime", "optuna", "numpy")
_CPUINFO = Path("/proc/cpuinfo")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_BOARD = Path("/proc/device-tree/model")


def describe_environment(num_threads: int) -> Environment:
    """Describe this machine now. `load_before` is the one-minute load average, so call this before the work.

    `device_fingerprint` hashes what decides a latency: processor, instruction sets, number of processors, threads
    used, governor, system, and onnxruntime's package and version.
    """
    cpu, features = _describe_cpu()
    versions = {"python": platform.python_version(), **package_versions(*_PACKAGES)}
    num_cpus = count_cpus()
    governor = _read(_GOVERNOR).strip()
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    deciding = [
        cpu,
        features,
        num_cpus,
        num_threads,
        governor,
        platform.system(),
        platform.machine(),
        [[name, version] for name, version in versions.items() if name.startswith(ONNXRUNTIME)],
    ]
    return Environment(
        cpu=cpu,
        cpu_features=features,
        num_cpus=num_cpus,
        governor=governor,
        load_before=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        memory_gib=_memory_gib(),
        gpu=torch.cuda.get_device_name(0) if torch.cuda.is_available() else "",
        system=system,
        versions=versions,
        device_fingerprint=hashlib.sha256(json.dumps(deciding).encode()).hexdigest()[:16],
    )


def _describe_cpu() -> tuple[str, tuple[str, ...]]:
    """Processor name and the instruction sets of `_FEATURES` it has."""
    fields: dict[str, str] = {}
    for line in _read(_CPUINFO).splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    flags = set(f"{fields.get('flags', '')} {fields.get('features', '')}".split())
    if "asimd" in flags:
        flags.add("neon")
    board = _read(_BOARD).rstrip("\0\n")
    name = fields.get("model name") or board or platform.processor() or platform.machine()
    return name, tuple(feature for feature in _FEATURES if feature in flags)


def count_cpus() -> int:
    """Processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 2)
    except (AttributeError, ValueError, OSError):
        return 0.0


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
