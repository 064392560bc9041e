"""Score each unit by its own information about the label: binned, with the Miller-Madow correction."""

import torch
from torch import Tensor, nn

from deploypipe.errors import DataError
from deploypipe.numerics.label_information import (
    joint_counts,
    miller_madow_information,
    plug_in_information,
    quantile_bins,
)
from deploypipe.observe.collectors import MAX_ROWS
from deploypipe.observe.pass_statistics import Moments
from deploypipe.recipe import LabelMi
from deploypipe.records import ScoreTable, Structures
from deploypipe.scoring.magnitude import completed_by_magnitude

WITHOUT_ROWS = "no consumer reads its units as one row per sample; scored by magnitude"
_SAMPLES_PER_CELL = 2  # (bin, class) cells; with fewer the correction leaves more than 0.065 nats of bias
_STEP = 1e-6  # orders by the plug-in estimate if the correction leaves nothing, so constants stay last


def score_label_mi(
    model: nn.Module, structures: Structures, moments: Moments, config: LabelMi, seed: int
) -> ScoreTable:
    """Score = I(mean activation; label) in nats, by unit. Shared information counts for each unit: duplicates stay.

    Raises DataError if labels are missing, of one class, or too few for the bins.
    """
    per_class = _SAMPLES_PER_CELL * config.num_bins
    labels = class_labels(moments, config.kind, per_class, hint="or lower num_bins")
    units = labelled_units(structures, moments, labels)
    channels = {name: _information(rows, labels, config.num_bins) for name, rows in units.items()}
    reasons = {group.name: WITHOUT_ROWS for group in structures.groups if group.name not in units}
    return completed_by_magnitude(model, structures, ScoreTable(scorer=config.kind, channels=channels), reasons)


def class_labels(moments: Moments, scorer: str, per_class: int, hint: str = "or choose another scorer") -> Tensor:
    """The calibration labels as 0 .. classes - 1, (n,) int64. Raises DataError if they are unusable for a score."""
    if moments.labels is None:
        raise DataError(
            f"{scorer} needs the class of every calibration sample, but the targets are not one integer per sample; "
            "give batches of (inputs, class indices) or choose a scorer without labels"
        )
    labels: Tensor
    classes, labels = torch.unique(moments.labels, return_inverse=True)
    if len(classes) < 2:
        raise DataError(
            f"{scorer} needs labels of two or more classes, but all {len(labels)} calibration samples have the same; "
            "shuffle the calibration split"
        )
    needed = per_class * len(classes)
    if len(labels) < needed:
        raise DataError(
            f"{scorer} needs {needed} labelled calibration samples ({per_class} for each of {len(classes)} classes), "
            f"but {len(labels)} were kept; observe more samples (a pass keeps up to {MAX_ROWS}) {hint}"
        )
    return labels


def labelled_units(structures: Structures, moments: Moments, labels: Tensor) -> dict[str, Tensor]:
    """By group: the units' rows, if there is one per label (a model may fold positions into the batch)."""
    names = [group.name for group in structures.groups if group.name in moments.units]
    units = {name: moments.units[name] for name in names if len(moments.units[name]) == len(labels)}
    for name, rows in units.items():
        if not torch.isfinite(rows).all():
            raise DataError(f"{name}: its units are NaN or infinite on calibration samples; check data and weights")
    return units


def _information(rows: Tensor, labels: Tensor, num_bins: int) -> tuple[float, ...]:
    counts = joint_counts(quantile_bins(rows, num_bins), labels, num_bins, int(labels.max()) + 1)
    information = miller_madow_information(counts).clamp_min(0) + _STEP * plug_in_information(counts)
    return tuple(information.tolist())
