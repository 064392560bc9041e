"""Files cut from a template equal the network and its exported file; others are exported, with a reason."""

import random
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import networks
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.export.graph_slicing.resize_graph import UnfitError, regrouped
from deploypipe.export.graph_slicing.sliced_files import slice_file
from deploypipe.export.graph_slicing.template import Template, open_template
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.files.hashing import file_sha256
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.surgery.slim_attention import with_slim_attention
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import Export
from deploypipe.records import CandidateFile, PruningPlan, ScoreTable, Structures
from deploypipe.runtimes import Array
from deploypipe.runtimes.onnxruntime import OnnxRuntime
from deploypipe.search.evaluation.candidate_files import shape_signature
from deploypipe.untrusted_files.onnx_file_check import check_onnx_file


@dataclass(frozen=True, kw_only=True, slots=True)
class Dense:
    model: nn.Module
    inputs: Tensor
    structures: Structures
    folder: Path
    template: Template

    def slice(self, plan: PruningPlan, pruned: nn.Module, name: str = "sliced.onnx") -> CandidateFile:
        batches = [(self.inputs, None)]
        return slice_file(self.template, self.model, pruned, plan, batches, self.folder / name, Export())


EXPORT, ANY_LENGTH = Export(), Export(dynamic_axes={"ids": {1: "length"}})


def prepare(model: nn.Module, inputs: Tensor, export: Export = EXPORT) -> Dense:
    model = with_slim_attention(model).eval()
    folder = Path(mkdtemp())
    export_onnx(model, [(inputs, None)], folder / "dense.onnx", export, template=folder / "template.onnx")
    name = onnx.load(folder / "dense.onnx").graph.input[0].name
    return Dense(
        model=model,
        inputs=inputs,
        structures=list_structures(model, inputs),
        folder=folder,
        template=open_template(folder / "template.onnx", model, {name: inputs[:2].numpy()}),
    )


@cache
def prepared(name: str) -> Dense:
    return prepare(*networks.build(name))


def random_plan(structures: Structures, seed: int) -> PruningPlan:
    rng = random.Random(seed)
    scores = {g.name: tuple(rng.random() for _ in range(g.num_units)) for g in structures.groups}
    widths = {g.name: rng.randint(1, g.num_units) for g in structures.groups if rng.random() < 0.8}
    blocks = [b.name for b in structures.blocks if rng.random() < 0.4]
    return make_plan(structures, ScoreTable(scorer="random", channels=scores), widths, blocks)


def run(path: Path, inputs: Tensor) -> Array:
    with OnnxRuntime().open(path, num_threads=1) as session:
        return session.run({session.input_names[0]: inputs.numpy()})[0]


def eager(model: nn.Module, inputs: Tensor) -> Array:
    with torch.no_grad():
        output: Array = model.eval()(inputs).numpy()
    return output


def operators(path: Path) -> tuple[Counter[str], Counter[str]]:
    """Of the file, and of what onnxruntime makes of it before it runs: what it fuses depends on more than the nodes."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path.with_suffix(".run")), 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    first, second = (
        Counter(node.op_type for node in onnx.load(file).graph.node) for file in (path, path.with_suffix(".run"))
    )
    return first, second


def shaken(model: nn.Module, times: int = 1) -> nn.Module:
    """With other weights, as a repair leaves them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1**times)
    return model


EVERY = pytest.mark.parametrize("name", sorted(networks.NETWORKS))


