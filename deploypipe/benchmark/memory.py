"""How much memory a model file adds to a process: measured in a child, which holds nothing else.

The child imports numpy and the runtime, reads the inputs, notes its resident memory, then loads the file and runs it.
The figure is its peak from there on, less what it held before: weights, the runtime's own structures for this graph,
and activations. It includes some MiB that any file costs. The median of `_NUM_CHILDREN` children is reported, since
where the allocator puts its arenas varies by a few hundred KiB.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

import deploypipe
from deploypipe.errors import ModelError
from deploypipe.runtimes import Array
from deploypipe.target import Target

_NUM_CHILDREN = 3
_SECONDS = 600.0
_CHILD = Path(__file__).with_name("memory_child.py")
_SETTINGS = ("runtime", "provider", "provider_options", "allow_cpu_fallback", "num_threads")


def measure_peak_memory(path: Path, inputs: Mapping[str, Array], target: Target) -> tuple[float | None, str]:
    """(MiB, "") that `path` adds at its peak under the target's settings; (None, reason) where that cannot be told.

    Needs Linux, whose kernel keeps a peak that can be reset. Raises ModelError where the file does not run in a child.
    """
    if not sys.platform.startswith("linux"):
        return None, f"peak memory is read from /proc, which {sys.platform} does not have"
    with TemporaryDirectory() as folder:
        inputs_path = Path(folder) / "inputs.npz"
        np.savez(inputs_path, **dict(inputs))  # type: ignore[arg-type]  # numpy's stub takes it for `allow_pickle`
        kib = [_run_child(path, inputs_path, target) for _ in range(_NUM_CHILDREN)]
    return median(kib) / 1024, ""


def _run_child(path: Path, inputs_path: Path, target: Target) -> int:
    """Peak increment in KiB."""
    root = str(Path(deploypipe.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    # -P: the folder of the script, which holds modules with everyday names, stays out of the child's import path.
    settings = json.dumps({name: getattr(target, name) for name in _SETTINGS})
    command = [sys.executable, "-P", str(_CHILD), settings, str(path), str(inputs_path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, env=environment, check=True)
    except subprocess.TimeoutExpired:
        raise ModelError(f"{path}: took over {_SECONDS:.0f} s to load and run; use a smaller batch_size") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"it ended with status {error.returncode}"
        raise ModelError(
            f"{path}: its memory cannot be measured, a process that runs it failed: {reason}; "
            "see whether the machine has enough memory"
        ) from None
    return int(done.stdout)
