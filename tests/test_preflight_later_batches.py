"""What a run would meet late, in a later batch or another split, is named by the check; so is what a task returns."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline as tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe import check
from deploypipe.checked_splits import wrap_splits
from deploypipe.data import TensorBatches
from deploypipe.errors import PipelineError
from deploypipe.preflight import CheckReport, check_inputs
from deploypipe.pruning.surgery.plan import empty_plan
from deploypipe.pruning.surgery.saved_network import load_saved, save_pruned
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.task import Splits, Task, classification

SPLITS = ("calib", "train", "val", "test")
X, Y = tiny.images(64, seed=1)
GOOD = TensorBatches(X, Y, 16)


class Words(nn.Module):
    """Twelve words, eight positions."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions, self.head = nn.Embedding(12, 8), nn.Embedding(8, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head((self.words(ids) + self.positions(torch.arange(ids.shape[1]))).mean(1))
        return found


def sentences(length: int = 6, count: int = 8) -> tuple[Tensor, Tensor]:
    return torch.arange(count * length).reshape(count, length) % 12, torch.arange(count) % 4


def with_id(word: int) -> list[tuple[Tensor, Tensor]]:
    batches = [sentences() for _ in range(3)]
    batches[2][0][5, 1] = word
    return batches


def look(model: nn.Module, task: Task | None = None, **splits: Any) -> CheckReport:
    return check(model, Splits(**splits), task or classification(), tiny.recipe(), tiny.target())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"test": [sentences(), sentences(9)]},
            r"of the test split, batch 1 \(\(2, 9\) int64\): IndexError",
        ),
        (
            {"test": [sentences(4)]},
            r"test split has inputs 'ids' of shape \[8, 4\], but calib and val always",
        ),
        ({"val": with_id(70)}, r"of the val split, batch 2, inputs up to 70 .* IndexError"),
        ({"train": with_id(-1)}, r"of the train split, batch 2, inputs down to -1 .* IndexError"),
        ({"test": [(x.int(), y) for x, y in with_id(1)]}, r"torch.int64 in calib and .* torch.int32 in test"),
        (
            {"val": [sentences(), (sentences()[0].int(), Y[:8])]},
            r"torch.int64 in the first batch and torch.int32",
        ),
    ],
)
def test_later_batches_that_the_network_cannot_take_are_named(changed: dict[str, Any], said: str) -> None:
    torch.manual_seed(0)
    good = [sentences() for _ in range(3)]
    (complaint,) = look(Words().eval(), **{**dict.fromkeys(SPLITS, good), **changed}).complaints
    assert re.search(said, complaint), complaint


def test_labels_of_a_later_batch_that_a_loss_refuses_are_named() -> None:
    late = [(X[:16], Y[:16]), (X[16:32], Y[16:32].clone())]
    late[1][1][7] = 9
    own = Task(loss=F.cross_entropy, metric=lambda out, y: (out.argmax(1) == y).float())
    (complaint,) = look(tiny.Network().eval(), own, **{**dict.fromkeys(SPLITS, GOOD), "train": late}).complaints
    assert "the train split, batch 1, target up to 9" in complaint and "task().loss raised IndexError" in complaint


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = tiny.Network()

    def forward(self, x: Tensor, scale: float) -> Tensor:
        found: Tensor = self.net(x) * scale
        return found


def test_a_number_that_differs_between_splits_is_named_for_it_is_a_constant_of_the_file() -> None:
    def scaled(by: float) -> list[tuple[Any, Tensor]]:
        return [((X[:16], by), Y[:16])]

    (complaint,) = look(Scaled().eval(), **{**dict.fromkeys(SPLITS, scaled(0.5)), "val": scaled(0.7)}).complaints
    assert "inputs[1] is 0.5 in calib and 0.7 in val" in complaint


@pytest.mark.parametrize("kind", [torch.float64, torch.uint8])
def test_inputs_that_a_cast_mends_are_told_so(kind: torch.dtype) -> None:
    cast = [(X[:16].to(kind), Y[:16])]
    (complaint,) = look(tiny.Network().eval(), **{**dict.fromkeys(SPLITS, GOOD), "val": cast}).complaints
    assert f"load_data() gives {kind}: write x.float()" in complaint


def right(outputs: Tensor, target: Tensor) -> Tensor:
    return (outputs.argmax(1) == target).float()


FUNCTIONS: list[tuple[str, Callable[..., Any], str]] = [
    ("metric", lambda out, y: right(out, y).mean().item(), "task().metric returned a float; return a tensor with one"),
    ("metric", lambda out, y: right(out, y).tolist(), "task().metric returned a list"),
    (
        "metric",
        lambda out, y: right(out, y).to(torch.complex64),
        "task().metric returned a tensor of shape (2,) (com",
    ),
    ("slices", lambda x, y: None, "task().slices returned None; return a dict"),
    ("slices", lambda x, y: {"zero": (y == 0).tolist()}, "task().slices returned a list for slice 'zero'"),
    ("slices", lambda x, y: {0: y == 0, "one": y == 1}, "returned the slice name 0, which is not text; write str(...)"),
    (
        "real_tokens",
        lambda x: [[True]],
        "task().real_tokens returned a list; return a tensor of shape (samples, tokens)",
    ),
    ("real_tokens", lambda x: torch.zeros(len(x), 6), "task().real_tokens is False at every position of two samples"),
    ("distillation_loss", lambda a, b, t: -F.mse_loss(a, b), "samples; make it smaller for closer outputs"),
    (
        "distillation_loss",
        lambda a, b, t: F.mse_loss(a, b).detach(),
        "task().distillation_loss cannot be differentiated",
    ),
]


