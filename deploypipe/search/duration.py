"""How long a search will take, told before its first trial."""

import time
from dataclasses import replace

from deploypipe.benchmark.accuracy import evaluate_module
from deploypipe.pruning.repair.least_squares_repair import repair
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.records import PruningPlan
from deploypipe.search.allocation.proposer import NUM_TIMED
from deploypipe.search.evaluation.candidate_files import NUM_LATENCY_SAMPLES
from deploypipe.search.evaluation.evaluator import Evaluator
from deploypipe.task import num_samples, take_calib

_TRIED = 8  # a repair with this part of the samples is tried


def predict_seconds(evaluator: Evaluator, plan: PruningPlan, num_trials: int) -> float:
    """From a smaller repair of one plan and a batch of val; each trial counted as one that sees all of val, and that
    is timed as often as one may be. An upper bound on a quiet machine: trials that are stopped early take less."""
    settings, dense = evaluator.recipe.search, evaluator.candidates.dense
    few = take_calib(evaluator.calib, max(settings.num_repair_samples // _TRIED, 1))
    share = sum(num_samples(batch) for batch, _ in few) / settings.num_repair_samples
    start = time.perf_counter()
    pruned, quick = apply_plan(dense, plan), replace(evaluator.recipe.repair, num_samples=settings.num_repair_samples)
    repair(dense, pruned, plan, few, quick, real_tokens=evaluator.task.real_tokens, seed=evaluator.recipe.seed)
    repaired = time.perf_counter()
    batch = evaluator.parts[0][0]
    evaluate_module(pruned, [batch], evaluator.task)
    judged = time.perf_counter()
    num_val = sum(num_samples(inputs) for part in evaluator.parts for inputs, _ in part)
    timing = NUM_TIMED * NUM_LATENCY_SAMPLES * 2 * (evaluator.dense_p50_ms or 0.0) / 1000
    own = (repaired - start) / min(share, 1.0) + (judged - repaired) * num_val / num_samples(batch[0])
    return num_trials * (own + timing)


def duration_text(seconds: float, num_trials: int) -> str:
    told = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    return f"{num_trials} trials take about {told} at most"
