"""Evaluate one plan: surgery, repair, the candidate's file on the target's runtime, accuracy on val by that file."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from deploypipe.benchmark.forward_passes import Passes, network_passes
from deploypipe.compute_device import CPU
from deploypipe.pruning.modules.count_macs import count_macs
from deploypipe.pruning.repair.least_squares_repair import repair
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.recipe import Recipe
from deploypipe.records import Candidate, Note, Notify, PruningPlan, RepairFit, silent
from deploypipe.search.evaluation.accuracy_cache import AccuracyCache
from deploypipe.search.evaluation.candidate_files import NUM_LATENCY_SAMPLES, CandidateFiles
from deploypipe.search.evaluation.candidate_passes import candidate_passes
from deploypipe.search.evaluation.early_stopping import evaluate_growing
from deploypipe.search.evaluation.held_val import Part
from deploypipe.search.evaluation.run_trial import IsSettled
from deploypipe.search.sample_results import Results
from deploypipe.task import Batch, Task, take


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluator:
    """The `Evaluate` that a search is given: call it with a plan."""

    candidates: CandidateFiles
    dense_p50_ms: float | None  # None: the target cannot be measured here, so no candidate is
    calib: list[Batch]
    parts: Sequence[Part]  # of val, from `draw_parts`
    task: Task
    recipe: Recipe
    needs_peak_memory: bool  # a budget or an objective asks for it
    work: Path
    accuracies: AccuracyCache  # read first; new results are added
    fit: RepairFit | None = None  # of the repair into memory
    device: torch.device = CPU  # repairs networks, and runs those whose accuracy is taken
    notify: Notify = silent
    _fallbacks: list[str] = field(init=False, default_factory=list)  # why files did not run

    def __call__(self, plan: PruningPlan, is_settled: IsSettled) -> tuple[Candidate, Results]:
        pruned, known = apply_plan(self.candidates.dense, plan), self.accuracies.of(plan)
        with TemporaryDirectory(dir=self.work, prefix=".candidate.") as folder, ExitStack() as stack:
            file = Path(folder) / "candidate.onnx"
            # One file serves timing and accuracy. Where results are known, the weights may never be needed.
            repaired = None if len(known) else self._repaired(pruned, plan)
            self.candidates.write(pruned if repaired is None else repaired, plan, file)
            costs = self._costs(pruned, file)

            def with_accuracy(seen: Results) -> Candidate:
                return replace(costs, accuracy=float(seen.mean()))

            def open_passes() -> Passes:
                if repaired is None:
                    return stack.enter_context(self.sliced_passes(self._repaired(pruned, plan), plan, Path(folder)))
                return stack.enter_context(self._passes(repaired, self.candidates.fp32_of(file)))

            seen = evaluate_growing(
                open_passes, known, self.parts, self.task, lambda seen: is_settled(with_accuracy(seen), seen)
            )
        self.accuracies.keep(plan, seen)
        return with_accuracy(seen), seen

    @contextmanager
    def sliced_passes(self, network: nn.Module, plan: PruningPlan, folder: Path) -> Iterator[Passes]:
        """Run a network that `plan` made by a file that is only written for this, in `folder`."""
        file = folder / "evaluated.onnx"
        if self.device == CPU and (reason := self.candidates.slice_fp32(network, plan, file)):
            self._note_fallback(reason)
            with network_passes(network) as passes:
                yield passes
            return
        with self._passes(network, file) as by_file:
            yield by_file

    def _passes(self, network: nn.Module, file: Path) -> AbstractContextManager[Passes]:
        inputs, _ = self.parts[0][0]
        return candidate_passes(network, file, inputs, self.recipe.export, self.device, self._note_fallback)

    def _note_fallback(self, reason: str) -> None:
        if not self._fallbacks:
            text = f"candidates are evaluated in eager torch where their files cannot run ({reason})"
            self.notify(Note(stage="search", text=text))
        self._fallbacks.append(reason)

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
            fit=self.fit,
            device=self.device,
        )[0]

    def _costs(self, pruned: nn.Module, file: Path) -> Candidate:
        """All but the accuracy; none of it depends on the weights' values."""
        num_params, num_macs = count_macs(pruned, take(self.calib[0][0], 2))
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
