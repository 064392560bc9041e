"""Distillation losses: their definition, and which one fits the outputs of a network."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from deploypipe.distillation_loss import kl_divergence_loss, relative_squared_loss, with_distillation_loss
from deploypipe.errors import DataError, ModelError
from deploypipe.task import Task, classification

T = 3.0


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("shape", "dim"), [((5, 4), -1), ((5, 4), 1), ((5, 4, 3, 2), 1), ((5, 3, 4), -1)])
def test_classes_by_definition(shape: tuple[int, ...], dim: int) -> None:
    seen, expected = draw(*shape).double(), draw(*shape, seed=1).double()
    p, q = ((logits / T).exp() / (logits / T).exp().sum(dim, keepdim=True) for logits in (expected, seen))
    places = expected.numel() // 4
    assert float(kl_divergence_loss(dim)(seen, expected, T)) == pytest.approx(
        T**2 * float((p * (p / q).log()).sum()) / places
    )
    assert float(kl_divergence_loss(dim)(seen, seen, T)) == 0


def test_values_by_definition_whatever_their_unit() -> None:
    seen, expected = draw(50, 3), draw(50, 3, seed=1)
    apart = relative_squared_loss(expected)
    relative = (seen - expected).square().mean() / expected.var(0, correction=0).mean()
    assert float(apart(seen, expected, T)) == pytest.approx(float(relative))
    assert float(relative_squared_loss(1_000 * expected)(1_000 * seen, 1_000 * expected, T)) == pytest.approx(
        float(relative)
    )
    assert float(apart(expected, expected, T)) == 0
    assert torch.isfinite(relative_squared_loss(expected[:1])(seen, expected, T))  # one sample varies in nothing


@pytest.mark.parametrize("pack", [lambda a, b: (a, b), lambda a, b: {"a": a, "b": [b]}])
def test_several_tensors_count_alike_and_indices_not_at_all(pack: Any) -> None:
    boxes, scores, near, far = draw(40, 4), 100 * draw(40, seed=1), draw(40, 4, seed=2), 100 * draw(40, seed=3)
    found = relative_squared_loss(pack(boxes, scores))(pack(near, far), pack(boxes, scores), T)
    each = [relative_squared_loss(boxes)(near, boxes, T), relative_squared_loss(scores)(far, scores, T)]
    assert float(found) == pytest.approx(float(sum(each)) / 2)
    indices = torch.arange(40)
    assert float(relative_squared_loss((boxes, indices))((near, indices + 1), (boxes, indices), T)) == pytest.approx(
        float(each[0])
    )


@pytest.mark.parametrize(
    ("outputs", "target", "dim"),
    [
        ((6, 4), torch.zeros(6, dtype=torch.long), 1),
        ((6, 4, 5, 5), torch.zeros(6, 5, 5, dtype=torch.long), 1),  # segmentation
        ((6, 5, 4), torch.zeros(6, 5, dtype=torch.long), 2),  # a class for each token
        ((6, 5, 9), torch.zeros(6, 4, dtype=torch.long), 2),  # the next token, for one position less
        ((6, 1), torch.zeros(6, dtype=torch.long), None),  # one logit
        ((6,), torch.zeros(6, dtype=torch.long), None),
        ((6, 4), torch.zeros(6, 4), None),  # regression, or several labels
        ((6, 4), torch.zeros(6), None),
        ((6, 4), {"boxes": torch.zeros(6)}, None),
    ],
)
@pytest.mark.parametrize("pack", [lambda tensor: tensor, lambda tensor: {"logits": tensor, "none": None}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_distillation_loss_fits_the_kind_of_outputs(
    outputs: tuple[int, ...], target: Any, dim: int | None, dtype: torch.dtype, pack: Any
) -> None:
    expected, seen = draw(*outputs).to(dtype), draw(*outputs, seed=1)
    suited = relative_squared_loss(expected) if dim is None else kl_divergence_loss(dim)
    found = with_distillation_loss(classification(), pack(expected), target).distillation_loss
    assert found is not None
    apart = found(pack(seen), pack(expected), T)
    assert apart.dtype == torch.float32 and apart > 0
    assert torch.equal(apart, suited(seen, expected, T))


def test_outputs_without_real_numbers_are_an_error() -> None:
    with pytest.raises(ModelError, match="hold no real numbers"):
        with_distillation_loss(classification(), draw(5, 4).argmax(1), torch.zeros(5, dtype=torch.long))


@pytest.mark.parametrize(
    ("found", "said"), [(3, "a int"), (torch.ones(5), r"a tensor of shape \(5,\)"), (torch.tensor(math.nan), "nan")]
)
def test_a_distillation_loss_that_is_not_a_number_is_an_error(found: Any, said: str) -> None:
    task = Task(loss=torch.sub, metric=torch.sub, distillation_loss=lambda *_: found)
    with pytest.raises(DataError, match=f"task.*themselves is {said}.*one finite number"):
        with_distillation_loss(task, draw(5, 4), torch.zeros(5, dtype=torch.long))


def test_a_task_keeps_its_own() -> None:
    task = Task(loss=torch.sub, metric=torch.sub, distillation_loss=lambda *_: torch.tensor(7.0))
    assert with_distillation_loss(task, draw(5, 4), torch.zeros(5, dtype=torch.long)) is task
