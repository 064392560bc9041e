"""The network decides between AdamW and SGD; a task's own optimizer, schedule and training step take their place."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline as tiny
import torch
from multi_rank_child import CASES, UNEVEN, Case, Shuffled, own_step, train
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

from deploypipe import check
from deploypipe.data import TensorBatches
from deploypipe.errors import ConfigError, DataError, PipelineError
from deploypipe.recipe import Finetune
from deploypipe.stages.compression import own_training
from deploypipe.task import Splits, Task, classification, forward
from deploypipe.training.optimizers import find_optimizer, make_optimizer, with_optimizer
from deploypipe.training.schedules import rate_share
from deploypipe.training.trial_step import try_own_training

SETTINGS = Finetune(num_epochs=3, precision="fp32", average_decay=0.5, distil_weight=0.3)
OWN = CASES["own training"]


def convnext() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.LayerNorm([8, 8, 8]), nn.Conv2d(8, 8, 7, groups=8))


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2), "adamw"),
        (convnext(), "adamw"),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.LayerNorm(8)), "sgd"),
        (nn.LSTM(4, 4), "sgd"),
    ],
    ids=["transformer", "ConvNeXt", "batch norms", "LSTM"],
)
def test_the_network_decides(network: nn.Module, expected: str) -> None:
    assert find_optimizer(network)[0] == expected
    settings = with_optimizer(Finetune(), network, classification())
    optimizer = make_optimizer(network, classification(), settings)
    assert type(optimizer) is {"adamw": AdamW, "sgd": SGD}[expected]
    assert settings.learning_rate == {"adamw": 1e-4, "sgd": 0.006}[expected]
    assert with_optimizer(Finetune(optimizer="sgd", learning_rate=0.5), network, classification()).learning_rate == 0.5


def test_adamw_decays_matrices_alone() -> None:
    network = nn.TransformerEncoderLayer(8, 2)
    optimizer = make_optimizer(network, classification(), with_optimizer(Finetune(), network, classification()))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: decays[id(parameter)] for name, parameter in network.named_parameters()}
    assert len(found) == len(decays)
    assert {name for name, decay in found.items() if decay} == {
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    }


@pytest.mark.parametrize(("schedule", "half"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_a_schedule_warms_up_and_decays(schedule: Any, half: float) -> None:
    shares = [rate_share(replace(SETTINGS, schedule=schedule, warmup_share=0.2), step, 100) for step in range(101)]
    assert shares[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert shares[60] == pytest.approx(half)
    assert shares[100] == pytest.approx(0.0 if schedule != "constant" else 1.0)


def test_a_training_step_that_says_the_same_trains_the_same() -> None:
    """The product's own loss, written as a user's step, with the product's own optimizer and rates."""
    settings = replace(SETTINGS, mix_share=0.0, learning_rate=0.05)
    task = classification()

    def step(model: nn.Module, batch: Any, teacher_outputs: Any) -> Tensor:
        inputs, target = batch
        outputs = forward(model, inputs)
        soft = F.kl_div(
            F.log_softmax(outputs / 4.0, 1),
            F.log_softmax(teacher_outputs / 4.0, 1),
            log_target=True,
            reduction="batchmean",
        )
        return 0.7 * F.cross_entropy(outputs, target) + 0.3 * 16.0 * soft

    def optimizer(model: nn.Module) -> Optimizer:
        return SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def schedule(optimizer: Optimizer, num_steps: int) -> LambdaLR:
        return LambdaLR(optimizer, lambda done: rate_share(settings, done, num_steps))

    plain, expected = train(Case(settings=settings))
    own = replace(task, training_step=step, optimizer=optimizer, schedule=schedule)
    tuned, log = train(Case(settings=settings, task=own))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(tuned.state_dict()[name], value)
    assert [epoch.learning_rate for epoch in log.epochs] == [epoch.learning_rate for epoch in expected.epochs]
    assert expected.optimizer == "SGD, cosine"
    assert log.optimizer == "SGD of task(), LambdaLR of task(), training_step of task()"


def test_without_a_teacher_a_training_step_is_given_none() -> None:
    seen = []

    def step(model: nn.Module, batch: Any, teacher_outputs: Any) -> Tensor:
        seen.append(teacher_outputs)
        return F.cross_entropy(model(batch[0]), batch[1])

    settings = replace(SETTINGS, num_epochs=1, distil_weight=0.0, learning_rate=0.05)
    train(Case(settings=settings, task=replace(classification(), training_step=step)))
    assert seen == [None] * 4


@pytest.mark.parametrize(
    "case",
    [Case(settings=replace(SETTINGS, optimizer="adamw", schedule="linear")), OWN],
    ids=["AdamW of the recipe", "all of the task"],
)
@pytest.mark.parametrize("fail_in", [2, 3])
def test_a_killed_training_ends_bit_for_bit_where_an_undisturbed_one_does(
    case: Case, fail_in: int, tmp_path: Path
) -> None:
    def fail(epoch: int, number: int) -> None:
        if (epoch, number) == (fail_in, 2):
            raise OSError("the disk is gone")

    with pytest.raises(DataError, match="disk"):
        train(replace(case, train=Shuffled(UNEVEN, fail)), checkpoint=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"epoch-{fail_in - 1}.safetensors"]
    resumed, log = train(replace(case, train=Shuffled(UNEVEN)), checkpoint=tmp_path)
    whole, expected = train(replace(case, train=Shuffled(UNEVEN)))
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
    for one, other in zip(log.epochs[1:], expected.epochs[1:], strict=True):
        assert (one.learning_rate, one.train_loss) == (other.learning_rate, other.train_loss)


class Stuck(SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise RuntimeError("no more")


class Hoarder(SGD):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "helper": SETTINGS}


