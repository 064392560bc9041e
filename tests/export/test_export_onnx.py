"""The exported file is self-contained, takes any batch, does not name its author, and equals the network."""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from deploypipe.errors import ConfigError, DataError, ModelError, ParityError
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.files.hashing import file_sha256
from deploypipe.pruning.surgery.apply_plan import apply_plan, masked_dense
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import Export
from deploypipe.records import ScoreTable
from deploypipe.runtimes.onnxruntime import OnnxRuntime
from deploypipe.untrusted_files.onnx_file_check import check_onnx_file


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


class Text(nn.Module):
    """Attention over tokens of any number, padding left out; positions cut to the length, as texts' networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(11, 8), nn.Embedding(12, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions.weight[: ids.shape[1]]
        logits: Tensor = self.head(self.layer(x, src_key_padding_mask=ids == 0).mean(1))
        return logits


class Padded(nn.Module):
    """A pool over zeros at the edge, beside values that are all negative."""

    def __init__(self, pool: nn.Module, width: int) -> None:
        super().__init__()
        self.pad, self.pool = nn.ConstantPad2d(width, 0.0), pool

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.pool(self.pad(-x.abs() - 1))
        return pooled


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        logits = self.head(x)
        return {"logits": logits, "past": None, "text": {"z": x + 1, "a": (x + 2, [x + 3])}}


def sizes_of(path: Path) -> dict[str, list[int | str]]:
    return {
        i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in onnx.load(path).graph.input
    }


@pytest.mark.parametrize("how", ["named", "pattern", "seen in the batches"])
def test_dynamic_sequence(how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Text().eval()
    asked = {"named": {"ids": {1: "length"}}, "pattern": {"i*": {1: "length"}}}.get(how, {})
    lengths = (8, 8) if asked else (8, 10)
    batches = [(torch.randint(1, 11, (3, n)), None) for n in lengths]
    path = tmp_path / "m.onnx"
    export_onnx(model, batches, path, Export(dynamic_axes=asked))
    assert sizes_of(path) == {"ids": ["batch", "length" if asked else "sequence"]}
    with OnnxRuntime().open(path, num_threads=1) as session:
        for n, length in ((1, 2), (5, 5), (2, 12), (1, 7)):
            ids = torch.randint(1, 11, (n, length))
            ids[0, length - length // 3 :] = 0
            np.testing.assert_allclose(session.run({"ids": ids.numpy()})[0], model(ids).detach(), atol=1e-5)


def test_axes_that_change_together_share_a_name(tmp_path: Path) -> None:
    batches = [((torch.randint(11, (3, n)), torch.ones(3, n)), None) for n in (4, 7)]
    export_onnx(TwoInputs(), batches, tmp_path / "m.onnx", Export())
    assert sizes_of(tmp_path / "m.onnx") == {"ids": ["batch", "sequence"], "mask": ["batch", "sequence"]}


@pytest.mark.parametrize(
    ("axes", "message"),
    [({"tokens": {1: "n"}}, "no input is called 'tokens'.*ids, mask"), ({"ids": {2: "n"}}, "'ids' has no axis 2")],
)
def test_axes_that_do_not_exist(axes: dict[str, dict[int, str]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        export_onnx(TwoInputs(), [(tokens(3), None)], tmp_path / "m.onnx", Export(dynamic_axes=axes))


def test_an_opset_that_is_not_available(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"opset 40 cannot be written.*use export.opset = 18 to 23"):
        export_onnx(Net(), [(torch.randn(2, 3, 8, 8), None)], tmp_path / "m.onnx", Export(opset=40))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("pool", "width"), [(nn.MaxPool2d(3, 2), 1), (nn.AvgPool2d(1, 2), 1)], ids=["max", "mean"])
def test_zeros_at_the_edge_of_a_pool(pool: nn.Module, width: int, tmp_path: Path) -> None:
    file = export_onnx(Padded(pool, width), [(torch.randn(2, 3, 8, 8), None)], tmp_path / "m.onnx", Export())
    assert file.max_abs_error == 0


def test_nested_outputs(tmp_path: Path) -> None:
    file = export_onnx(Nested(), [(torch.randn(2, 6), None)], tmp_path / "m.onnx", Export())
    assert file.output_names == ("logits", "text.z", "text.a.0", "text.a.1.0")


def test_weights_in_a_second_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 2)).eval()
    batches = [(torch.randn(4, 6), None)]
    small = export_onnx(model, batches, tmp_path / "small.onnx", Export())
    file = export_onnx(model, batches, tmp_path / "m.onnx", Export(single_file_mib=0))
    (data,) = file.data
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data", "small.onnx"]
    assert (data.name, data.sha256) == ("m.onnx.data", file_sha256(tmp_path / "m.onnx.data"))
    assert file.size_bytes == (tmp_path / "m.onnx").stat().st_size + data.size_bytes
    assert data.size_bytes > 1500 and small.data == ()
    assert check_onnx_file(tmp_path / "m.onnx").data == ("m.onnx.data",)
    with OnnxRuntime().open(tmp_path / "m.onnx", num_threads=1) as session:
        np.testing.assert_allclose(
            session.run({session.input_names[0]: batches[0][0].numpy()})[0], model(batches[0][0]).detach(), atol=1e-5
        )


def test_files_with_one_graph_and_other_weights_are_told_apart(tmp_path: Path) -> None:
    files = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        model, batches = nn.Linear(64, 64, bias=False), [(torch.randn(4, 64), None)]
        files.append(export_onnx(model, batches, tmp_path / name / "m.onnx", Export(single_file_mib=0)))
    assert files[0].sha256 == files[1].sha256
    assert files[0].identity != files[1].identity


def test_metadata_of_the_file(tmp_path: Path) -> None:
    model, batches = Net(), [(torch.randn(2, 3, 8, 8), None)]
    for name in ("a.onnx", "b.onnx"):
        export_onnx(model, batches, tmp_path / name, Export(), origin={"plan": "abc"}, class_names=("cat", "dög"))
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    proto = onnx.load(tmp_path / "a.onnx")
    metadata = {entry.key.removeprefix("deploypipe."): entry.value for entry in proto.metadata_props}
    assert (metadata["plan"], metadata["precision"], json.loads(metadata["class_names"])) == (
        "abc",
        "fp32",
        ["cat", "dög"],
    )
    assert json.loads(metadata["inputs"]) == [{"name": "image", "dtype": "float32", "shape": ["batch", 3, 8, 8]}]
    assert json.loads(metadata["outputs"]) == [{"name": "output", "dtype": "float32", "shape": ["batch", 5]}]
    assert metadata["torch_version"] == version("torch") and metadata["onnx_version"] == onnx.__version__
    names = [node.name for node in proto.graph.node]
    assert len(set(names)) == len(names) and {"conv/Conv", "head/Gemm", "/Relu"} <= set(names)


class Recurrent(nn.Module):
    """Layers of both kinds that ONNX has operators for."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.gru, self.lstm, self.head = nn.GRU(3, 6, batch_first=True), lstm, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.gru(x, torch.zeros(1, x.shape[0], self.gru.hidden_size))
        logits: Tensor = self.head(self.lstm(x)[0][:, -1])
        return logits