@EVERY
@given(seed=st.integers(0, 2**32))
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
def test_a_slice_computes_what_the_pruned_network_does(name: str, seed: int) -> None:
    dense = prepared(name)
    plan = random_plan(dense.structures, seed)
    pruned = shaken(apply_plan(dense.model, plan))
    file = dense.slice(plan, pruned)
    path = dense.folder / file.path
    assert (file.reason, file.size_bytes) == ("", path.stat().st_size)
    for n in (1, 3, 4):  # any batch size
        np.testing.assert_allclose(run(path, dense.inputs[:n]), eager(pruned, dense.inputs[:n]), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "name", ["bottleneck", "dense", "encoder", "flattened", "resnext", "squeeze_excite", "upsampled"]
)
def test_a_slice_is_what_an_export_would_be(name: str) -> None:
    """The same operators on weights of the same shapes: that is why it is as fast."""
    dense = prepared(name)
    plan = random_plan(dense.structures, seed=2)
    pruned = apply_plan(dense.model, plan)
    template = file_sha256(dense.folder / "template.onnx")
    assert dense.slice(plan, pruned).reason == ""
    sliced, exported = dense.folder / "sliced.onnx", dense.folder / "exported.onnx"
    export_onnx(pruned, [(dense.inputs, None)], exported, Export())
    assert operators(sliced) == operators(exported)
    weights = [
        Counter(tuple(w.dims) for w in onnx.load(p).graph.initializer if w.data_type == 1) for p in (sliced, exported)
    ]
    assert weights[0] == weights[1]
    np.testing.assert_allclose(run(sliced, dense.inputs), run(exported, dense.inputs), atol=1e-5, rtol=1e-4)
    metadata = [{e.key: e.value for e in onnx.load(p).metadata_props} for p in (sliced, exported)]
    assert metadata[0] == metadata[1]
    # Nothing is used up, and the same comes again.
    again = dense.slice(plan, pruned, "again.onnx")
    assert (dense.folder / again.path).read_bytes() == sliced.read_bytes()
    assert file_sha256(dense.folder / "template.onnx") == template


def test_a_template_does_not_change_the_file(tmp_path: Path) -> None:
    model, inputs = networks.build("flattened")
    for name, template in (("a.onnx", None), ("b.onnx", tmp_path / "t.onnx")):
        export_onnx(model, [(inputs, None)], tmp_path / name, Export(), template=template)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert ".py" not in (tmp_path / "t.onnx").read_bytes().decode("latin-1")


class Texts(nn.Module):
    """Any length of texts, padded; layers that share the computation of a mask; blocks of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(20, 16), nn.Embedding(12, 16)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 4, 24, 0.1, F.gelu, batch_first=True, norm_first=True) for _ in range(3)
        )
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=ids == 0)
        return self.head(self.norm(x).mean(1))


@cache
def texts() -> Dense:
    torch.manual_seed(0)
    return prepare(Texts(), torch.randint(1, 20, (4, 7)), ANY_LENGTH)


@pytest.mark.parametrize("blocks", [(), ("layers.0", "layers.1")], ids=str)
def test_texts_of_any_length(blocks: tuple[str, ...], tmp_path: Path) -> None:
    dense = texts()
    model, ids, structures = dense.model, dense.inputs, dense.structures
    heads = [g for g in structures.groups if g.kind == "heads"]
    widths = {g.name: n for g, n in zip(heads, (3, 1, 2), strict=True)} | {
        g.name: g.num_units // 2 for g in structures.groups if g.kind == "channels" and g.name != "positions"
    }
    scores = {g.name: tuple(range(g.num_units)) for g in structures.groups}
    outside = {n: w for n, w in widths.items() if not n.startswith(blocks or ("no block",))}
    plan = make_plan(structures, ScoreTable(scorer="", channels=scores), outside, blocks)
    pruned = apply_plan(model, plan)
    file = slice_file(dense.template, model, pruned, plan, [(ids, None)], tmp_path / "s.onnx", ANY_LENGTH)
    assert file.reason == ""
    export_onnx(pruned, [(ids, None)], tmp_path / "e.onnx", ANY_LENGTH)
    assert operators(tmp_path / "s.onnx") == operators(tmp_path / "e.onnx")
    for n, length in ((1, 3), (3, 12)):
        other = torch.randint(1, 20, (n, length))
        other[0, length - 1 :] = 0
        np.testing.assert_allclose(run(tmp_path / "s.onnx", other), eager(pruned, other), atol=1e-4, rtol=1e-3)


class Odd(nn.Module):
    """Two parts of unequal sizes: nothing in the graph tells how many channels each of them lost."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Linear(6, 12), nn.Linear(4, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(x).relu().split([4, self.first.out_features - 4], dim=1)
        return self.left(left) + self.right(right)


def test_what_cannot_be_sliced_is_exported_with_the_reason() -> None:
    torch.manual_seed(0)
    dense = prepare(Odd(), torch.randn(4, 6))
    group = next(g for g in dense.structures.groups if any(m.module == "right" for m in g.members))
    scores = {g.name: tuple(range(g.num_units)) for g in dense.structures.groups}
    plan = make_plan(dense.structures, ScoreTable(scorer="", channels=scores), {group.name: 6})
    pruned = apply_plan(dense.model, plan)
    file = dense.slice(plan, pruned)
    assert file.reason == "/Split: 4 of 12 is not a whole number of 10"
    np.testing.assert_allclose(run(dense.folder / file.path, dense.inputs), eager(pruned, dense.inputs), atol=1e-5)