def of(kind: Callable[..., Any]) -> Callable[[nn.Module], Any]:
    return lambda model: kind(model.parameters(), lr=0.1)


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"optimizer": "adamw"}, r"task\(\).optimizer must be a function, got a str"),
    (
        {"optimizer": lambda model: 1 / 0},
        r"test_own_training.py, line \d+ .*task\(\).optimizer raised ZeroDivisionError",
    ),
    ({"optimizer": lambda model: model}, r"task\(\).optimizer returned a Network; return an optimizer, such as torch"),
    (
        {"optimizer": lambda model: SGD(tiny.Network().parameters(), lr=1)},
        "with parameters of another network; make it",
    ),
    ({"optimizer": of(Stuck)}, r"the optimizer of task\(\).optimizer, in step\(\), raised RuntimeError: no more"),
    ({"optimizer": of(Hoarder)}, r"the optimizer of task\(\).optimizer keeps more than tensors"),
    ({"schedule": lambda optimizer, steps: None}, r"task\(\).schedule returned None; return a schedule"),
    (
        {"schedule": lambda optimizer, steps: ReduceLROnPlateau(optimizer)},
        r"the schedule of task\(\).schedule, in step\(\), raised TypeError.*return one whose step\(\) takes",
    ),
    (
        {"schedule": lambda optimizer, steps: one_cycle(SGD(tiny.Network().parameters(), lr=1), steps)},
        r"task\(\).schedule returned a schedule of another optimizer.*make it from the optimizer that it is given",
    ),
    (
        {"schedule": lambda optimizer, steps: one_cycle(optimizer, steps - 1)},
        r"the schedule of task\(\).schedule, in step\(\) number \d+ of \d+, raised ValueError.*for the num_steps",
    ),
    ({"training_step": lambda model, batch: None}, r"task\(\).training_step raised TypeError"),
    ({"training_step": lambda model, batch, _: model(batch[0])}, r"task\(\).training_step returned a tensor of shape"),
    (
        {"training_step": lambda model, batch, _: F.cross_entropy(model(batch[0]).detach(), batch[1])},
        r"task\(\).training_step cannot be differentiated",
    ),
    (
        {"training_step": lambda model, batch, _: model(batch[0]).sum() / 0},
        r"task\(\).training_step returned -?(inf|nan) on the first batch",
    ),
]


@pytest.mark.parametrize(("functions", "told"), FAULTS, ids=[told[:60] for _, told in FAULTS])
def test_a_faulty_function_is_named_before_the_run(functions: dict[str, Any], told: str) -> None:
    (complaint,) = look(replace(classification(), **functions))
    assert re.search(told, complaint), complaint


def look(task: Task, recipe: Any = None) -> tuple[str, ...]:
    torch.manual_seed(0)
    data = TensorBatches(*tiny.images(64, seed=1), 16)
    splits = Splits(calib=data, train=data, val=data, test=data)
    return check(tiny.Network().eval(), splits, task, recipe or tiny.recipe(), tiny.target()).complaints


def test_functions_that_work_pass_the_check() -> None:
    assert look(replace(classification(), optimizer=of(AdamW), schedule=one_cycle, training_step=own_step)) == ()


def test_parameters_that_no_optimizer_trains_are_noted() -> None:
    """The schedule is tried for as many steps as fine-tuning makes, whatever number of them it was made for."""
    network = tiny.Network()
    own = replace(classification(), optimizer=lambda model: SGD([next(model.parameters())], lr=0.1), schedule=one_cycle)
    batch = next(iter(TensorBatches(*tiny.images(16, seed=1), 16)))
    (note,) = try_own_training(network, own, SETTINGS, batch, 7)
    first, total = next(network.parameters()).numel(), sum(p.numel() for p in network.parameters())
    assert f"holds {first:,} of {total:,} trainable parameters ({first / total:.1%})" in note
    whole = replace(own, optimizer=of(SGD))
    assert try_own_training(network, whole, SETTINGS, batch, 7) == []
    fixed = replace(whole, schedule=lambda optimizer, _: one_cycle(optimizer, 20))
    with pytest.raises(PipelineError, match="number 21 of 21"):
        try_own_training(network, fixed, SETTINGS, batch, 7)


def one_cycle(optimizer: Optimizer, num_steps: int) -> OneCycleLR:
    return OneCycleLR(optimizer, 0.1, num_steps)


def test_two_optimizers_are_one_too_many() -> None:
    recipe = replace(tiny.recipe(), finetune=replace(tiny.recipe().finetune, optimizer="sgd"))
    (complaint,) = look(replace(classification(), optimizer=of(AdamW)), recipe)
    assert "finetune.optimizer: is 'sgd', but task() returns an optimizer of its own; write 'auto'" in complaint
    with pytest.raises(ConfigError):
        with_optimizer(recipe.finetune, tiny.Network(), replace(classification(), optimizer=of(AdamW)))


def test_an_optimizer_that_fails_in_the_middle_is_named() -> None:
    class Tired(SGD):
        def step(self, closure: Any = None) -> Any:
            self.count = getattr(self, "count", 0) + 1
            if self.count == 3:
                raise ValueError("tired")
            return super().step(closure)

    with pytest.raises(
        PipelineError, match=r"the optimizer of task\(\).optimizer, in step\(\), raised ValueError: tired"
    ):
        train(Case(settings=SETTINGS, task=replace(classification(), optimizer=of(Tired))))


def test_another_text_of_a_function_is_another_key() -> None:
    one = own_training(replace(classification(), optimizer=lambda model: SGD(model.parameters(), lr=0.1)))
    other = own_training(replace(classification(), optimizer=lambda model: SGD(model.parameters(), lr=0.2)))
    assert one.keys() == {"optimizer"} and one != other and own_training(classification()) == {}
