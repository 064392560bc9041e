"""Change of the loss when a gate on the unit closes, to first order (arXiv:1906.10771 eq. 8)."""

import torch
from torch import nn

from deploypipe.errors import DataError
from deploypipe.observe.moments import Moments
from deploypipe.recipe import Taylor
from deploypipe.records import ScoreTable, Structures
from deploypipe.scoring.magnitude import completed_by_magnitude

WITHOUT_GATE = "no consumer that mixes channels reads its units, so no derivative was seen; scored by magnitude"


def score_taylor(model: nn.Module, structures: Structures, moments: Moments, config: Taylor, seed: int) -> ScoreTable:
    """Mean over samples of the squared derivative of the loss by a gate on the unit, as `observe` gathered it.

    Raises DataError where no derivatives were gathered or where they are not finite.
    """
    if not moments.gates:
        raise DataError(
            "taylor needs the derivatives of the loss, and none were gathered; "
            "give observe_activations(..., loss=task.loss) and labelled calibration samples"
        )
    if not all(torch.isfinite(gate).all() for gate in moments.gates.values()):
        raise DataError("the derivatives of the loss hold NaN or infinity; check the loss on the calibration samples")
    channels = {g.name: tuple(moments.gates[g.name].tolist()) for g in structures.groups if g.name in moments.gates}
    reasons = {g.name: WITHOUT_GATE for g in structures.groups if g.name not in moments.gates}
    return completed_by_magnitude(model, structures, ScoreTable(scorer=config.kind, channels=channels), reasons)
