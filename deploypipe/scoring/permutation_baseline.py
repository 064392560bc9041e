"""Permutation baseline: the value of a score on shuffled data, which contain no information."""

from typing import Any

from torch import nn

from deploypipe.numerics.grouped_gaussian_mi import total_information
from deploypipe.observe.layer_regressions import reads, weight_matrix
from deploypipe.observe.pass_statistics import Moments
from deploypipe.recipe import ConditionalMi, LabelMi, LayerwiseMi, Mipp, Scorer
from deploypipe.records import ChannelGroup, ScoreTable, Structures
from deploypipe.scoring.mutual_information.conditional_mi import score_conditional_mi
from deploypipe.scoring.mutual_information.label_mi import score_label_mi
from deploypipe.scoring.score_stability import shuffled_null

_SHUFFLES = (0, 1, 2)  # seeds


def permutation_baseline_shares(
    model: nn.Module, structures: Structures, moments: Moments, scorer: Scorer
) -> dict[str, float]:
    """By group: the information estimated from shuffled data as a share of that from the data. Near 1: only chance.

    Labels are permuted. A layer's inputs are paired with its outputs for another sample (`observe_activations(...,
    shuffled=True)`). Empty for scores that are not information.
    """
    if isinstance(scorer, (Mipp, LayerwiseMi)):
        modules: dict[str, Any] = dict(model.named_modules())
        readers = {group.name: _readers(group, modules, moments) for group in structures.groups}
        return {name: _share(found, modules, moments, scorer.noise) for name, found in readers.items() if found}
    if isinstance(scorer, (LabelMi, ConditionalMi)):

        def ask(seen: Moments) -> ScoreTable:
            if isinstance(scorer, LabelMi):
                return score_label_mi(model, structures, seen, scorer, seed=0)
            return score_conditional_mi(model, structures, seen, scorer, seed=0)

        nulls = shuffled_null(ask, moments, seeds=_SHUFFLES)
        return {name: null.shuffled / null.real if null.real > 0 else 1.0 for name, null in nulls.items()}
    return {}


def _readers(group: ChannelGroup, modules: dict[str, Any], moments: Moments) -> list[str]:
    return [m.module for m in group.members if m.module in moments.shuffled and reads(modules[m.module], m.side)]


def _share(readers: list[str], modules: dict[str, Any], moments: Moments, noise: float) -> float:
    real = null = 0.0
    for name in readers:
        covariance = moments.inputs[name].covariance
        weights = weight_matrix(modules[name]).detach().double().T
        outputs = weights.T @ covariance @ weights
        real += total_information(covariance, covariance @ weights, outputs, noise=noise)
        null += total_information(covariance, moments.shuffled[name], outputs, noise=noise)
    return null / real if real > 0 else 1.0
