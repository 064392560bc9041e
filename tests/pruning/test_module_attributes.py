"""Modules keep objects of any type in attributes. None of them may freeze a channel."""

import math
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deploypipe.errors import ModelError
from deploypipe.pruning.surgery.apply_plan import apply_plan, masked_dense
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.tracing import index_propagation
from deploypipe.pruning.tracing.structures import find_structures, list_structures
from deploypipe.records import PruningPlan, ScoreTable, Structures


class Hostile:
    """Like lazy objects, proxies and frames: every operation raises."""

    def _raise(self, *_: object) -> Any:
        raise RuntimeError("do not compare me")

    __eq__ = __ne__ = __bool__ = __len__ = __iter__ = __getattr__ = __getitem__ = __array__ = _raise
    __hash__ = __repr__ = __index__ = __int__ = _raise  # type: ignore[assignment]

    def __deepcopy__(self, memo: object) -> "Hostile":
        return self

    def __reduce__(self) -> Any:
        return Hostile, ()


class Keeper(nn.Module):
    """Has a value, and computes views and splits with sizes from attributes."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = self.sliding_value = value
        self.layer_idx = 0
        self.heads, self.head_dim, self.sizes = 4, 8, [24, 8]
        self.norm = nn.LayerNorm(32)
        self.conv = nn.Conv2d(16, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        first, second = self.norm(self.conv(x).movedim(1, -1)).movedim(-1, 1).split(self.sizes, 1)
        x = torch.cat([first, second], 1)
        return x.view(n, self.heads, self.head_dim, h * w).mean(1).view(n, -1, h, w)


VALUES: dict[str, Callable[[], object]] = {
    "array": lambda: np.array([0.5, 0.4, 0.3]),
    "tensor": lambda: torch.ones(3),
    "list of arrays": lambda: [np.ones(3), np.ones(3)],
    "tuple of tensors": lambda: (torch.ones(3), torch.ones(3)),
    "sizes and a tensor": lambda: [24, torch.ones(2)],
    "dict of tensors": lambda: {"a": torch.ones(3)},
    "hostile": Hostile,
    "list of hostile": lambda: [Hostile(), Hostile()],
    "nan": lambda: float("nan"),
}


def net(value: object) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), Keeper(value), nn.Conv2d(8, 24, 3), nn.Conv2d(24, 4, 3))


def halved(structures: Structures) -> PruningPlan:
    scores = {g.name: tuple(float(i) for i in range(g.num_units)) for g in structures.groups}
    widths = {g.name: max(1, g.num_units // 2) for g in structures.groups}
    return make_plan(structures, ScoreTable(scorer="order", channels=scores), widths)


def error_of_cutting(model: nn.Module, plan: PruningPlan, inputs: Tensor) -> float:
    with torch.no_grad():
        cut, masked = apply_plan(model, plan).eval()(inputs), masked_dense(model, plan).eval()(inputs)
    return float((cut - masked).abs().max() / masked.abs().max())


@pytest.mark.parametrize("kind", VALUES)
def test_attributes_of_unknown_types_do_not_freeze_channels(kind: str) -> None:
    inputs = torch.randn(2, 3, 10, 10)
    model, plain = net(VALUES[kind]()), net(None)
    structures = list_structures(model, inputs)
    assert structures.groups == list_structures(plain, inputs).groups
    assert {"0", "3"} <= {group.name for group in structures.groups}
    plan = halved(structures)
    assert error_of_cutting(model, plan, inputs) < 1e-4
    assert apply_plan(model, plan)[2].value is not None


class Heads(nn.Module):
    """As in detectors: anchors and strides are plain tensors, computed again if the input shape changes."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.shape: torch.Size | None = None
        self.anchors, self.strides = torch.empty(0), torch.empty(0)
        self.stride = torch.tensor([8.0, 16.0])
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(w, 24, 3, padding=1), nn.SiLU(), nn.Conv2d(24, 6, 1)) for w in widths
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        found = [branch(x) for branch, x in zip(self.branches, features, strict=True)]
        if self.shape != found[0].shape:
            sizes = [x.shape[-2:].numel() for x in found]
            self.anchors = torch.cat([torch.arange(n, dtype=torch.float32) for n in sizes])
            self.strides = torch.cat([s.expand(n) for s, n in zip(self.stride, sizes, strict=True)])
            self.shape = found[0].shape
        return (torch.cat([x.flatten(2) for x in found], 2) + self.anchors) * self.strides


class CrossStage(nn.Module):
    """A block that continues with one part of a split by a stored width (C2f)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c = width // 2
        self.first, self.last = nn.Conv2d(width, width, 1), nn.Conv2d(3 * self.c, width, 1)
        self.inner = nn.Sequential(nn.Conv2d(self.c, self.c, 3, padding=1), nn.BatchNorm2d(self.c), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).split((self.c, self.c), 1))
        parts.append(self.inner(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
        self.first, self.second = CrossStage(16), CrossStage(32)
        self.detect = Heads((16, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        return self.detect([x, self.second(self.down(x))])


def test_a_detector_with_anchors_in_attributes_can_shrink_everywhere() -> None:
    torch.manual_seed(0)
    model, inputs = Detector().eval(), torch.randn(2, 3, 32, 32)
    model(inputs[:, :, :16])  # it holds anchors of another size now
    plan = halved(list_structures(model, inputs))
    changed = {edit.module for edit in plan.edits}
    assert {"stem", "down", "first.first", "second.inner.0", "detect.branches.0.0", "detect.branches.1.0"} <= changed
    for other in (inputs, torch.randn(3, 3, 48, 64)):
        assert error_of_cutting(model, plan, other) < 1e-4


def test_a_failing_rule_is_named_and_freezes_only_what_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Any:
        raise ValueError("no such axis")

    monkeypatch.setitem(index_propagation.RULES, "glu", broken)  # type: ignore[arg-type]
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.GLU(), nn.Linear(4, 2))
    found = find_structures(model, torch.randn(2, 6))
    assert [group.name for group in found.groups] == ["0"]
    (reason,) = [row.reason for row in found.frozen if row.name == "2"]
    assert "deploypipe's own rule fails (ValueError: no such axis)" in reason
    assert not any("could not be traced" in row.reason for row in found.frozen)


class Remembering(nn.Module):
    """Stores results of its last pass, as networks do that expose their attention."""

    def __init__(self, other: object = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.other = nn.Linear(5, 8), nn.Linear(8, 3), other
        self.features: list[Tensor] = []
        self.seen: dict[str, object] = {}
        self.register_buffer("mean", torch.zeros(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        self.features, self.seen = [x], {"shown": SimpleNamespace(attention=x)}
        return self.last(x.relu())


def test_a_network_that_stores_results_of_a_pass_can_shrink() -> None:
    model, inputs = Remembering(other=math).eval(), torch.randn(4, 5)
    model(inputs)  # with gradients
    plan = halved(list_structures(model, inputs))
    model(inputs)
    pruned = apply_plan(model, plan)
    assert pruned.first.out_features == 4
    assert pruned.other is math
    model(inputs)
    assert error_of_cutting(model, plan, inputs) < 1e-5


def test_an_attribute_that_cannot_be_copied_is_an_error_with_its_name() -> None:
    model = nn.Sequential(Remembering(other=[open(os.devnull)]), nn.Linear(3, 2))  # noqa: SIM115
    with pytest.raises(ModelError, match=r"cannot be copied: 0\.other is a list \(TypeError: cannot pickle '_io"):
        list_structures(model, torch.randn(4, 5))
