"""The process whose start is timed: `cold_start_child.py SETTINGS MODEL INPUTS.npz` writes milliseconds to stdout.

SETTINGS is as in `memory_child.py`. Three numbers: importing the runtime, loading the file, the first run.
"""

import json
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

from deploypipe.untrusted_files.limited_process import end_with_parent


def main(settings: str, model: str, inputs: str) -> tuple[float, float, float]:
    """Milliseconds for each of the three."""
    with np.load(inputs) as archive:
        batch = {name: archive[name] for name in archive.files}
    marks = [time.perf_counter()]
    from deploypipe.runtimes import make_runtime
    from deploypipe.target import Target

    given = json.loads(settings)
    target = Target(**given["target"])
    runtime = make_runtime(target, trust_program=given["trust_program"])
    marks.append(time.perf_counter())
    with runtime.open(Path(model), num_threads=target.num_threads) as session:
        marks.append(time.perf_counter())
        session.run(batch)
        marks.append(time.perf_counter())
    imported, loaded, ran = (1e3 * (b - a) for a, b in pairwise(marks))
    return imported, loaded, ran


if __name__ == "__main__":
    end_with_parent()
    sys.stdout.write(" ".join(map(str, main(*sys.argv[1:]))) + "\n")
