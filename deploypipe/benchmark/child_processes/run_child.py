"""Run one model file in a process of its own, so that its measurements depend on the file alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from deploypipe.benchmark.sweeps import MIN_RUNS, PATIENCE
from deploypipe.errors import ModelError
from deploypipe.runtimes import Array
from deploypipe.target import Target
from deploypipe.untrusted_files.limited_process import Outcome, ProcessLimits, run_limited

OWN_FILES = ProcessLimits(seconds=600.0)  # of files that this package made
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
    limits: ProcessLimits = OWN_FILES,
) -> list[str]:
    """Run `script`, a file next to this one, for `path` and `inputs` in `repeats` processes, one after another.

    Returns what each writes to stdout. trust_program: see `runtimes.make_runtime`. ModelError, which names `what` was
    measured, if the file does not run there, or not within `limits`.
    """
    with TemporaryDirectory() as folder:
        settings = _settings(target, trust_program, limits)
        command = _command(script, path, inputs, settings, Path(folder))
        outcomes = []
        for _ in range(repeats):
            outcomes.append(run_limited(command, limits))
            if problem := outcomes[-1].problem:
                raise ModelError(
                    f"{path}: its {what} cannot be measured, a process that runs it failed: {problem}; "
                    "check that the machine has enough memory, or use a smaller batch_size"
                )
    return [outcome.written for outcome in outcomes]


def try_file(
    path: Path,
    inputs: Mapping[str, Array],
    target: Target,
    limits: ProcessLimits,
    *,
    batch_sizes: Sequence[int] = (),
    trust_program: bool = False,
) -> dict[int, str]:
    """Load `path` and run it once in a process of its own, before this process does, and then with each batch size.

    Returns the reasons of the batch sizes that cannot run, by size. ModelError if the file does not load or run with
    `inputs`, or not within `limits`: a graph may loop forever or ask for terabytes.
    """
    with TemporaryDirectory() as folder:
        settings = _settings(target, trust_program, limits)
        command = _command("try_child.py", path, inputs, settings, Path(folder))
        outcome = run_limited([*command, *map(str, batch_sizes)], limits)
    lines = outcome.written.splitlines()
    if not lines:
        raise ModelError(
            f"{path}: cannot be loaded and run once: {outcome.problem}; do not use it, or raise the limits with "
            "--time-limit and --memory-limit"
        )
    return _failures(lines[1:], batch_sizes, outcome)


def _failures(lines: Sequence[str], batch_sizes: Sequence[int], outcome: Outcome) -> dict[int, str]:
    """Parse "SIZE REASON" for each size that was tried; sizes after the last were not reached."""
    reasons = {int(size): reason for size, _, reason in (line.partition(" ") for line in lines)}
    left = outcome.problem or "was not tried"
    return {size: reasons.get(size, left) for size in batch_sizes if reasons.get(size, left)}


def _settings(target: Target, trust_program: bool, limits: ProcessLimits) -> str:
    """The settings as JSON. memory_mib is -1 (no limit) on a GPU, whose driver reserves address space freely."""
    return json.dumps(
        {
            "target": {name: getattr(target, name) for name in _SETTINGS},
            "trust_program": trust_program,
            "memory_mib": -1 if target.needs_gpu else limits.memory_mib,
            "most_seconds": PATIENCE / MIN_RUNS,
        }
    )


def _command(script: str, path: Path, inputs: Mapping[str, Array], settings: str, folder: Path) -> list[str]:
    inputs_path = folder / "inputs.npz"
    np.savez(inputs_path, **dict(inputs))  # type: ignore[arg-type]  # numpy's stub matches it to `allow_pickle`
    return [str(Path(__file__).with_name(script)), settings, str(path), str(inputs_path)]