def test_a_file_that_differs_is_exported_with_the_reason() -> None:
    dense = prepared("mlp")
    plan = random_plan(dense.structures, seed=1)
    pruned = apply_plan(dense.model, plan)
    pruned.append(nn.Softmax(1))  # not in the template
    file = dense.slice(plan, pruned)
    assert file.reason.startswith("sliced.onnx: differs from the network by")
    np.testing.assert_allclose(run(dense.folder / file.path, dense.inputs), eager(pruned, dense.inputs), atol=1e-5)


def test_a_missing_tensor_is_reported() -> None:
    dense = prepared("mlp")
    plan = random_plan(dense.structures, seed=1)
    pruned = apply_plan(dense.model, plan)
    pruned[5] = nn.Sequential(pruned[5])
    assert dense.slice(plan, pruned).reason.startswith("the pruned network has no tensor 5.bias, 5.weight")


@pytest.mark.parametrize(
    ("old", "new", "shape", "sizes", "wanted"),
    [
        ((2, 12), (2, 8), (2, 3, 4), {3: 2}, [2, 2, 4]),
        ((2, 12), (2, 6), (2, 3, 4), {3: 3}, [2, 3, 2]),
        ((2, 12), (2, 8), (2, 3, 4), {4: 4}, [2, 2, 4]),
        ((2, 3, 4), (2, 2, 4), (2, 12), {}, [2, 8]),
        ((2, 6, 5, 5), (2, 4, 5, 5), (2, 150), {}, [2, 100]),
        ((2, 8, 1, 1), (2, 5, 1, 1), (2, 8), {}, [2, 5]),
        ((2, 8), (2, 5), (2, 8, 1, 1), {}, [2, 5, 1, 1]),
        ((2, 7, 12), (2, 7, 8), (14, 12), {}, [14, 8]),
        ((4, 12), (4, 6), (4, 2, 6), {2: 1}, [4, 1, 6]),
    ],
)
def test_regrouped(
    old: tuple[int, ...], new: tuple[int, ...], shape: tuple[int, ...], sizes: dict[int, int], wanted: list[int]
) -> None:
    assert regrouped(old, new, shape, sizes) == wanted


def test_a_size_that_cannot_be_divided() -> None:
    with pytest.raises(UnfitError, match=r"7 instead of 12 cannot be divided like \[3, 4\]"):
        regrouped((2, 12), (2, 7), (2, 3, 4), {3: 3})


@pytest.mark.parametrize(("name", "reason"), [("flattened", ""), ("mlp", "batch norms cannot be merged")])
def test_weights_of_large_networks_are_cut_into_a_second_file(name: str, reason: str) -> None:
    large = Export(single_file_mib=0)
    dense = prepare(*networks.build(name), large)
    plan = random_plan(dense.structures, 1)
    signatures = set()
    for number in range(2):
        pruned, path = shaken(apply_plan(dense.model, plan), 1 + number), dense.folder / f"sliced{number}.onnx"
        file = slice_file(dense.template, dense.model, pruned, plan, [(dense.inputs, None)], path, large)
        assert file.reason.startswith(reason) and bool(file.reason) == bool(reason)
        assert reason or check_onnx_file(path).data == (f"sliced{number}.onnx.data",)
        assert file.size_bytes == sum(each.stat().st_size for each in dense.folder.glob(f"sliced{number}.onnx*"))
        np.testing.assert_allclose(run(path, dense.inputs), eager(pruned, dense.inputs), atol=1e-4)
        signatures.add(shape_signature(path))
    assert len(signatures) == 1  # a shape is timed once, whatever its weights are and wherever they lie


def test_a_template_holds_no_weights() -> None:
    dense = prepared("flattened")
    num_bytes = sum(4 * parameter.numel() for parameter in dense.model.parameters())
    assert (dense.folder / "dense.onnx").stat().st_size > num_bytes
    assert (dense.folder / "template.onnx").stat().st_size < num_bytes / 2
