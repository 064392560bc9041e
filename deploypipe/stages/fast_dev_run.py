"""Shorten a run so that every stage is tried in about a minute: few samples, two trials, one step of training.

The search's costs are bounded so that something is removed and nothing fails: half a minute cannot show whether the
target's own budget is met. The gate holds the result, whatever was measured.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from deploypipe.budgets import MACS
from deploypipe.checked_splits import wrap_splits
from deploypipe.errors import ConfigError, RunFolderError
from deploypipe.recipe import Recipe
from deploypipe.runs.result import RESULT, load_result
from deploypipe.target import NO_LIMIT, Budget, Target
from deploypipe.task import Batch, Splits, known_length

_NUM_BATCHES = 2  # of calib, val and test; of train: one, so one step
_NUM_SAMPLES = 64
_SMALLER, _NO_LIMIT = "0.9x", f"{NO_LIMIT:g}x"
NOTE = (
    "fast development run: two batches of each split, two trials, one step of training, and a budget of "
    f"{_SMALLER} the MACs instead of the target's; its result can never ship"
)


@dataclass(frozen=True, slots=True)
class FirstBatches:
    """The first batches of a split."""

    split: Any
    count: int

    def __len__(self) -> int:
        length = known_length(self.split)
        if length is None:
            raise TypeError("the split has no length")
        return min(length, self.count)

    def __iter__(self) -> Iterator[Batch]:
        return islice(iter(self.split), self.count)

    def set_epoch(self, epoch: int) -> None:
        self.split.set_epoch(epoch)


def first_batches(splits: Splits) -> Splits:
    """The first batches of each split."""
    splits = wrap_splits(splits)
    counts = {"calib": _NUM_BATCHES, "train": 1, "val": _NUM_BATCHES, "test": _NUM_BATCHES}
    return wrap_splits(Splits(**{name: FirstBatches(getattr(splits, name), n) for name, n in counts.items()}))


def short_recipe(recipe: Recipe) -> Recipe:
    """The recipe with the shortest settings that still run the same stages in the same way."""
    samples = {"num_samples": _NUM_SAMPLES}
    search = replace(
        recipe.search,
        num_trials=2,
        max_minutes=None,
        num_parallel=1,
        num_curve_samples=_NUM_SAMPLES,
        num_repair_samples=_NUM_SAMPLES,
        num_levels=2,
        num_timed=8,
        num_finalists=min(2, recipe.search.num_finalists),
        finalist_epochs=1,
        num_attempts=1,
    )
    int8 = replace(recipe.export.int8, num_calib_samples=_NUM_SAMPLES)
    return replace(
        recipe,
        observe=replace(recipe.observe, **samples),
        repair=replace(recipe.repair, **samples),
        search=search,
        finetune=replace(recipe.finetune, num_epochs=min(1, recipe.finetune.num_epochs)),
        export=replace(recipe.export, int8=int8),
    )


def short_target(target: Target) -> Target:
    """The target with the fewest timed runs, and with limits so loose that each is measured and met."""
    budget = target.budget
    limits = {**dict.fromkeys(budget.limits(), _NO_LIMIT), MACS: _SMALLER}
    slice_drop_pp = None if budget.slice_drop_pp is None else 100.0
    loose: Budget = replace(budget, **limits, accuracy_drop_pp=100.0, slice_drop_pp=slice_drop_pp)  # type: ignore[arg-type]
    return replace(target, num_latency_samples=200, budget=loose)


def require_own_place(out: Path, *, is_shared: bool) -> None:
    """Raise if the folder holds the result of a real run, which this one would remove, or if others are to help."""
    if is_shared:
        raise ConfigError("recipe", "fast_dev_run", "needs no workers", "leave --storage out, or the fast run")
    try:
        held = load_result(out) if (out / RESULT).is_file() else None
    except RunFolderError:
        return
    if held is not None and not held.recipe.fast_dev_run:
        raise RunFolderError(f"{out}: holds the result of a real run; choose another folder for a fast development run")
