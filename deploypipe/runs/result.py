"""The result of a finished run: `result.json` in its folder, and the plan in it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploypipe.errors import RunFolderError
from deploypipe.files.atomic import write_atomically
from deploypipe.files.json_records import from_json, to_json
from deploypipe.recipe import Recipe
from deploypipe.records import (
    BaselineComparison,
    BenchmarkReport,
    EngineFile,
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

RESULT, PLAN = "result.json", "plan.json"
_MAX_RESULT_BYTES = 2**28


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """Everything a finished run has to tell; `result.json` in its folder."""

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


def save_result(folder: Path, result: RunResult) -> None:
    """Write `result.json` atomically, sealed."""
    write_atomically(folder / RESULT, seal(to_json(result)))


def load_result(folder: Path, name: str = RESULT) -> RunResult:
    """Read `result.json`; RunFolderError where the run has not finished, or the file was changed after it."""
    path = folder / name
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
    return from_json(RunResult, text, str(path))


def load_plan(path: Path) -> PruningPlan:
    """The plan in a file, in a folder that holds a plan.json, or of a finished run; RunFolderError where none is."""
    file = path / PLAN if path.is_dir() else path
    if file.is_file():
        with file.open("rb") as stream:
            content = stream.read(_MAX_RESULT_BYTES + 1)
        if len(content) > _MAX_RESULT_BYTES:
            raise RunFolderError(f"{file}: has more than {_MAX_RESULT_BYTES:,} bytes, which is no plan; check the path")
        return from_json(PruningPlan, content, str(file))
    if not path.is_dir():
        raise RunFolderError(f"{path}: is no file; give a plan.json, or the folder of a finished run")
    found = load_result(path).search
    if found is None:
        raise RunFolderError(f"{path}: this run removed nothing, so it has no plan; give a run that had to compress")
    return found.trials[found.best].plan


def start_afresh(folder: Path, names: Sequence[str]) -> None:
    """Remove the end products of an earlier run, so that nobody takes them for those of one that fails."""
    for name in (RESULT, *names):
        (folder / name).unlink(missing_ok=True)
