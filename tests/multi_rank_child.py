"""One process of a job of several: `python -m torch.distributed.run ... multi_rank_child.py all|job FOLDER`.

`all`: every case of `CASES` is trained on all ranks, and what each gets is written to FOLDER; then what must fail is
tried. `job`: rank 0 leads the training of a pruned network with checkpoints in FOLDER; with KILL in the environment,
rank 1 kills itself in the second epoch.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from deploypipe.errors import DeploypipeError
from deploypipe.files.hashing import digest
from deploypipe.files.json_records import to_json
from deploypipe.networks.fingerprints import model_fingerprint
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.recipe import Finetune
from deploypipe.records import Edit, PruningPlan
from deploypipe.task import Batch, Splits, Task, classification
from deploypipe.training import multi_rank_finetune
from deploypipe.training.finetune import finetune
from deploypipe.training.ranks import Ranks, join

SETTINGS = Finetune(num_epochs=3, learning_rate=0.05, precision="fp32", average_decay=0.5, distil_weight=0.3)


class Network(nn.Module):
    """Without batch norm, and with a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 6, 3), nn.Linear(24, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, image: Tensor) -> Tensor:
        return self.linear(F.relu(self.conv(image)).flatten(1))


class Normed(Network):
    """With two layers that depend on which samples are passed at once, or on chance."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm2d(6), nn.Dropout(0.3)

    def forward(self, image: Tensor) -> Tensor:
        return self.linear(self.dropout(F.relu(self.norm(self.conv(image)))).flatten(1))


def network(seed: int, kind: type[nn.Module] = Network) -> nn.Module:
    torch.manual_seed(seed)
    return kind()


def batches(sizes: list[int], seed: int) -> list[Batch]:
    """Three patterns in noise."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 3, (sum(sizes),), generator=generator)
    patterns = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(99))
    inputs = patterns[target] + 0.7 * torch.randn(sum(sizes), 1, 4, 4, generator=generator)
    return list(zip(inputs.split(sizes), target.split(sizes), strict=True))


class Shuffled:
    """Other batches every epoch, drawn from torch's generator; `at_batch` is called before each."""

    def __init__(self, sizes: list[int], at_batch: Callable[[int, int], None] = lambda epoch, number: None) -> None:
        self.sizes, self.at_batch, self.epoch = sizes, at_batch, 0
        self.inputs, self.target = (torch.cat(part) for part in zip(*batches(sizes, 0), strict=True))

    def __len__(self) -> int:
        return len(self.sizes)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.target))
        for number, rows in enumerate(order.split(self.sizes)):
            self.at_batch(self.epoch, number)
            yield self.inputs[rows], self.target[rows]


class Packed(Shuffled):
    """The same with named inputs and two targets."""

    def __iter__(self) -> Iterator[Batch]:
        for inputs, target in super().__iter__():
            yield {"image": inputs}, (target, target.flip(0))


