"""The exported file: self-contained, any batch, nothing of the author's machine in it, equal to the network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from deploypipe.errors import DataError, ModelError, ParityError
from deploypipe.export.onnx_file import export_onnx
from deploypipe.recipe import Export
from deploypipe.runs import file_sha256
from deploypipe.runtimes.onnxruntime import OnnxRuntime


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.norm(self.conv(image))).mean((2, 3)))
        return logits


class TwoInputs(nn.Module):
    """Tokens and a mask in; a dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        hidden = (self.embed(ids) * mask.unsqueeze(-1)).sum(1)
        return {"logits": self.head(hidden), "hidden": hidden}


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(4, -1)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.nan


def tokens(n: int) -> tuple[Tensor, Tensor]:
    return torch.randint(11, (n, 6)), torch.ones(n, 6)


def test_image_network(tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(0)
    model = Net().train()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.conv.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = [(torch.randn(4, 3, 8, 8), torch.zeros(4)), (torch.randn(3, 3, 8, 8), torch.zeros(3))]
    path = tmp_path / "model.onnx"

    file = export_onnx(model, batches, path, Export())

    assert (file.path, file.sha256, file.size_bytes) == ("model.onnx", file_sha256(path), path.stat().st_size)
    assert (file.input_names, file.output_names, file.opset, file.precision) == (("image",), ("output",), 20, "fp32")
    assert file.max_abs_error < 1e-5
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    # The network is untouched, and nobody was spoken to.
    assert (model.training, model.conv.training, model.head.training) == (True, False, True)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    # The file says nothing about where it came from.
    content = path.read_bytes()
    for trace in (Path(__file__).stem, ".py", "site-packages", "torch.nn", 'File "', "stack_trace", Path.home().name):
        assert trace.encode() not in content, trace
    # Any batch size.
    model.eval()
    with OnnxRuntime().open(path, num_threads=1) as session:
        for n in (1, 2, 9):
            x = torch.randn(n, 3, 8, 8)
            np.testing.assert_allclose(session.run({"image": x.numpy()})[0], model(x).detach(), atol=1e-5)


@pytest.mark.parametrize(
    "pack", [lambda ids, mask: (ids, mask), lambda ids, mask: {"mask": mask, "ids": ids}], ids=["tuple", "dict"]
)
def test_several_inputs_and_outputs(pack: Callable[[Tensor, Tensor], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = export_onnx(TwoInputs(), [(pack(*tokens(1)), None), (pack(*tokens(5)), None)], tmp_path / "m.onnx", Export())
    assert set(file.input_names) == {"ids", "mask"}
    assert file.output_names == ("logits", "hidden")
    batch_axes = {i.type.tensor_type.shape.dim[0].dim_param for i in onnx.load(tmp_path / "m.onnx").graph.input}
    assert batch_axes == {"batch"}


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (FixedBatch(), ModelError, "FixedBatch cannot be exported.*any batch size"),
        (Branching(), ModelError, "Branching cannot be exported.*no branch on values"),
        (Noisy(), ParityError, r"differs from the network by 0\.\d+ of its largest output, top-1 agreement"),
        (nn.Linear(6, 2).half(), ModelError, "float16"),
        (Broken(), DataError, "NaN"),
    ],
    ids=["fixed batch", "branch", "random", "half", "nan"],
)
def test_refusals_leave_the_old_file(
    model: nn.Module, error: type[Exception], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the last good file")
    with pytest.raises(error, match=message):
        export_onnx(model, [(torch.randn(4, 6, dtype=_dtype(model)), None)], path, Export())
    assert path.read_bytes() == b"the last good file"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert capfd.readouterr() == ("", "")


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters()), torch.float32)


def test_no_batches(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one batch"):
        export_onnx(Net(), [], tmp_path / "m.onnx", Export())
