"""Ship a trial of a finished search other than its winner, in a new folder, with the finished stages."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from deploypipe.errors import ConfigError, RunFolderError
from deploypipe.files.atomic import place_file
from deploypipe.records import ScoreSummary, SearchResult, Trial
from deploypipe.runs.full_run_command import full_run_command
from deploypipe.runs.result import load_result

# Stages that the new run may reuse. The large stages of the search are not needed: its plans are in the result.
_REUSED = "structures|dense_export|baseline|dense_precision|prune|finetune|export|precision|engine|benchmark|golden"
_RECORD = re.compile(rf"\d\d-({_REUSED})-[0-9a-f]+\.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenTrial:
    """A trial to ship, and the results of the finished run."""

    finished: Path  # folder of the run that searched
    search: SearchResult  # `best` is the chosen trial, `winner` the search's own
    scores: ScoreSummary | None

    @property
    def trial(self) -> Trial:
        return self.search.trials[self.search.best]

    @property
    def folder(self) -> Path:
        return trial_folder(self.finished, self.trial.number)


def trial_folder(finished: Path, number: int) -> Path:
    """The run folder of a shipped trial, next to the folder of the search's run."""
    return finished.with_name(f"{finished.name}-trial-{number}")


def choose_trial(finished: Path, number: int) -> ChosenTrial:
    """Find a trial of the run in `finished`.

    RunFolderError if the folder holds no finished search, ConfigError if the search has no trial of that number.
    """
    result = load_result(finished)
    found = result.search
    if found is None:
        raise RunFolderError(f"{finished}: this run removed nothing, so it has no trials; give it a tighter budget")
    if result.recipe.fast_dev_run:
        command = full_run_command(result.command) or "call compress() without fast_dev_run, with another folder"
        raise RunFolderError(
            f"{finished}: holds a fast development run, whose trials show nothing; first run in full: {command}"
        )
    if not 0 <= number < len(found.trials):
        problem = f"{number} does not exist: the search in {finished} has trials 0 to {len(found.trials) - 1}"
        raise ConfigError("--ship-trial", "", problem, "choose one of them")
    winner = found.best if found.winner is None else found.winner
    chosen = replace(found, best=number, winner=winner, finalists=(number,))
    return ChosenTrial(finished=finished, search=chosen, scores=result.scores)


def describe(chosen: ChosenTrial) -> str:
    """Which trial ships instead of which, and what the search knew of it."""
    trial = chosen.trial
    over = [f"{name} by {100 * excess:.1f} %" for name, excess in trial.violations.items() if excess > 0]
    known = f"over budget in the search: {', '.join(over)}" if over else "within the budget in the search"
    return f"trial {trial.number} ships instead of trial {chosen.search.winner}; {known}"


def link_stages(chosen: ChosenTrial, folder: Path) -> None:
    """Give the new run folder what the finished run computed and this one may need, by hard links where possible."""
    for record in sorted(chosen.finished.glob("*.json")):
        if not _RECORD.fullmatch(record.name) or (folder / record.name).exists():
            continue
        at = folder / record.stem
        for path in sorted(p for p in record.with_suffix("").rglob("*") if p.is_file()):
            place = at / path.relative_to(record.with_suffix(""))
            place.parent.mkdir(parents=True, exist_ok=True)
            place_file(path, place)
        at.mkdir(exist_ok=True)
        place_file(record, folder / record.name)
    for outputs in sorted(chosen.finished.glob("teacher-outputs-*")):
        (folder / outputs.name).mkdir(exist_ok=True)
        for path in outputs.glob("epoch-*.safetensors"):
            place_file(path, folder / outputs.name / path.name)
