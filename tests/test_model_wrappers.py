"""Networks come wrapped, compiled or quantised: they are unwrapped, or refused in one line."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline as tiny
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from deploypipe.errors import DeploypipeError, ModelError
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.observe.calibration_pass import observe_activations
from deploypipe.pipeline import compress
from deploypipe.pruning.repair.least_squares_repair import repair
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.surgery.saved_network import load_saved, save_pruned
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import Export, Magnitude, Observe, Repair
from deploypipe.scoring import score
from deploypipe.training.finetune import finetune
from deploypipe.user_pipeline import load_pipeline


def network() -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(inner, nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 4)).eval()


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def with_inside(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    model = network()
    model[0] = wrap(model[0])
    return model


def compiled(model: nn.Module) -> nn.Module:
    wrapped: nn.Module = torch.compile(model, backend="eager")  # type: ignore[assignment]
    return wrapped


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "data parallel": lambda: DataParallel(network()),
    "distributed": lambda: DistributedDataParallel(network()),
    "compiled": lambda: compiled(network()),
    "compiled in place": lambda: compiled_in_place(network()),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(network()),
    "one in the other": lambda: compiled(DataParallel(compiled(network()))),
    "data parallel inside": lambda: with_inside(DataParallel),
    "distributed inside": lambda: with_inside(DistributedDataParallel),
    "compiled inside": lambda: with_inside(compiled),
    "compiled in place inside": lambda: with_inside(compiled_in_place),
    "one in the other inside": lambda: DataParallel(with_inside(lambda m: compiled(DataParallel(m)))),
}


@pytest.fixture(autouse=True)
def _one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", WRAPPED)
def test_the_network_inside_has_its_own_names_and_the_same_tensors(kind: str) -> None:
    wrapped, plain = WRAPPED[kind](), network()
    before = list(wrapped.state_dict())
    inside = unwrapped(wrapped)
    assert list(inside.state_dict()) == list(plain.state_dict())
    assert {type(module) for module in inside.modules()} == {type(module) for module in plain.modules()}
    assert not any(module._compiled_call_impl for module in inside.modules())
    assert {id(p) for p in inside.parameters()} == {id(p) for p in wrapped.parameters()}
    assert list(wrapped.state_dict()) == before
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(inside(x), plain(x))


def test_a_plain_network_is_itself() -> None:
    model = network()
    assert unwrapped(model) is model


def test_every_stage_takes_a_wrapped_network(tmp_path: Path) -> None:
    make, plain, x = WRAPPED["one in the other inside"], network(), torch.randn(6, 3, 8, 8)
    batches = [(x, torch.zeros(6, dtype=torch.long))]
    structures = list_structures(make(), x)
    assert structures == list_structures(plain, x)
    moments = observe_activations(make(), structures, batches, Observe(num_samples=6))
    scores = score(make(), structures, moments, Magnitude())
    plan = make_plan(structures, scores, {group.name: 4 for group in structures.groups})
    pruned = apply_plan(make(), plan)
    wrapped_pruned = DataParallel(pruned)
    repaired, _ = repair(make(), wrapped_pruned, plan, batches, Repair(num_samples=6))
    splits = tiny.Splits(calib=batches, train=batches, val=batches, test=batches)
    tuned, _ = finetune(DataParallel(repaired), make(), splits, tiny.task(), tiny.recipe().finetune)
    assert list(tuned.state_dict()) == list(plain.state_dict())
    file = export_onnx(DataParallel(tuned), batches, tmp_path / "m.onnx", Export())
    assert file.max_abs_error < 1e-3
    save_pruned(DataParallel(tuned), plan, x, tmp_path)
    torch.testing.assert_close(load_saved(tmp_path, make)(x), tuned.eval()(x))


def test_a_pipeline_may_return_a_wrapped_network(tmp_path: Path) -> None:
    text = "from torch import nn\ndef build_model():\n    return nn.DataParallel(nn.Linear(2, 2))\n"
    text += "def load_data(): ...\ndef task(): ...\ndef recipe(): ...\n"
    (tmp_path / "wrapped.py").write_text(text)
    assert list(load_pipeline(str(tmp_path / "wrapped.py")).build_model().state_dict()) == ["weight", "bias"]


def _quantised(step: str) -> nn.Module:
    import torch.ao.quantization as q
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if step == "dynamic":
            return q.quantize_dynamic(network())
        if step == "trained":
            model = nn.Sequential(q.QuantStub(), network()).train()
            model.qconfig = q.get_default_qat_qconfig()  # type: ignore[assignment]
            return q.prepare_qat(model)  # type: ignore[no-any-return]
        graph = prepare_fx(network(), q.get_default_qconfig_mapping(), torch.randn(1, 3, 8, 8))
        return graph if step == "observed" else convert_fx(graph)


class _Fake(nn.Module):
    """Rounds in its forward, as graphs of newer tools do, with no class of theirs in it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, 0.1, 0, 0, 255)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "script": (lambda: torch.jit.script(network()), "the network is a TorchScript module.*give the Python network"),
    "traced": (lambda: torch.jit.trace(network(), torch.randn(1, 3, 8, 8)), "TorchScript"),
    "script inside": (lambda: with_inside(torch.jit.script), "'0' is a TorchScript module"),
    "exported": (lambda: torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), "torch.export program.*give the"),
    "exported module": (
        lambda: torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)).module(),
        "torch.export program; give the torch.nn.Module",
    ),
    "trained for int8": (lambda: DataParallel(_quantised("trained")), "prune the float network first"),
    "observed": (lambda: _quantised("observed"), "prune the float network first"),
    "converted": (lambda: _quantised("converted"), "prune the float network first"),
    "dynamic": (lambda: _quantised("dynamic"), r"'4' is .*prune the float network first"),
    "fake": (lambda: torch.fx.symbolic_trace(nn.Sequential(_Fake())), "quantises its values; prune the float network"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), "'0' is a LazyLinear.*call the network on one batch first"),
    "function": (lambda: torch.relu, "must be a torch.nn.Module, got builtin"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_pruned_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    make, message = REFUSED[kind]
    model, x = make(), torch.randn(2, 3, 8, 8)
    with pytest.raises(ModelError, match=message) as caught:
        list_structures(model, x)
    assert "\n" not in str(caught.value)
    with pytest.raises(DeploypipeError, match=message):
        compress(model, tiny.load_data(), tiny.task(), tiny.recipe(), tiny.target(macs="0.9x"), tmp_path / "run")
    with pytest.raises(DeploypipeError, match=message):
        export_onnx(model, [(x, None)], tmp_path / "m.onnx", Export())
    assert not (tmp_path / "run").exists()


def test_float_networks_with_marks_for_later_are_taken() -> None:
    import torch.ao.quantization as q

    model = nn.Sequential(q.QuantStub(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), q.DeQuantStub())
    assert [group.name for group in list_structures(model, torch.randn(2, 4)).groups] == ["1"]
