"""The process that tries an untrusted file: `try_child.py SETTINGS MODEL INPUTS.npz [SIZE ...]`.

SETTINGS is as in `memory_child.py`, with "memory_mib" and "most_seconds". Writes "ok" after the first run, and then for
each batch size "SIZE ", followed by the reason if the file does not accept it. A size that would take longer than
"most_seconds" is not tried: the sweep does not run it either. Imports no torch, which takes longer than most files do.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from deploypipe.errors import DataError
from deploypipe.runtimes import make_runtime
from deploypipe.target import Target
from deploypipe.untrusted_files.limited_process import end_with_parent, limit_memory


def main(settings: str, model: str, inputs: str, *sizes: str) -> None:
    given = json.loads(settings)
    target = Target(**given["target"])
    with np.load(inputs) as archive:
        batch = {name: archive[name] for name in archive.files}
    runtime = make_runtime(target, trust_program=given["trust_program"])
    if given["memory_mib"] != -1:
        limit_memory(given["memory_mib"])
    per_sample = 0.0
    with runtime.open(Path(model), num_threads=target.num_threads) as session:
        session.run(batch)
        sys.stdout.write("ok\n")
        for size in map(int, sizes):
            sys.stdout.flush()
            if per_sample * size > given["most_seconds"]:
                sys.stdout.write(f"{size} \n")
                continue
            begun = time.perf_counter()
            try:
                session.run({name: np.resize(array, (size, *array.shape[1:])) for name, array in batch.items()})
            except DataError as error:
                sys.stdout.write(f"{size} the file does not accept it: {error}\n")
                continue
            per_sample = (time.perf_counter() - begun) / size
            sys.stdout.write(f"{size} \n")


if __name__ == "__main__":
    end_with_parent()
    main(*sys.argv[1:])
