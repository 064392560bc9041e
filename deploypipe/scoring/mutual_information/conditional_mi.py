"""Score units by the label information they add to the units chosen before them (arXiv:2411.18578, Gaussian form)."""

from dataclasses import dataclass

from torch import Tensor, nn

from deploypipe.numerics.label_information import forward_selection, scree_width
from deploypipe.observe.pass_statistics import Moments
from deploypipe.recipe import ConditionalMi
from deploypipe.records import ScoreTable, Structures
from deploypipe.scoring.magnitude import completed_by_magnitude
from deploypipe.scoring.mutual_information.label_mi import WITHOUT_ROWS, class_labels, labelled_units

_SAMPLES_PER_CLASS = 5  # with fewer, an uninformative unit appears to add more than 0.1 nats
_STEP = 1e-9  # keeps the order of choice if nothing is added


@dataclass(frozen=True, kw_only=True, slots=True)
class _Selection:
    scores: tuple[float, ...]
    width: int


def score_conditional_mi(
    model: nn.Module, structures: Structures, moments: Moments, config: ConditionalMi, seed: int
) -> ScoreTable:
    """Score = nats about the label still missing when the unit was chosen; strictly falling in order of choice.

    The highest score is I(label; all units). Of two duplicates one is chosen only after the other informative units.
    Suggests the width of the Scree test. The paper conditions on whole feature maps with matrix Renyi entropies,
    O(units^2 n^3). Here a unit is its mean over positions, and entropies are Gaussian. Raises DataError if labels are
    missing, of one class, or fewer than five per class.
    """
    labels = class_labels(moments, config.kind, _SAMPLES_PER_CLASS)
    units = labelled_units(structures, moments, labels)
    selections = {name: _select(rows, labels) for name, rows in units.items()}
    table = ScoreTable(
        scorer=config.kind,
        channels={name: selection.scores for name, selection in selections.items()},
        suggested={name: selection.width for name, selection in selections.items()},
        is_cumulative=True,
    )
    reasons = {group.name: WITHOUT_ROWS for group in structures.groups if group.name not in units}
    return completed_by_magnitude(model, structures, table, reasons)


def _select(rows: Tensor, labels: Tensor) -> _Selection:
    order, gains = forward_selection(rows, labels)
    remaining = (gains + _STEP).flip(0).cumsum(0).flip(0)
    scores = [0.0] * len(order)
    for unit, score in zip(order, remaining.tolist(), strict=True):
        scores[unit] = score
    by_chance = int(labels.max()) / (2 * len(labels))  # mean of chi^2 / 2n with classes - 1 degrees of freedom
    return _Selection(scores=tuple(scores), width=scree_width(gains, by_chance))
