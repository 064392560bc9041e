"""Predict how long a search will take, before its first trial."""

import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from deploypipe.benchmark.accuracy import evaluate
from deploypipe.pruning.repair.least_squares_repair import repair
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.records import PruningPlan
from deploypipe.search.allocation.proposer import NUM_TIMED
from deploypipe.search.evaluation.candidate_files import NUM_LATENCY_SAMPLES
from deploypipe.search.evaluation.evaluator import Evaluator
from deploypipe.task import num_samples, take_calib

_TRIED = 8  # one repair with an eighth of the samples is timed


def predict_seconds(evaluator: Evaluator, plan: PruningPlan, num_trials: int) -> float:
    """Predict the seconds of `num_trials` trials, from a smaller repair of one plan and one batch of val.

    Each trial counts as one that sees all of val and is timed as often as allowed. So this is an upper bound on a quiet
    machine: trials that are stopped early take less.
    """
    settings, dense = evaluator.recipe.search, evaluator.candidates.dense
    few = take_calib(evaluator.calib, max(settings.num_repair_samples // _TRIED, 1))
    share = sum(num_samples(batch) for batch, _ in few) / settings.num_repair_samples
    start = time.perf_counter()
    pruned, quick = apply_plan(dense, plan), replace(evaluator.recipe.repair, num_samples=settings.num_repair_samples)
    tokens, seed = evaluator.task.real_tokens, evaluator.recipe.seed
    repair(dense, pruned, plan, few, quick, real_tokens=tokens, seed=seed, fit=evaluator.fit, device=evaluator.device)
    repaired = time.perf_counter()
    batch = evaluator.parts[0][0]
    with (
        TemporaryDirectory(dir=evaluator.work) as folder,
        evaluator.sliced_passes(pruned, plan, Path(folder)) as passes,
    ):
        opened = time.perf_counter()
        evaluate(passes, [batch], evaluator.task, "a candidate")
        evaluated = time.perf_counter()
    num_val = sum(part.num_samples for part in evaluator.parts)
    timing = NUM_TIMED * NUM_LATENCY_SAMPLES * 2 * (evaluator.dense_p50_ms or 0.0) / 1000
    own = (repaired - start) / min(share, 1.0) + (evaluated - opened) * num_val / num_samples(batch[0])
    return num_trials * (own + timing)


def duration_text(seconds: float, num_trials: int, max_minutes: float | None = None) -> str:
    shown = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    text = f"{num_trials} trials take about {shown} at most"
    return f"{text}; none begins after {max_minutes:g} min" if max_minutes and 60 * max_minutes < seconds else text
