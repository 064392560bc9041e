"""Run processes that open untrusted files, limited in time and, on Linux, in memory. Standard library only.

A graph can loop forever or need terabytes, and no inspection detects that. So it is tried in a process that can be
killed.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PARENT = "DEPLOYPIPE_PARENT_PID"  # in the environment of a child
_SHARE_OF_FREE = 0.75
_CGROUP = Path("/sys/fs/cgroup")
_MEMORY_SIGNS = ("bad_alloc", "MemoryError", "allocate memory", "bad allocation", "out of memory")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessLimits:
    """Limits of one process that loads a file and runs it."""

    seconds: float = 120.0  # of wall-clock time
    memory_mib: int | None = None  # in addition to the runtime's own; None: three quarters of the free memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The output of a process, and why it failed ("": it succeeded)."""

    written: str
    problem: str


def run_limited(command: Sequence[str], limits: ProcessLimits) -> Outcome:
    """Run Python with these arguments, and kill it after `limits.seconds`.

    The process itself must limit its memory, with `limit_memory`, after it has loaded its libraries.
    """
    # -P: keep the script's folder, with its common module names, out of the import path.
    process = subprocess.Popen(
        [sys.executable, "-P", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=child_environment(),
    )
    try:
        written, said = process.communicate(timeout=limits.seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        written, _ = process.communicate()
        return Outcome(written=written, problem=f"took over {limits.seconds:g} s to load and run, and was killed")
    except BaseException:
        process.kill()
        process.wait()
        raise
    return Outcome(written=written, problem=_problem(process.returncode, said, limits))


def _problem(code: int, said: str, limits: ProcessLimits) -> str:
    if code == 0:
        return ""
    lines = [line for line in said.strip().splitlines() if line.strip()]
    reason = lines[-1].strip() if lines else f"it ended with status {code}"
    if code < 0:
        reason = f"it was killed by {signal.Signals(-code).name}{f' ({reason})' if lines else ''}"
    if any(sign in said for sign in _MEMORY_SIGNS):
        limit = f"the limit of {limits.memory_mib:,} MiB" if limits.memory_mib else "three quarters of the free memory"
        return f"needs more memory than {limit} ({reason})"
    return reason


def child_environment() -> dict[str, str]:
    """The environment of a child process: it imports this package, and knows its parent for `end_with_parent`."""
    root = str(Path(__file__).parents[2])
    search_path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": search_path, _PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Let Linux kill this process when its parent ends, because only the parent watches the time.

    A parent that ended while this process was still importing is not noticed by Linux, so it is looked for here.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get(_PARENT, str(os.getppid())) != str(os.getppid()):
        os.kill(os.getpid(), signal.SIGKILL)


def limit_memory(mib: int | None) -> None:
    """Limit this process to `mib` more memory than it has now (None: three quarters of the free memory).

    Works on Linux only; other systems do not enforce such a limit, and there this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    import resource

    room = mib * 2**20 if mib is not None else int(_SHARE_OF_FREE * free_memory())
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _kib("/proc/self/status", "VmData") * 1024 + room
    limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def free_memory() -> int:
    """Free bytes of this machine, or of the container that this process is in. Linux only."""
    free = _kib("/proc/meminfo", "MemAvailable") * 1024
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return min(free, max(0, int(limit) - int(used)))
    except (OSError, ValueError):  # no limit: "max"
        return free


def _kib(path: str, key: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise OSError(f"{path} has no {key}")
