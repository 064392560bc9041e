"""A process of its own that runs one model file: what is measured there is owed to the file alone."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import deploypipe
from deploypipe.errors import ModelError
from deploypipe.runtimes import Array
from deploypipe.target import Target

_SECONDS = 600.0
_SETTINGS = ("runtime", "provider", "provider_options", "allow_cpu_fallback", "num_threads")


def run_child(
    script: str,
    path: Path,
    inputs: Mapping[str, Array],
    target: Target,
    *,
    repeats: int,
    what: str,
    trust_program: bool = False,
) -> list[str]:
    """What `script`, a file beside this one, writes to stdout for `path` and `inputs`: `repeats` processes, in turn.

    trust_program: see `runtimes.make_runtime`. ModelError, naming `what` was to be measured, where the file does not
    run there.
    """
    with TemporaryDirectory() as folder:
        inputs_path = Path(folder) / "inputs.npz"
        np.savez(inputs_path, **dict(inputs))  # type: ignore[arg-type]  # numpy's stub takes it for `allow_pickle`
        settings = {"target": {name: getattr(target, name) for name in _SETTINGS}, "trust_program": trust_program}
        return [_run(script, path, inputs_path, json.dumps(settings), what) for _ in range(repeats)]


def _run(script: str, path: Path, inputs_path: Path, settings: str, what: str) -> str:
    root = str(Path(deploypipe.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    # -P: the folder of the script, which holds modules with everyday names, stays out of the child's import path.
    command = [sys.executable, "-P", str(Path(__file__).with_name(script)), settings, str(path), str(inputs_path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, env=environment, check=True)
    except subprocess.TimeoutExpired:
        raise ModelError(f"{path}: took over {_SECONDS:.0f} s to load and run; use a smaller batch_size") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"it ended with status {error.returncode}"
        raise ModelError(
            f"{path}: its {what} cannot be measured, a process that runs it failed: {reason}; "
            "see whether the machine has enough memory"
        ) from None
    return done.stdout
