"""The state of optimizers and schedules goes through text and tensors without a loss."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

from deploypipe.training.plain_state import from_text, to_text

OPTIMIZERS = (torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam)
SCHEDULES = {
    "one cycle": lambda o: schedules.OneCycleLR(o, max_lr=0.1, total_steps=9),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o),
    "one after the other": lambda o: schedules.SequentialLR(
        o, [schedules.ConstantLR(o), schedules.ExponentialLR(o, 0.9)], milestones=[2]
    ),
}


def stepped(kind: Any) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = kind(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert type(one) is type(other) and len(one) == len(other)
        for each, same in zip(one, other, strict=True):
            assert_same(each, same)
    else:
        assert type(one) is type(other) and one == other


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_states_of_optimizers_come_back(kind: Any) -> None:
    state = stepped(kind).state_dict()
    assert_same(state, from_text(*to_text(state)))
    other = stepped(kind)
    other.load_state_dict(from_text(*to_text(state)))
    assert_same(state, other.state_dict())


@pytest.mark.parametrize("name", SCHEDULES)
def test_states_of_schedules_come_back(name: str) -> None:
    state = SCHEDULES[name](stepped(torch.optim.SGD)).state_dict()
    assert_same(state, from_text(*to_text(state)))


@pytest.mark.parametrize("value", [{1, 2}, nn.Linear(1, 1), lambda: 1, b"bytes"])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=f"{type(value).__name__} is neither a tensor nor a plain value"):
        to_text({"held": value})
