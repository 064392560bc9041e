"""Time networks on the target, for a latency model to learn from."""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.records import Notify, Progress, PruningPlan, Structures, TimedCut, TimedNetworks, silent
from deploypipe.search.allocation.latency_samples import sample_networks
from deploypipe.search.allocation.proposer import cut_of
from deploypipe.search.allocation.solver import Allocation
from deploypipe.search.cost_models.additive_costs import Levels
from deploypipe.search.evaluation.candidate_files import CandidateFiles

_AT_ONCE = 5  # files timed together with the dense one, so that they share its time
_NUM_SAMPLES = 60  # of each: many networks teach more than many runs of one


def time_networks(
    candidates: CandidateFiles,
    structures: Structures,
    levels: Levels,
    plan_for: Callable[[Allocation], PruningPlan],
    work: Path,
    *,
    count: int,
    seed: int,
    notify: Notify = silent,
) -> TimedNetworks:
    """Time `count` networks of `sample_networks` against the dense one. Their weights are not repaired."""
    started = time.perf_counter()
    plans = [plan_for(chosen) for chosen in sample_networks(structures, levels, count, seed)]
    rows: list[TimedCut] = []
    for first in range(0, len(plans), _AT_ONCE):
        group = plans[first : first + _AT_ONCE]
        with TemporaryDirectory(dir=work, prefix=".timed.") as folder:
            files = [
                candidates.write(apply_plan(candidates.dense, plan), plan, Path(folder) / f"{number}.onnx")
                for number, plan in enumerate(group)
            ]
            ratios = candidates.latency_ratios(files, _NUM_SAMPLES)
        rows += [TimedCut(cut=cut_of(plan), ratio=ratio) for plan, ratio in zip(group, ratios, strict=True)]
        notify(Progress(stage="latency", done=len(rows), total=len(plans), message="networks timed"))
    return TimedNetworks(
        rows=tuple(rows),
        precision=candidates.precision.precision,
        seconds=time.perf_counter() - started,
        exported=dict(candidates.exported),
    )
