"""Score units by the first-order change of the loss if the unit is gated off (arXiv:1906.10771 eq. 8)."""

import torch
from torch import nn

from deploypipe.errors import DataError
from deploypipe.observe.pass_statistics import Moments
from deploypipe.recipe import Taylor
from deploypipe.records import ScoreTable, Structures
from deploypipe.scoring.magnitude import completed_by_magnitude

WITHOUT_GATE = "no linear-like consumer reads its units, so no derivative was collected; scored by magnitude"


def score_taylor(model: nn.Module, structures: Structures, moments: Moments, config: Taylor, seed: int) -> ScoreTable:
    """Score = mean over samples of the squared derivative of the loss by a gate on the unit.

    Raises DataError if the calibration pass collected no derivatives, or if they are not finite.
    """
    if not moments.gates:
        raise DataError(
            "taylor needs the derivatives of the loss, but none were collected; "
            "pass observe_activations(..., loss=task.loss) and labelled calibration samples"
        )
    if not all(torch.isfinite(gate).all() for gate in moments.gates.values()):
        raise DataError(
            "the derivatives of the loss contain NaN or infinity; check the loss on the calibration samples"
        )
    channels = {g.name: tuple(moments.gates[g.name].tolist()) for g in structures.groups if g.name in moments.gates}
    reasons = {g.name: WITHOUT_GATE for g in structures.groups if g.name not in moments.gates}
    return completed_by_magnitude(model, structures, ScoreTable(scorer=config.kind, channels=channels), reasons)
