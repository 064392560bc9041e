"""What is wrong with a pipeline is known in seconds: all of it at once, each with what to write."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_pipeline as tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from typer.testing import CliRunner

from deploypipe import check, finetune
from deploypipe.checked_splits import wrap_splits
from deploypipe.cli import app
from deploypipe.data import TensorBatches
from deploypipe.errors import DataError, DeploypipeError, ModelError, PipelineError
from deploypipe.preflight import CheckReport, check_inputs
from deploypipe.preflight.findings import Findings
from deploypipe.preflight.split_checks import Survey
from deploypipe.preflight.trial_passes import try_inference
from deploypipe.recipe import Finetune
from deploypipe.records import Event, Note
from deploypipe.runs.store import open_run
from deploypipe.stages.context import prepare_run
from deploypipe.task import Splits, Task, classification, forward, stack_batches
from deploypipe.user_code_errors import find_user_error, wrap_forward_errors

X, Y = tiny.images(64, seed=1)
Change = Callable[[Splits], Any]


def network() -> nn.Module:
    torch.manual_seed(0)
    return tiny.Network().eval()


def splits(**others: Any) -> Splits:
    good: dict[str, Any] = dict.fromkeys(("calib", "train", "val", "test"), TensorBatches(X, Y, 16))
    return Splits(**{**good, **others})


def look(data: Splits, task: Task | None = None, model: nn.Module | None = None) -> CheckReport:
    return check(model or network(), data, task or classification(), tiny.recipe(), tiny.target())


def batches(x: Tensor = X, y: Any = Y, size: int = 16) -> list[tuple[Any, Any]]:
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


def with_nan(place: int, *, target: bool = False) -> list[tuple[Tensor, Tensor]]:
    x, y = X.clone(), Y.float().clone()
    (y if target else x)[place] = float("nan")
    return batches(x, y if target else Y)


class Stream(IterableDataset[tuple[Tensor, int]]):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        yield from ((X[i], int(Y[i])) for i in range(64))


SHUFFLED = DataLoader(TensorDataset(X, Y), batch_size=16, shuffle=True)
OWN_GENERATOR = DataLoader(TensorDataset(X, Y), 16, shuffle=True, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": batches(y=Y.float())}, "the train split has torch.float32; write y.long()"),
        (
            {"val": batches(y=F.one_hot(Y, 4))},
            "the val split has torch.int64 of shape [2, 4], one-hot",
        ),
        ({"test": batches(y=Y[:, None])}, "the test split has torch.int64 of shape [2, 1]"),
        ({"val": batches(y=["cat"] * 64)}, "the val split has text ('cat'); number the names"),
        ({"test": batches(y=Y + 1)}, "the test split has labels from 1 to 4, but the network has 4 outputs"),
        ({"val": SHUFFLED}, "the val split has other samples in a second pass, from batch 0 on"),
        ({"test": OWN_GENERATOR}, "the test split has other samples in a second pass"),
        ({"calib": SHUFFLED}, "write shuffle=False for calib"),
        ({"val": [(X[:1], Y[:1])]}, "the val split has one sample"),
        ({"val": with_nan(40)}, "the val split, batch 2: a sample's inputs or targets hold NaN"),
        ({"test": with_nan(63)}, "the test split, batch 3: a sample's inputs or targets hold NaN"),
        ({"train": with_nan(50)}, "the train split, batch 3: a sample's inputs or targets hold NaN"),
        ({"train": (b for b in batches())}, "returned a generator as split 'train'; it is exhausted after one pass"),
        ({"test": 5}, "returned a int as split 'test'"),
        (
            {"val": [*batches(), ({"x": X[:2]}, Y[:2])]},
            "the val split, batch 4: its members differ from those of the first",
        ),
        ({"test": [(X[:4], Y[:3])]}, "has 4 samples with target [3]; give one target for each sample"),
        ({"calib": [(X[:4].tolist(), Y[:4])]}, "its inputs must be tensors: write torch.tensor(...)"),
    ],
)
def test_data_that_would_fail_late_is_named(changes: dict[str, Any], said: str) -> None:
    (complaint,) = look(splits(**changes)).complaints
    assert said in complaint


class OneRow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = tiny.Network()

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.net(x) + table.sum() + table[1:].sum()  # type: ignore[no-any-return]


def test_a_member_with_as_many_rows_as_a_batch_in_one_of_them_only_is_named() -> None:
    data = [((x, torch.ones(16, 2)), y) for x, y in batches(size=48)]  # 48 samples, then 16
    good = [((x, torch.ones(16, 2)), y) for x, y in batches(size=32)]
    report = look(splits(calib=good, train=good, val=data, test=good), model=OneRow())
    (complaint,) = report.complaints
    assert "the val split, batch 1: inputs[1] has a row for each sample in this batch of 16" in complaint


LOSSES: list[tuple[Any, str]] = [
    (lambda out, y: F.cross_entropy(out, y, reduction="none"), "task().loss returned a tensor of shape (4,)"),
    (lambda out, y: F.cross_entropy(out, y).item(), "task().loss returned a float"),
    (lambda out, y: F.cross_entropy(out.detach(), y), "cannot be differentiated"),
    (lambda out, y: F.cross_entropy(out, y) * float("nan"), "task().loss is nan"),
    (lambda out, y: out.nothing(), "test_preflight.py, line"),
]


@pytest.mark.parametrize(("loss", "said"), LOSSES)
def test_a_loss_that_cannot_be_trained_by(loss: Any, said: str) -> None:
    (complaint,) = look(splits(), Task(loss=loss, metric=classification().metric)).complaints
    assert said in complaint and "task().loss" in complaint


def test_labels_of_int32_do_for_classification_and_are_named_for_a_loss_that_refuses_them() -> None:
    data = splits(**dict.fromkeys(("calib", "train", "val", "test"), batches(y=Y.int())))
    (complaint,) = look(data, Task(loss=F.cross_entropy, metric=classification().metric)).complaints
    assert "task().loss raised RuntimeError" in complaint and "torch.int32" in complaint and "y.long()" in complaint


def bad_slices(inputs: Any, target: Any) -> dict[str, Tensor]:
    raise KeyError("colour")


def test_all_complaints_come_at_once_and_name_whose_code_failed() -> None:
    class Broken(TensorBatches):
        def __iter__(self) -> Iterator[Any]:
            yield from batches()[:2]
            raise OSError("disk is gone")

    task = replace(classification(), slices=bad_slices, real_tokens=lambda inputs: inputs.no_such())
    report = look(splits(train=Broken(X, Y, 16), test=SHUFFLED), task)
    calib, val, test, train = report.complaints
    assert "test_preflight.py, line" in calib and "task().real_tokens raised AttributeError" in calib
    assert "(in bad_slices): task().slices raised KeyError: 'colour'" in val
    assert "write shuffle=False for test" in test
    assert "reading the train split, batch 2, raised OSError: disk is gone" in train
    assert not report.is_ready


class Counting(tiny.Network):
    """Counts its calls, also those for evaluation."""

    def __init__(self, is_saved: bool) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1), persistent=is_saved)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_a_network_that_changes_what_it_saves_while_it_is_evaluated_is_named() -> None:
    told = "Counting changes 'calls' in evaluation mode; change buffers only `if self.training`"
    assert all(told in each for each in look(splits(), model=Counting(is_saved=True)).complaints)
    check_inputs(Counting(is_saved=False), wrap_splits(splits()), classification(), tiny.recipe(), tiny.target())


def test_a_sound_pipeline_is_exported_and_run_and_a_lone_last_sample_is_a_note() -> None:
    data = splits(train=TensorBatches(X[:33], Y[:33], 16), val=DataLoader(Stream(), 16))
    report = look(data)  # batch norms of images can be trained on one
    assert report.is_ready and report.tried[-1].what == "export and parity" and not report.notes
    assert "64 samples in 4 batches" in {row.what: row.detail for row in report.tried}["val: read twice"]
    vectors = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).eval()
    notes: list[str] = []
    check_inputs(vectors, wrap_splits(data), classification(), tiny.recipe(), tiny.target(), notes)
    (note,) = notes
    assert "the train split has a batch of one sample" in note


class Answer(NamedTuple):
    logits: Tensor
    hidden: Tensor | None
    pooled: Tensor


@dataclass
class Record:
    logits: Tensor
    hidden: Tensor | None = None


@pytest.mark.parametrize("kind", [Answer, Record])
def test_outputs_keep_their_class_in_the_metric(kind: Any) -> None:
    class Named(tiny.Network):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return Answer(y, None, y.mean(1)) if kind is Answer else Record(y)

    seen = []

    def metric(out: Any, target: Tensor) -> Tensor:
        seen.append(type(out))
        assert out.hidden is None
        return (out.logits.argmax(1) == target).float()

    torch.manual_seed(0)
    report = look(splits(), Task(loss=lambda out, y: F.cross_entropy(out.logits, y), metric=metric), Named().eval())
    assert report.is_ready, report.complaints
    assert set(seen) == {kind} and report.tried[-1].what == "export and parity"


@pytest.mark.parametrize(
    ("train", "said"),
    [(batches(y=Y.int()), "targets are torch.int32.*y.long()"), ((b for b in batches()), "as split 'train'")],
)
def test_finetune_alone_names_them_too(train: Any, said: str) -> None:
    plain = Task(loss=F.cross_entropy, metric=classification().metric)
    with pytest.raises(DeploypipeError, match=said):
        finetune(network(), network(), splits(train=train), plain, Finetune(num_epochs=1, precision="fp32"))


def test_an_order_that_changes_in_a_later_pass_ends_the_run() -> None:
    class Turning(TensorBatches):
        passes = 0

        def __iter__(self) -> Iterator[Any]:
            self.passes += 1
            yield from batches()[:: 1 if self.passes < 3 else -1]

    val = wrap_splits(splits(val=Turning(X, Y, 16))).val
    assert len(list(val)) == len(list(val)) == 4
    with pytest.raises(DataError, match="the val split has other samples in a second pass, from batch 0 on"):
        list(val)


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no such branch")


def test_what_forward_raises_names_the_users_line_and_ours_stays_ours(tmp_path: Path) -> None:
    said = r"test_preflight\.py, line \d+ \(in forward\): the network's forward\(\) raised ValueError: no such branch"
    with pytest.raises(ModelError, match=said), wrap_forward_errors():
        forward(Fails(), X)
    with pytest.raises(TypeError), wrap_forward_errors():
        stack_batches(5)  # type: ignore[arg-type]
    loader = DataLoader(TensorDataset(X), 16, num_workers=1, collate_fn=bad_collate)
    with pytest.raises(
        DataError, match=r"test_preflight\.py, line \d+ \(in bad_collate\): reading the val split, batch 0,"
    ):
        list(wrap_splits(splits(val=loader)).val)
    assert find_user_error(RuntimeError("of ours")) is None
    with pytest.raises(PipelineError):
        wrap_splits(splits(val=iter(())))


def bad_collate(items: Any) -> Any:
    raise TypeError("two shapes")


def test_a_rerun_in_the_same_folder_says_which_split_changed(tmp_path: Path) -> None:
    told: list[Event] = []
    for data in (splits(), splits(), splits(val=TensorBatches(X + 1, Y, 16))):
        with open_run(tmp_path / "run", told.append, None) as run:
            prepare_run(network(), data, classification(), tiny.recipe(), tiny.target(), run)
    note = "the data of val changed since the last run in this folder: what depends on it is computed again"
    assert [
        event
        for event in told
        if isinstance(event, Note) and event.stage == "check" and "fine-tuning uses" not in event.text
    ] == [Note(stage="check", text=note)]


def test_the_command_lists_all_complaints_and_ends_with_2(tmp_path: Path) -> None:
    source = (
        "from tiny_pipeline import *\nimport tiny_pipeline as tiny\n"
        "def load_data():\n"
        "    good = tiny.load_data()\n"
        "    x, y = images(64, seed=1)\n"
        "    return Splits(calib=good.calib, train=TensorBatches(x, y.float(), 32), val=good.val, test=[])\n"
    )
    (tmp_path / "pipe.py").write_text(source, encoding="utf-8")
    done = CliRunner().invoke(app, ["check", str(tmp_path / "pipe.py")])
    assert done.exit_code == 2 and "Traceback" not in done.output
    first, second = (line for line in done.output.splitlines() if line.startswith("error: "))
    assert first.startswith("error: 1 of 2: the test split is empty") and "2 of 2: " in second and "y.long()" in second


@pytest.mark.parametrize(
    ("is_used", "said"),
    [
        (
            False,
            "'idx' is no parameter of forward(), which takes such members of the calib split by **kwargs",
        ),
        (True, "the network reads it: write def forward(self, x, idx, **kwargs)"),
    ],
)
def test_a_member_that_forward_takes_by_kwargs_is_named(is_used: bool, said: str) -> None:
    class Network(nn.Linear):
        def forward(self, x: Tensor, **others: Tensor) -> Tensor:
            return super().forward(x) * (others["idx"].unsqueeze(1) + 1.0 if is_used else 1.0)

    inputs, findings = {"x": torch.rand(4, 3), "idx": torch.arange(4)}, Findings()
    task = Task(loss=lambda *_: torch.zeros(()), metric=lambda *_: torch.zeros(4))
    try_inference(findings, Network(3, 2), task, "calib", Survey(first=(inputs, None)))
    (error,) = findings.errors
    assert said in str(error) and (is_used or "leave it out: Pairs(loader, inputs=['x'], target=...)" in str(error))
