"""A candidate's file and its network give the same metric; where the file cannot run, the network does, with a note."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from deploypipe.benchmark.accuracy import evaluate, evaluate_module
from deploypipe.compute_device import CPU
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.recipe import Export
from deploypipe.search.evaluation.candidate_passes import candidate_passes
from deploypipe.search.sample_results import Results
from deploypipe.task import Batch, Task

# Not a hit or a miss: any difference of the outputs shows.
TASK = Task(loss=lambda outputs, _: outputs.sum(), metric=lambda outputs, target: outputs[:, 0] - target, name="error")


class Convolutions(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(6)
        super().__init__(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
        norm.running_mean.normal_()


class Reader(nn.Module):
    """A transformer over the real tokens of its texts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 2)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + self.attention(x, x, x, key_padding_mask=attention_mask == 0, need_weights=False)[0]
        weights = attention_mask[..., None].to(x.dtype)
        logits: Tensor = self.head((x * weights).sum(1) / weights.sum(1))
        return logits


def images(*sizes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, 8, 8, generator=generator), torch.zeros(n)) for n in sizes]


def texts(*shapes: tuple[int, int]) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    found: list[Batch] = []
    for count, length in shapes:
        ids = torch.randint(0, 20, (count, length), generator=generator)
        real = torch.randint(2, length + 1, (count, 1), generator=generator)
        found.append(({"ids": ids, "attention_mask": (torch.arange(length) < real).long()}, torch.zeros(count)))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("files")
    export_onnx(Convolutions().eval(), images(3), made / "images.onnx", Export())
    export_onnx(Reader().eval(), texts((3, 7), (3, 9)), made / "texts.onnx", Export())
    return made


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def by_file(network: nn.Module, file: Path, val: list[Batch], reasons: list[str]) -> Results:
    with candidate_passes(network, file, val[0][0], Export(), CPU, reasons.append) as passes:
        return evaluate(passes, val, TASK, "it")


@pytest.mark.parametrize(
    ("name", "network", "val"),
    [("images", Convolutions(), images(80, 5, 1)), ("texts", Reader(), texts((40, 9), (3, 12), (50, 7), (1, 7)))],
)
def test_file_and_network_agree_with_any_number_of_threads(
    name: str, network: nn.Module, val: list[Batch], folder: Path
) -> None:
    reasons: list[str] = []
    one, again = (by_file(network.eval(), folder / f"{name}.onnx", val, reasons) for _ in range(2))
    with threads(3):
        other = by_file(network, folder / f"{name}.onnx", val, reasons)
    assert reasons == []
    np.testing.assert_array_equal(one, again)
    np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(one, evaluate_module(network, val, TASK), atol=1e-5)
    assert len(np.unique(one)) > len(one) / 2  # different samples give different values


def test_a_file_that_differs_or_is_absent_is_replaced_by_the_network(folder: Path) -> None:
    network, val = Convolutions().eval(), images(20, 4)
    with torch.no_grad():
        network[-1].bias.add_(1.0)
    for file, why in (("images.onnx", "differs from the network"), ("absent.onnx", "absent.onnx")):
        reasons: list[str] = []
        seen = by_file(network, folder / file, val, reasons)
        np.testing.assert_array_equal(seen, evaluate_module(network, val, TASK))
        assert len(reasons) == 1 and why in reasons[0]


def test_batches_from_one_that_the_file_rejects_are_run_by_the_network(folder: Path, tmp_path: Path) -> None:
    network, file = Reader().eval(), tmp_path / "one_length.onnx"
    proto = onnx.load(folder / "texts.onnx")
    for value in proto.graph.input:
        value.type.tensor_type.shape.dim[1].dim_value = 7
    onnx.save(proto, file)
    val, reasons = texts((20, 7), (6, 9), (5, 7)), list[str]()
    seen = by_file(network, file, val, reasons)
    np.testing.assert_allclose(seen, evaluate_module(network, val, TASK), atol=1e-5)
    assert len(reasons) == 1 and "one_length.onnx" in reasons[0]
