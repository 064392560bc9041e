"""The error after a repair is known for all widths at once, and losses follow from it and from two measured ones."""

import networks
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deploypipe.observe.calibration_pass import observe_activations
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import Magnitude, Observe, Search
from deploypipe.records import Structures
from deploypipe.scoring import score
from deploypipe.search.allocation import cut_losses
from deploypipe.search.allocation.loss_curves import measure_curves
from deploypipe.search.allocation.predicted_losses import first_positions, predict_losses, repair_errors


class Joined(nn.Module):
    """Two layers that another reads side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(6, 8), nn.Linear(6, 5), nn.Linear(13, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.left(x).relu(), self.right(x).relu()], 1))


def test_errors_are_those_of_a_regression_on_what_stays() -> None:
    torch.manual_seed(0)
    model, inputs = Joined(), torch.randn(500, 6)
    structures = list_structures(model, inputs)
    moments = observe_activations(model, structures, [(inputs, torch.zeros(500))], Observe())
    group = next(group for group in structures.groups if group.name == "left")
    ranked = (3, 0, 7, 5, 1, 2, 4, 6)
    kept = [ranked[:count] for count in (1, 4, 7)]
    found = repair_errors(dict(model.named_modules()), group, kept, moments)
    with torch.no_grad():
        read = torch.cat([model.left(inputs).relu(), model.right(inputs).relu()], 1).double()
        outputs = model.last(read.float()).double()
    for units, error in zip(kept, found or [], strict=True):
        columns = torch.cat([read[:, list(units)], read[:, 8:], torch.ones(500, 1, dtype=torch.float64)], 1)
        left = outputs - columns @ torch.linalg.lstsq(columns, outputs).solution
        assert error == pytest.approx(float(left.square().sum() / outputs.var(0, correction=0).sum() / 500), rel=2e-2)


def test_two_widths_give_the_others_where_the_rule_holds() -> None:
    errors = [0.8, 0.5, 0.3, 0.1, 0.01, 0.0]
    losses = [3 * error * np.exp(2 * error) for error in errors]
    first = first_positions(errors)
    assert first == (0, 3)
    assert predict_losses(errors, {i: losses[i] for i in first}) == pytest.approx(losses)
    assert predict_losses(errors, {0: 1.0, 3: 0.0}) is None
    assert predict_losses(errors, {0: 1.0, 3: 1.1}) is None


def test_predicted_curves_are_near_the_measured_ones() -> None:
    model, inputs = networks.build("pad_resnet")
    structures: Structures = list_structures(model, inputs)
    torch.manual_seed(3)
    batches = [(torch.cat([networks.images() for _ in range(64)]), torch.zeros(256))]
    moments = observe_activations(model, structures, batches, Observe())
    scores = score(model, structures, moments, Magnitude())
    measured, predicted = (
        measure_curves(model, structures, scores, moments, batches, Search(curves=mode, num_levels=6))
        for mode in ("measured", "predicted")
    )
    num_predicted = 0
    for one, other in zip(measured.curves, predicted.curves, strict=True):
        assert (one.name, one.kept, one.predicted) == (other.name, other.kept, ())
        for kept, loss, guess in zip(one.kept, one.losses, other.losses, strict=True):
            if kept in other.predicted:
                num_predicted += 1
                assert guess == pytest.approx(loss, rel=0.5, abs=1e-3 * max(one.losses))
            else:
                assert guess == loss
    assert num_predicted > sum(len(curve.kept) for curve in predicted.curves if curve.kind == "channels") / 3


@pytest.mark.parametrize(("noise", "expected"), [(0.0, 16), (100.0, 64)])
def test_samples_that_say_the_same_are_left_out(noise: float, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_losses, "_MAX_SAMPLES", 4)
    torch.manual_seed(0)
    model = Joined()
    inputs = torch.randn(4, 6).repeat(16, 1) + noise * torch.randn(64, 6) ** 3
    batches = [(inputs, torch.zeros(64))]
    structures = list_structures(model, inputs)
    moments = observe_activations(model, structures, batches, Observe())
    scores = score(model, structures, moments, Magnitude())
    found = measure_curves(model, structures, scores, moments, batches, Search(curves="predicted"))
    assert found.num_samples == expected
    assert measure_curves(model, structures, scores, moments, batches, Search(curves="measured")).num_samples == 64
