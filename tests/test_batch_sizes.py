"""Batches that differ in number, length and size of their samples go through every stage."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe import compress
from deploypipe.errors import ModelError
from deploypipe.observe.calibration_pass import observe_activations
from deploypipe.pruning.repair import least_squares_repair as repairing
from deploypipe.pruning.repair.affine_paths import find_paths
from deploypipe.pruning.repair.batches_in_lockstep import run_in_lockstep
from deploypipe.pruning.repair.least_squares_repair import repair
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import Finetune, Magnitude, Observe, Recipe, Repair, Search
from deploypipe.records import PruningPlan
from deploypipe.scoring import score
from deploypipe.search.allocation.loss_curves import measure_curves
from deploypipe.target import Budget, Target
from deploypipe.task import Batch, Splits, Task, stack_alike


class Tagger(nn.Module):
    """A label for each token of sentences that are padded to the longest of their batch."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(30, 16), nn.Parameter(torch.randn(1, 12, 16))
        self.hidden, self.head = nn.Linear(16, 32), nn.Linear(32, 5)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places[:, : ids.shape[1]]
        x = x * attention_mask[..., None]
        return self.head((self.hidden(x) + x.mean(1, keepdim=True).repeat(1, 1, 2)).relu())


class Segments(nn.Module):
    """A value for each pixel of images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b, self.c = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x)).relu()
        return self.c(self.b(x).relu() + x)


def sentences() -> list[Batch]:
    torch.manual_seed(0)
    batches = []
    for count, length in ((8, 5), (6, 9), (8, 12), (3, 9)):
        mask = (torch.arange(length) < torch.randint(3, length + 1, (count, 1))).float()
        inputs = {"ids": torch.randint(0, 30, (count, length)), "attention_mask": mask}
        batches.append((inputs, torch.randint(0, 5, (count, length))))
    return batches


def images() -> list[Batch]:
    torch.manual_seed(0)
    sizes = ((8, 6, 6), (5, 10, 8), (8, 8, 12))
    return [(torch.randn(n, 3, h, w), torch.randint(0, 4, (n, h, w))) for n, h, w in sizes]


def per_position(dim: int) -> Task:
    return Task(
        loss=lambda outputs, y: F.cross_entropy(outputs.movedim(dim, 1), y),
        metric=lambda outputs, y: (outputs.argmax(dim) == y).float().flatten(1).mean(1),
    )


NETWORKS: list[tuple[Callable[[], nn.Module], Callable[[], list[Batch]], int]] = [
    (Tagger, sentences, -1),
    (Segments, images, 1),
]


def halved(model: nn.Module, inputs: Any) -> PruningPlan:
    structures = list_structures(model, inputs)
    scores = score(model, structures, None, Magnitude())
    return make_plan(structures, scores, {g.name: g.num_units // 2 for g in structures.groups})


@pytest.mark.parametrize(("build", "load", "dim"), NETWORKS[:1])
def test_a_run_takes_batches_of_unlike_sizes(build: Any, load: Any, dim: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = load()
    result = compress(
        build().eval(),
        Splits(calib=batches, train=batches, val=batches, test=batches),
        per_position(dim),
        Recipe(search=Search(num_trials=1, num_timed=8, num_finalists=1), finetune=Finetune(num_epochs=1)),
        Target(runtime="onnxruntime", num_latency_samples=200, budget=Budget(macs="0.7x", accuracy_drop_pp=100.0)),
        tmp_path,
    )
    assert result.benchmark.compressed.num_macs <= 0.7 * result.benchmark.dense.num_macs
    assert result.repair and any(row.error_after < row.error_before for row in result.repair.rows if not row.reason)


@pytest.mark.parametrize(("build", "load", "dim"), NETWORKS)
def test_repair_in_step_solves_what_one_batch_would(
    build: Any, load: Any, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    num_threads = threading.active_count()
    dense, batch = build().eval(), load()[0]
    if dim < 0:  # of samples with padding, positions are drawn again, as often as the longest of the group has it
        batch[0]["attention_mask"].fill_(1)
    cut = [({k: v[i::2] for k, v in batch[0].items()} if dim < 0 else batch[0][i::2], batch[1][i::2]) for i in (0, 1)]
    plan = halved(dense, batch[0])
    settings = Repair(positions_per_sample=10_000)
    whole, report = repair(dense, apply_plan(dense, plan), plan, cut, settings)
    monkeypatch.setattr(repairing, "stack_alike", list)
    in_step, other = repair(dense, apply_plan(dense, plan), plan, cut, settings)
    assert any(row.error_after < row.error_before for row in report.rows if not row.reason)
    assert [row.module for row in report.rows] == [row.module for row in other.rows]
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(in_step.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert threading.active_count() == num_threads


@pytest.mark.parametrize(("build", "load", "dim"), NETWORKS)
def test_curves_weigh_every_sample_alike(build: Any, load: Any, dim: int) -> None:
    torch.manual_seed(0)
    model, batches = build().eval(), load()
    structures = list_structures(model, batches[0][0])
    scores = score(model, structures, None, Magnitude())
    moments = observe_activations(model, structures, batches, Observe())

    def losses(part: list[Batch]) -> Tensor:
        measured = measure_curves(
            model,
            structures,
            scores,
            moments,
            part,
            Search(),
            distillation_loss=lambda a, b, t: (a - b).square().mean(),
        )
        return torch.tensor([loss for curve in measured.curves for loss in curve.losses])

    groups = [[batch] for batch in batches]
    sizes = [len(batch[1]) for batch in batches]
    expected = sum(size * losses(group) for size, group in zip(sizes, groups, strict=True)) / sum(sizes)
    torch.testing.assert_close(losses(batches), expected)


def test_batches_that_are_alike_are_stacked() -> None:
    a, b, c = torch.zeros(2, 5), torch.ones(3, 5), torch.zeros(2, 7)
    assert [len(group) for group in stack_alike([a, c, b])] == [5, 2]
    flags = [{"x": a, "step": 1}, {"x": b, "step": 2}, {"x": b, "step": 1}]
    assert [(len(group["x"]), group["step"]) for group in stack_alike(flags)] == [(5, 1), (3, 2)]


class Choosy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 7:
            raise RuntimeError("no sentences of seven")
        return self.b(self.a(x)) if x.shape[1] > 5 else self.a(self.b(x))


@pytest.mark.parametrize(("length", "error"), [(3, ModelError), (7, RuntimeError)])
def test_a_pass_that_cannot_go_in_step_ends_all_of_them(length: int, error: type[Exception]) -> None:
    num_threads = threading.active_count()
    model, first, second = Choosy(), torch.randn(2, 6, 4), torch.randn(2, length, 4)
    paths = find_paths(model, first)
    with pytest.raises(error, match=r"run through other layers|no sentences of seven"):
        run_in_lockstep(model, paths, lambda ends: [end.value for end in ends], [lambda: first, lambda: second])
    assert threading.active_count() == num_threads
