"""Choose what the next trial tries: Optuna's samplers over the few knobs that shape an allocation."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from deploypipe.recipe import ObjectiveName, Search
from deploypipe.records import MIN_TRIALS_FOR_IMPORTANCES, Trial
from deploypipe.search.allocation.limits import Range
from deploypipe.search.allocation.proposer import GREEDY, UNIFORM

Space: TypeAlias = Mapping[str, BaseDistribution]
Seen: TypeAlias = Sequence[FrozenTrial]

_WIDE = 0.2  # a wider range of sizes gets first trials at several sizes
_POPULATION = 8  # of NSGA-II: a study has tens of trials, not thousands
_MARKS = "sampler"  # a sampler's own notes about a trial


def knobs(fill: Range, magnitude: Range = (0.0, 1.0)) -> dict[str, BaseDistribution]:
    """The knobs that Optuna tunes, and their ranges.

    fill: which part of the budgets a trial may use; a single value if that is known exactly. magnitude: how much of
    its ranking is mixed into the recipe's; (0, 0) if the recipe's scorer is magnitude itself.
    """
    return {
        "fill": FloatDistribution(*fill),
        "exponent": FloatDistribution(0.4, 1.0),
        "block_weight": FloatDistribution(0.1, 4.0, log=True),
        "late": FloatDistribution(-0.7, 0.7),
        "by_importance": CategoricalDistribution((0.0, 1.0)),  # 1: blocks in the order of CKA, not of the losses
        "magnitude": FloatDistribution(*magnitude),  # its weight next to the recipe's scorer, in ranking units
        # Other than 0: widths without measured losses; in the first trials only.
        "control": CategoricalDistribution((0.0, UNIFORM, GREEDY)),
    }


def directions(objectives: Sequence[ObjectiveName]) -> list[StudyDirection]:
    """Accuracy is maximised, every other objective minimised."""
    return [StudyDirection.MAXIMIZE, *[StudyDirection.MINIMIZE] * (len(objectives) - 1)]


def next_knobs(
    number: int,
    seen: Seen,
    space: Space,
    warm: Sequence[Mapping[str, Any]],
    settings: Search,
    seed: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Choose the knobs of trial `number`. Return them, and notes to store with the trial, which `noted` restores.

    The result depends on the arguments alone, not on the process or on the rest of the storage: the trials `seen` are
    copied into a study of their own. Every trial gets a new sampler, since a sampler's memory ends with its process.
    """
    study = optuna.create_study(
        directions=directions(settings.objectives),
        sampler=_sampler(settings, (seed * 10_007 + number) % 2**32, len(warm)),
    )
    study.add_trials(seen)
    if number < len(warm):
        study.enqueue_trial(dict(warm[number]))
        turned = dict(space)
    else:
        turned = {name: distribution for name, distribution in space.items() if name != "control"}
    asked = study.ask(turned)
    _ = asked.relative_params  # so that an enqueued trial, too, belongs to one of NSGA-II's generations
    marks = {k: v for k, v in study.trials[-1].system_attrs.items() if k != "fixed_params"}
    return asked.params, {_MARKS: marks}


def noted(trial: FrozenTrial) -> FrozenTrial:
    """A finished trial of the storage, as the sampler that proposed it knew it."""
    return optuna.trial.create_trial(
        values=trial.values,
        params=trial.params,
        distributions=trial.distributions,
        system_attrs={**trial.system_attrs, **trial.user_attrs.get(_MARKS, {})},
    )


def importances(trials: Sequence[Trial], space: Space) -> dict[str, float]:
    """How much each knob decided whether a trial within the budget was in the most accurate quarter; sum 1.

    PED-ANOVA (arXiv:2304.10255). Empty for fewer than 20 trials within the budget.
    """
    turned = {name: distribution for name, distribution in space.items() if not distribution.single()}
    feasible = [t for t in trials if t.feasible]
    if len(feasible) < MIN_TRIALS_FOR_IMPORTANCES:
        return {}
    study = optuna.create_study(direction="maximize")
    for trial in feasible:
        params = {name: trial.knobs[name] for name in turned}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=turned, value=trial.candidate.accuracy))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
    return {str(k): float(v) for k, v in optuna.importance.get_param_importances(study, evaluator=evaluator).items()}


def warm_starts(fill: Range) -> list[dict[str, Any]]:
    """The knobs of the first trials.

    These are the solver's plain solution, one in which small losses count more, the same with blocks in the order of
    CKA, one that prefers removing blocks, and two controls: uniform widths, and the widths that magnitude alone leaves.
    A wide range of sizes adds the first ones at smaller sizes.
    """
    low, high = fill
    is_wide = high - low > _WIDE
    most = 0.9 if is_wide else 0.6

    plain = {"exponent": 1.0, "block_weight": 1.0, "late": 0.0, "by_importance": 0.0, "magnitude": 0.0, "control": 0.0}

    def start(share: float, **other: float) -> dict[str, Any]:
        return {"fill": low + share * (high - low), **plain, **other}

    full = [
        start(most),
        start(most, exponent=0.5),
        start(most, exponent=0.5, by_importance=1.0),
        start(most, block_weight=0.25),
        start(most, control=UNIFORM),
        start(most, control=GREEDY),
    ]
    return [*full, start(0.6), start(0.3, exponent=0.5), start(0.0, exponent=0.5)] if is_wide else full


class _Nsga2(optuna.samplers.NSGAIISampler):
    """NSGA-II whose parents are sorted by number, as a search that is continued reads them from its file."""

    def select_parent(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        return sorted(super().select_parent(study, generation), key=lambda trial: trial.number)


def _sampler(settings: Search, seed: int, num_warm: int) -> optuna.samplers.BaseSampler:
    match settings.sampler:
        case "tpe":
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=num_warm)
        case "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=num_warm, warn_independent_sampling=False)
        case "nsga2":
            return _Nsga2(seed=seed, population_size=_POPULATION)
        case "random":
            return optuna.samplers.RandomSampler(seed=seed)
