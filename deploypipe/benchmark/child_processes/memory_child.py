"""The process whose memory is measured: `memory_child.py SETTINGS MODEL INPUTS.npz` writes KiB to stdout.

SETTINGS is JSON: "target", the fields of the `Target` that its runtime is made with, and "trust_program".

Started by its path, without importing torch, so that only the runtime is resident before the model is loaded.
"""

import json
import sys
from pathlib import Path

import numpy as np

from deploypipe.runtimes import make_runtime
from deploypipe.runtimes.gpu_memory import open_gpu, peak_increase
from deploypipe.target import Target
from deploypipe.untrusted_files.limited_process import end_with_parent

_NUM_RUNS = 3  # the arena may still grow in the second


def main(settings: str, model: str, inputs: str) -> int:
    """KiB that loading and running `model` adds at its peak: of resident memory, or of the GPU's where it runs there.

    The processor's figure is read before the file is closed.
    """
    given = json.loads(settings)
    target = Target(**given["target"])
    with np.load(inputs) as archive:
        batch = {name: archive[name] for name in archive.files}
    runtime = make_runtime(target, trust_program=given["trust_program"])

    def work() -> int:
        with runtime.open(Path(model), num_threads=target.num_threads) as session:
            for _ in range(_NUM_RUNS):
                session.run(batch)
            return 0 if target.needs_gpu else _status("VmHWM")

    if target.needs_gpu:
        return peak_increase(open_gpu(int(target.provider_options.get("device_id", 0))), work) // 1024
    _reset_peak()
    before = _status("VmRSS")
    return max(0, work() - before)


def _reset_peak() -> None:
    """Reset VmHWM to the memory held now (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    """A field of /proc/self/status, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


if __name__ == "__main__":
    end_with_parent()
    sys.stdout.write(f"{main(*sys.argv[1:])}\n")