def two_losses(outputs: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(outputs, target[0]) + 0.5 * F.cross_entropy(outputs, target[1])


def log_likelihood(outputs: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    return -F.cross_entropy(outputs, target[0], reduction="none")


def own_step(model: nn.Module, batch: Batch, teacher_outputs: Any) -> Tensor:
    inputs, target = batch
    outputs = model(inputs)
    return F.cross_entropy(outputs, target) + 0.1 * F.mse_loss(outputs, teacher_outputs)


def own_optimizer(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=0.05, eps=1e-2)  # a small eps would magnify the order of a sum


def own_schedule(optimizer: Optimizer, num_steps: int) -> OneCycleLR:
    return OneCycleLR(optimizer, 0.05, num_steps)


EVEN, UNEVEN = [16] * 4, [15, 15, 8, 3, 1]  # the last two: fewer samples than parts, and than ranks
PACKED = replace(classification(), loss=two_losses, metric=log_likelihood)


@dataclass(frozen=True, kw_only=True)
class Case:
    train: Any = field(default_factory=lambda: Shuffled(EVEN))
    val: Any = field(default_factory=lambda: batches([16, 30, 5], 1))
    task: Task = field(default_factory=classification)
    settings: Finetune = SETTINGS
    kind: type[nn.Module] = Network


CASES = {
    "even": Case(),
    "uneven": Case(train=Shuffled(UNEVEN)),
    "parts": Case(train=Shuffled(UNEVEN), settings=replace(SETTINGS, accumulate=3)),
    "own training": Case(
        train=Shuffled(UNEVEN),
        task=replace(classification(), optimizer=own_optimizer, schedule=own_schedule, training_step=own_step),
    ),
    "packed": Case(train=Packed(UNEVEN), val=[({"image": x}, (y, y)) for x, y in batches([16, 5, 5], 1)], task=PACKED),
}


def train(case: Case, **options: Any) -> Any:
    splits = Splits(calib=[], train=case.train, val=case.val, test=[])
    start, teacher = network(0, case.kind), network(1, case.kind)
    return finetune(start, teacher, splits, case.task, case.settings, seed=5, **options)


def counted(case: Case, losses: list[int], metrics: list[int]) -> Case:
    """The same; the number of samples of each loss and metric goes to the lists."""

    def loss(outputs: Tensor, target: Any) -> Tensor:
        losses.append(len(outputs))
        return case.task.loss(outputs, target)

    def metric(outputs: Tensor, target: Any) -> Tensor:
        metrics.append(len(outputs))
        return case.task.metric(outputs, target)

    return replace(case, task=replace(case.task, loss=loss, metric=metric))


PLAN = PruningPlan(
    model_fingerprint=model_fingerprint(network(1)),
    cuts=(),
    edits=(Edit(module="conv", side="out", removed=(2,)), Edit(module="linear", side="in", removed=(8, 9, 10, 11))),
    blocks=(),
)


def pruned() -> nn.Module:
    """As a repair leaves it: not what the plan alone makes."""
    model = apply_plan(network(1), PLAN)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    return model


def job_splits(at_batch: Callable[[int, int], None] = lambda epoch, number: None) -> Splits:
    return Splits(calib=[], train=Shuffled(UNEVEN, at_batch), val=batches([16, 5], 1), test=[])


def write(folder: Path, name: str, outcome: Any) -> None:
    model, log = outcome
    save_file(model.state_dict(), folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(to_json(log), encoding="utf-8")


def run_all(ranks: Ranks, folder: Path) -> None:
    for name, case in CASES.items():
        checkpoint, losses, metrics = folder / f"{name}-{ranks.rank}", [], []
        checkpoint.mkdir()
        write(folder, checkpoint.name, train(counted(case, losses, metrics), checkpoint=checkpoint, ranks=ranks))
        (checkpoint / "seen.json").write_text(json.dumps([losses, metrics]), encoding="utf-8")
    states: list[str] = []
    loader = Shuffled(UNEVEN[:-1], lambda epoch, number: states.append(digest(torch.random.get_rng_state().tolist())))
    write(folder, f"normed-{ranks.rank}", train(Case(train=loader, kind=Normed), ranks=ranks))
    (folder / f"states-{ranks.rank}.json").write_text(json.dumps(states), encoding="utf-8")

    def other(size: int) -> Splits:
        return Splits(calib=batches([4], ranks.rank), train=batches([size], 0), val=[], test=[])

    def same(size: int) -> Splits:
        return Splits(calib=[], train=batches([size], 0), val=[], test=[])

    def replay() -> None:
        if not ranks.is_first:
            multi_rank_finetune.apply_plan = lambda dense, plan: network(3)
        lead_or_serve(ranks, folder, job_splits())

    def with_nan() -> list[Batch]:
        train = batches(EVEN, 0)
        train[1][0][13] = float("nan")  # of the second rank's part
        return train

    failures: dict[str, Callable[[], object]] = {
        "order": lambda: train(Case(train=batches(EVEN, ranks.rank)), ranks=ranks),
        "number": lambda: train(Case(train=batches(EVEN[ranks.rank :], 0)), ranks=ranks),
        "others": lambda: multi_rank_finetune.agree(ranks, network(ranks.rank), other(2), str(ranks.rank)),
        "few": lambda: multi_rank_finetune.agree(ranks, network(0), same(1), ""),
        "replay": replay,
        "nan": lambda: train(Case(train=with_nan()), ranks=ranks),
    }
    for name, act in failures.items():
        try:
            act()
        except DeploypipeError as error:
            (folder / f"{name}-{ranks.rank}.txt").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
    multi_rank_finetune.agree(ranks, network(0), same(2), "")


def lead_or_serve(ranks: Ranks, folder: Path, splits: Splits) -> None:
    dense, task = network(1), classification()
    if not ranks.is_first:

        def followed(start: nn.Module, *arguments: Any, **options: Any) -> Any:
            (folder / "start.txt").write_text(model_fingerprint(start), encoding="utf-8")
            return finetune(start, *arguments, **options)

        multi_rank_finetune.finetune = followed
        multi_rank_finetune.serve(ranks, dense, splits, task)
        return
    options = {"checkpoint": folder, "seed": 5, "ranks": ranks}
    outcome = multi_rank_finetune.finetune_together(pruned(), PLAN, dense, splits, task, SETTINGS, **options)
    write(folder, "tuned", outcome)
    multi_rank_finetune.dismiss(ranks)


def main() -> None:
    torch.set_num_threads(1)
    mode, folder = sys.argv[1], Path(sys.argv[2])
    ranks = join()
    if mode == "all":
        run_all(ranks, folder)
        return

    def at_batch(epoch: int, number: int) -> None:
        if "KILL" in os.environ and (ranks.rank, epoch, number) == (1, 2, 2):
            os.kill(os.getpid(), signal.SIGKILL)

    lead_or_serve(ranks, folder, job_splits(at_batch))
    ranks.check_equal({"place": "all are through"}, "")


if __name__ == "__main__":
    main()
