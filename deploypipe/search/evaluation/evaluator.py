"""Evaluate one plan: surgery, repair, the candidate's file on the target's runtime, accuracy on val."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from deploypipe.pruning.modules.count_macs import count_macs
from deploypipe.pruning.repair.least_squares_repair import repair
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.recipe import Recipe
from deploypipe.records import Candidate, PruningPlan
from deploypipe.search.evaluation.accuracy_cache import AccuracyCache
from deploypipe.search.evaluation.candidate_files import NUM_LATENCY_SAMPLES, CandidateFiles
from deploypipe.search.evaluation.early_stopping import evaluate_growing
from deploypipe.search.evaluation.run_trial import IsSettled
from deploypipe.search.sample_results import Results
from deploypipe.task import Batch, Task, take


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluator:
    """The `Evaluate` that a search is given: call it with a plan."""

    candidates: CandidateFiles
    dense_p50_ms: float | None  # None: the target cannot be measured here, so no candidate is
    calib: list[Batch]
    parts: Sequence[Sequence[Batch]]  # of val, from `draw_parts`
    task: Task
    recipe: Recipe
    needs_peak_memory: bool  # a budget or an objective asks for it
    work: Path
    accuracies: AccuracyCache  # read first; new results are added

    def __call__(self, plan: PruningPlan, is_settled: IsSettled) -> tuple[Candidate, Results]:
        pruned = apply_plan(self.candidates.dense, plan)
        costs = self._costs(pruned, plan)

        def with_accuracy(seen: Results) -> Candidate:
            return replace(costs, accuracy=float(seen.mean()))

        seen = evaluate_growing(
            lambda: self._repaired(pruned, plan),
            self.accuracies.of(plan),
            self.parts,
            self.task,
            lambda seen: is_settled(with_accuracy(seen), seen),
        )
        self.accuracies.keep(plan, seen)
        return with_accuracy(seen), seen

    def _repaired(self, pruned: nn.Module, plan: PruningPlan) -> nn.Module:
        quick = replace(self.recipe.repair, num_samples=self.recipe.search.num_repair_samples)
        return repair(
            self.candidates.dense,
            pruned,
            plan,
            self.calib,
            quick,
            real_tokens=self.task.real_tokens,
            seed=self.recipe.seed,
        )[0]

    def _costs(self, pruned: nn.Module, plan: PruningPlan) -> Candidate:
        """All but the accuracy; none of it depends on the weights' values."""
        num_params, num_macs = count_macs(pruned, take(self.calib[0][0], 2))
        with TemporaryDirectory(dir=self.work, prefix=".candidate.") as folder:
            file = self.candidates.write(pruned, plan, Path(folder) / "candidate.onnx")
            return Candidate(
                accuracy=0.0,
                latency_p50_ms=self._latency(file),
                peak_memory_mib=self._peak_memory(file),
                file_size_mib=self.candidates.size_mib(file),
                num_params=num_params,
                num_macs=num_macs,
                measured_by="" if self.dense_p50_ms is None else self.candidates.measured_by(file),
            )

    def _latency(self, file: Path) -> float | None:
        if self.dense_p50_ms is None:
            return None
        return self.dense_p50_ms * self.candidates.latency_ratios([file], NUM_LATENCY_SAMPLES)[0]

    def _peak_memory(self, file: Path) -> float | None:
        if self.dense_p50_ms is None or not self.needs_peak_memory:
            return None
        return self.candidates.peak_memory_mib(file)
