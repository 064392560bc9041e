"""The result of a finished run: `result.json` in its folder, and the plan in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from deploypipe.errors import ModelError, RunFolderError
from deploypipe.files.atomic import write_atomically
from deploypipe.files.hashing import file_sha256
from deploypipe.files.json_records import from_json, to_json
from deploypipe.plan_file import PLAN, read_plan
from deploypipe.recipe import Recipe
from deploypipe.records import (
    BaselineComparison,
    BenchmarkReport,
    EngineFile,
    FileEntry,
    GateDecision,
    Golden,
    Origin,
    PrecisionChoice,
    PruneReport,
    PruningPlan,
    RepairReport,
    ScoreSummary,
    SearchResult,
    StageTime,
    Structures,
    TrainLog,
)
from deploypipe.target import Target
from deploypipe.text.sealed_json import seal, unseal

if TYPE_CHECKING:
    from torch import nn

RESULT = "result.json"
_MAX_RESULT_BYTES = 2**28


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """Everything a finished run reports; `result.json` in its folder.

    `result.load_model(build_model)` is the compressed network as a PyTorch module.
    """

    pipeline: str
    metric: str
    recipe: Recipe
    target: Target
    structures: Structures
    scores: ScoreSummary | None  # None, like the next four: nothing had to be removed
    search: SearchResult | None
    prune: PruneReport | None
    repair: RepairReport | None
    training: TrainLog | None
    benchmark: BenchmarkReport
    decision: GateDecision
    stages: tuple[StageTime, ...]
    precision: PrecisionChoice | None = None  # of a target that takes more than fp32
    engine: EngineFile | None = None  # of a target that takes one, where this machine could build it
    golden: Golden | None = None  # what `deploypipe verify` replays; in the run folder
    origin: Origin = field(default_factory=Origin)
    baseline: BaselineComparison | None = None  # where the gate was asked to compare with one
    too_slow: tuple[str, ...] = ()  # of each network trained before this one: what the benchmark said of it
    command: str = ""  # that made the run, addresses without passwords; "" where the library was called
    weights: FileEntry | None = None  # of the compressed network in PyTorch, before it was converted to what ships
    folder: str = field(default="", compare=False)  # that it was read from, or written to; no file holds it

    def __repr__(self) -> str:
        ratio, drop = self.benchmark.latency_ratio, self.benchmark.accuracy_drop_pp
        figures = [f"latency {ratio.value:.3g}x"] if ratio else []
        figures += [f"accuracy drop {drop.value:.2f} pp"] if drop else []
        if self.prune:
            figures.append(f"parameters {self.prune.params_after / self.prune.params_before:.3g}x")
        lines = [
            f"RunResult: {self.pipeline} on {self.target.name or self.target.runtime}: {self.decision.verdict.value}",
            f"  {', '.join(figures) or 'nothing was measured'}",
            f"  {self.decision.reason}",
            "  the network in PyTorch: result.load_model(build_model)",
        ]
        return "\n".join(lines)

    def load_model(self, build_model: "Callable[[], nn.Module]") -> "nn.Module":
        """The compressed network, in evaluation mode. If nothing was removed, it is the dense one.

        build_model: makes the dense network, as in the pipeline; its weights are replaced. Raises RunFolderError if the
        result has no folder or its weights are absent, ModelError if they were changed, PlanError for another network.
        """
        from deploypipe.pruning.surgery.saved_network import load_cut, load_dense  # late: import torch

        if self.search is None:
            return load_dense(build_model, self.structures.model_fingerprint)
        if not self.folder:
            raise RunFolderError("this result has no folder; read it with load_result(folder)")
        if self.weights is None:
            raise RunFolderError(f"{self.folder}: names no weights; run the same command again")
        path = Path(self.folder) / self.weights.name
        if not path.is_file():
            raise RunFolderError(f"{path}: is absent; run the same command again, or copy the folder again")
        if file_sha256(path) != self.weights.sha256:
            raise ModelError(f"{path}: is not the file that the run wrote; run the same command again")
        return load_cut(build_model, self.search.trials[self.search.best].plan, path)


def result_json(result: RunResult) -> bytes:
    """The text of a result file, sealed. It does not depend on where the file lies."""
    return seal(to_json(replace(result, folder="")))


def save_result(folder: Path, result: RunResult) -> None:
    """Write `result.json` atomically, sealed."""
    write_atomically(folder / RESULT, result_json(result))


def load_result(folder: Path | str, name: str = RESULT) -> RunResult:
    """Read `result.json`; RunFolderError if the run has not finished, or the file was changed later."""
    path = Path(folder) / name
    if not path.is_file():
        raise RunFolderError(f"{folder}: holds no finished run ({name} is absent); finish it with `deploypipe run`")
    try:
        if (size := path.stat().st_size) > _MAX_RESULT_BYTES:
            raise ValueError(f"has {size:,} bytes, and {_MAX_RESULT_BYTES:,} are the most")
        text = unseal(path.read_bytes())
    except ValueError as error:
        remedy = "run the same command again, which takes seconds where the run's stages are kept"
        remedy = remedy if name == RESULT else "copy the bundle again from where it was built"
        raise RunFolderError(f"{path}: {error}; {remedy}") from None
    return replace(from_json(RunResult, text, str(path)), folder=str(folder))


def load_plan(path: Path | str) -> PruningPlan:
    """The plan in a file, in a folder that holds a plan.json, or of a finished run; RunFolderError if there is none."""
    path = Path(path)
    file = path / PLAN if path.is_dir() else path
    if file.is_file():
        return read_plan(file)
    if not path.is_dir():
        raise RunFolderError(f"{path}: is not a file; give a plan.json, or the folder of a finished run")
    found = load_result(path).search
    if found is None:
        raise RunFolderError(f"{path}: this run removed nothing, so it has no plan; give a run that had to compress")
    return found.trials[found.best].plan


def start_afresh(folder: Path, names: Sequence[str]) -> None:
    """Remove the end products of an earlier run. If this run fails, they must not look like its own."""
    for name in (RESULT, *names):
        (folder / name).unlink(missing_ok=True)