def test_a_pruned_recurrent_network_is_exported_as_it_computes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense, inputs = Recurrent(nn.LSTM(6, 4, batch_first=True, bidirectional=True)).eval(), torch.randn(5, 7, 3)
    structures = list_structures(dense, inputs)
    scores = {g.name: tuple(map(float, range(g.num_units))) for g in structures.groups}
    assert set(scores) == {"gru", "lstm"}
    plan = make_plan(structures, ScoreTable(scorer="index", channels=scores), {"gru": 4, "lstm": 3})
    file = export_onnx(apply_plan(dense, plan), [(inputs, None)], tmp_path / "model.onnx", Export())
    kinds = [node.op_type for node in onnx.load(tmp_path / file.path).graph.node]
    assert {"GRU", "LSTM"} <= set(kinds)
    expected = masked_dense(dense, plan)(inputs).detach().numpy()
    with OnnxRuntime().open(tmp_path / file.path, num_threads=1) as session:
        np.testing.assert_allclose(session.run({"x": inputs.numpy()})[0], expected, atol=1e-5)


def test_an_lstm_with_a_projection_is_refused_with_a_remedy(tmp_path: Path) -> None:
    network = Recurrent(nn.LSTM(6, 10, proj_size=8, batch_first=True))
    with pytest.raises(ModelError, match=r"lstm is an nn\.LSTM with proj_size=8.*followed by an nn\.Linear"):
        export_onnx(network, [(torch.randn(2, 7, 3), None)], tmp_path / "model.onnx", Export())
