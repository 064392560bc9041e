"""`deploypipe` as a child process."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent


def start(folder: Path, *arguments: str, num_threads: int = 1) -> subprocess.Popen[str]:
    """The command of this checkout, at work in `folder`; its pipeline may import the tests' helpers."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(num_threads),
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
        "DEPLOYPIPE_CACHE": str(folder / "cache"),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "deploypipe", *arguments],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell's background jobs, which tests may run in, are started with the signal ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
