"""Measure how much memory a model file adds to a process, in a child process that holds nothing else.

The child imports numpy and the runtime, reads the inputs, records its resident memory, then loads the file and runs it.
The figure is its peak from there on, minus what it held before: weights, the runtime's own structures for this graph,
and activations. It includes a few MiB that any file costs. The median of `_NUM_CHILDREN` children is reported, since
the placement of the allocator's arenas varies by a few hundred KiB.

If the file runs on a GPU, the figure is of the GPU's memory (`runtimes.gpu_memory`), and the host's is not measured.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from deploypipe.benchmark.child_processes.run_child import OWN_FILES, run_child
from deploypipe.runtimes import Array
from deploypipe.scheduling.exclusive_measurement import exclusive_measurement
from deploypipe.target import Target
from deploypipe.untrusted_files.limited_process import ProcessLimits

_NUM_CHILDREN = 3


def measure_peak_memory(
    path: Path,
    inputs: Mapping[str, Array],
    target: Target,
    *,
    trust_program: bool = False,
    limits: ProcessLimits = OWN_FILES,
) -> tuple[float | None, str]:
    """(MiB, "") that `path` adds at its peak under the target's settings; (None, reason) if that cannot be measured.

    On a processor this needs Linux, whose kernel keeps a peak that can be reset. Raises ModelError if the file does not
    run in a child.
    """
    if not sys.platform.startswith("linux") and not target.needs_gpu:
        return None, f"peak memory is read from /proc, which {sys.platform} does not have"
    with exclusive_measurement():
        outputs = run_child(
            "memory_child.py",
            path,
            inputs,
            target,
            repeats=_NUM_CHILDREN,
            what="memory",
            trust_program=trust_program,
            limits=limits,
        )
    return median(int(kib) for kib in outputs) / 1024, ""