@pytest.mark.parametrize(("name", "function", "said"), FUNCTIONS)
def test_what_the_functions_of_a_task_return_is_checked(name: str, function: Any, said: str) -> None:
    plain = Task(loss=F.cross_entropy, metric=right)
    report = look(tiny.Network().eval(), replace(plain, **{name: function}), **dict.fromkeys(SPLITS, GOOD))
    assert report.complaints and all(said in complaint for complaint in report.complaints), report.complaints


def test_a_task_without_a_function_and_class_names_of_another_number_are_named() -> None:
    for task, said in (
        (Task(loss=None, metric=right), "task().loss must be a function, got None"),  # type: ignore[arg-type]
        (
            replace(classification(), class_names=("a", "b")),
            "task().class_names has 2 names, but the network has 4",
        ),
    ):
        assert said in look(tiny.Network().eval(), task, **dict.fromkeys(SPLITS, GOOD)).complaints[0]


class Endless:
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield X[:16], Y[:16]


class WrongLength(list[Any]):
    def __len__(self) -> int:
        return 3


def test_all_exhausted_splits_are_listed_and_wrong_lengths_noted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(PipelineError, match=r"(?s)split 'calib'.*split 'train'.*split 'val'.*split 'test'"):
        wrap_splits(Splits(**{name: iter([(X, Y)]) for name in SPLITS}))
    monkeypatch.setattr("deploypipe.preflight._SECONDS_OF_A_RUN", 0.02)
    data = {**dict.fromkeys(SPLITS, GOOD), "val": Endless(), "train": WrongLength([(X[:16], Y[:16])])}
    notes: list[str] = []
    wrapped = wrap_splits(Splits(**data))
    check_inputs(tiny.Network().eval(), wrapped, classification(), tiny.recipe(), tiny.target(), notes)
    val, train = notes
    assert "the val split has no length and did not end" in val
    assert "the train split reports 3 batches but has 1" in train


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor | None = None


class Answering(tiny.Network):
    def forward(self, x: Tensor) -> Any:
        return Answer(super().forward(x))


def test_the_program_of_a_network_that_answers_with_a_class_of_its_own_needs_no_class(tmp_path: Path) -> None:
    model = Answering().eval()
    save_pruned(model, empty_plan(list_structures(model, X[:4])), X[:4], tmp_path)
    found = load_saved(tmp_path, trust_program=True)(X[:5])
    torch.testing.assert_close(found, {"logits": model(X[:5]).logits})


class Broken(nn.Module):
    """A network whose forward() does what no run can work with."""

    def __init__(self, step: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.step = nn.Linear(36, 8), nn.Linear(8, 4), step

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(F.relu(self.step(self, self.first(x.flatten(1)))))
        return found


FORWARDS: list[tuple[Callable[[Any, Tensor], Tensor], str]] = [
    (lambda net, x: F.dropout(x), "write F.dropout(x, p, training=self.training)"),
    (
        lambda net, x: x[torch.arange(len(x))],
        "makes axis 0 of 'x' a constant, 8; write x.shape[0]",
    ),
    (lambda net, x: x.double().to(net.last.weight.dtype), ""),
]


@pytest.mark.parametrize(("step", "said"), FORWARDS)
def test_what_forward_must_not_do_is_named_once_for_all_splits(step: Any, said: str) -> None:
    complaints = look(Broken(step).eval(), **dict.fromkeys(SPLITS, GOOD)).complaints
    assert len(complaints) == bool(said) and said in "".join(complaints), complaints


def test_a_network_of_another_precision_and_one_without_gradients_are_named() -> None:
    half = look(tiny.Network().half().eval(), **dict.fromkeys(SPLITS, GOOD)).complaints
    assert half == ("the network holds torch.float16; this version exports fp32: call model.float()",)
    untaught = Broken(lambda net, x: x).eval()
    untaught.forward = torch.no_grad()(untaught.forward)  # type: ignore[method-assign]
    assert "forward() cannot be differentiated" in look(untaught, **dict.fromkeys(SPLITS, GOOD)).complaints[0]


def test_a_batch_without_samples_is_named() -> None:
    batches = [(X[:16], Y[:16]), (X[:0], Y[:0])]
    (complaint,) = look(tiny.Network().eval(), **{**dict.fromkeys(SPLITS, GOOD), "test": batches}).complaints
    assert "the test split, batch 1, has no samples; leave out empty batches" in complaint
