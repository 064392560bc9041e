"""The device of a run: which one a recipe means, and that networks and batches get there. `tests/pretend_gpu.py` stands
for a GPU; tests marked `gpu` need one."""

from typing import Any

import pytest
import torch
from networks import PadResNet
from pretend_gpu import GpuTensor, pretend_gpu
from torch import Tensor, nn

from deploypipe import compute_device
from deploypipe.benchmark.accuracy import evaluate_module
from deploypipe.compute_device import (
    CPU,
    ComputeDevice,
    device_for,
    exact_float32,
    find_device,
    network_on,
    to_device,
)
from deploypipe.errors import ConfigError, ModelError
from deploypipe.export.onnx_export.parity import compare_networks
from deploypipe.networks.batch_trees import tensors
from deploypipe.observe.calibration_pass import observe_halves
from deploypipe.observe.pass_statistics import merge
from deploypipe.pruning.repair.least_squares_repair import repair
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.surgery.slim_attention import with_slim_attention
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import LogitDivergence, Observe, Repair
from deploypipe.scoring.blocks import logit_divergence, rank_blocks
from deploypipe.scoring.magnitude import score_magnitudes
from deploypipe.task import classification

HAS_CUDA = torch.cuda.is_available()


def test_auto_is_a_gpu_if_there_is_one() -> None:
    found = find_device("auto")
    assert found.device.type == ("cuda" if HAS_CUDA else "cpu")
    assert found.device.type in found.text
    assert find_device("cpu").device == CPU and find_device("cpu").accelerator == "cpu"


@pytest.mark.parametrize("wanted", ["cuda", "mps"])
def test_a_device_that_is_absent_is_one_error_with_a_remedy(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=rf"recipe: device: '{wanted}' is not there: .*; write device='auto'"):
        find_device(wanted)


def test_mps_trains_only_because_moments_need_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    found = find_device("mps")
    assert (found.device, found.accelerator) == (CPU, "mps") and "float64" in found.text


def test_what_is_there_already_is_not_copied() -> None:
    model, batch = PadResNet(), ({"x": torch.zeros(2, 3), "name": "a"}, torch.zeros(2))
    assert network_on(model, CPU) is model and network_on(model, None) is model
    assert to_device(batch, CPU) is batch and to_device(batch, None) is batch


def test_networks_and_batches_are_moved_whole() -> None:
    torch.manual_seed(0)
    model = PadResNet().eval()
    batch = {"x": torch.randn(2, 3, 8, 8), "kind": "image"}
    expected = model(batch["x"])
    with pretend_gpu() as gpu:
        there, moved = network_on(model, gpu), to_device(batch, gpu)
        held = [*there.parameters(), *there.buffers()]
        assert all(isinstance(tensor, GpuTensor) for tensor in held)
        assert moved["kind"] == "image" and moved["x"].device == gpu
        assert torch.equal(there(moved["x"]).cpu(), expected)
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            there(batch["x"])
    assert all(type(tensor) is not GpuTensor for tensor in model.parameters())  # the network itself stays


class Anchored(nn.Module):
    """Adds a tensor that its code makes on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(3)


def test_a_network_that_fails_on_the_gpu_computes_on_the_cpu_unless_the_gpu_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pretend_gpu() as gpu:
        there = ComputeDevice(device=gpu, accelerator="cuda", text="a GPU")
        here = ComputeDevice(device=CPU, accelerator="cpu", text="cpu")
        monkeypatch.setattr(compute_device, "find_device", lambda wanted: here if wanted == "cpu" else there)
        assert device_for(PadResNet(), torch.randn(2, 3, 8, 8), "auto") == (there, "")
        moved = nn.Sequential(nn.Linear(3, 3), Anchored())
        found, problem = device_for(moved, torch.zeros(2, 3), "auto")
        assert found == here and "does not run" in problem and "on the CPU" in problem
        with pytest.raises(ModelError, match="or set device='cpu'"):
            device_for(moved, torch.zeros(2, 3), "cuda")


def test_judging_moves_networks_and_batches_and_gives_the_metric_its_outputs_on_the_cpu() -> None:
    torch.manual_seed(0)
    model, other = PadResNet().eval(), PadResNet().eval()
    batches = [(torch.randn(4, 3, 8, 8), torch.randint(10, (4,))) for _ in range(2)]
    with pretend_gpu() as gpu:
        judged = evaluate_module(model, batches, classification(), device=gpu)
        parity = compare_networks(model, other, batches, device=gpu)
    assert judged.tolist() == evaluate_module(model, batches, classification()).tolist()
    assert parity == compare_networks(model, other, batches)


def real_ids(ids: Tensor) -> Tensor:
    return ids != 0


@pytest.mark.parametrize("kind", ["images", "tokens"])
def test_observing_on_a_gpu_leaves_the_same_moments_on_the_cpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_divergence, "check_fingerprint", lambda *_: None)  # it refuses tensors of unknown classes
    torch.manual_seed(0)
    if kind == "images":
        model, real = PadResNet().eval(), None
        batches = [(torch.randn(6, 3, 8, 8), torch.randint(10, (6,))) for _ in range(2)]
    else:
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        model = nn.Sequential(nn.Embedding(50, 16), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(80, 3))
        real = real_ids
        batches = [(torch.randint(50, (6, 5)), torch.randint(3, (6,))) for _ in range(2)]
    model = with_slim_attention(model).eval()
    structures = list_structures(model, batches[0][0][:2])
    options: dict[str, Any] = {"loss": nn.functional.cross_entropy, "real_tokens": real, "shuffled": True}
    expected = observe_halves(model, structures, batches, Observe(num_samples=12), **options)
    with pretend_gpu() as gpu:
        seen = observe_halves(model, structures, batches, Observe(num_samples=12), **options, device=gpu)
        importance = rank_blocks(model, structures, merge(*seen), batches, LogitDivergence(), device=gpu)
    for moments, other in zip(seen, expected, strict=True):
        assert all(type(tensor) is Tensor for tensor in tensors(moments))
        torch.testing.assert_close(tensors(moments), tensors(other), rtol=0, atol=0)
    assert importance == rank_blocks(model, structures, merge(*expected), batches, LogitDivergence())


def test_exact_float32_gives_back_the_precision_that_was_set() -> None:
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    with exact_float32(torch.device("cuda")):
        assert convolutions.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
    with exact_float32(CPU):
        assert convolutions.fp32_precision == before
    assert convolutions.fp32_precision == before


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
def test_a_gpu_computes_float32_as_the_cpu_does() -> None:
    torch.manual_seed(0)
    model, images = PadResNet().eval(), torch.randn(8, 3, 32, 32)
    device = find_device("cuda").device

    def there() -> Tensor:
        with torch.no_grad(), exact_float32(device):
            return network_on(model, device)(to_device(images, device)).cpu()

    with torch.no_grad():
        torch.testing.assert_close(there(), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
def test_a_gpu_observes_repairs_and_judges_within_the_tolerance_that_docs_state() -> None:
    """docs/how-to/gpus.md: moments and repaired weights to 1e-3 of their largest value."""
    torch.manual_seed(0)
    model, device = PadResNet().eval(), find_device("cuda").device
    batches = [(torch.randn(64, 3, 16, 16), torch.randint(10, (64,))) for _ in range(2)]
    structures = list_structures(model, batches[0][0][:2])
    plan = make_plan(structures, score_magnitudes(model, structures), {g.name: 4 for g in structures.groups}, (), 1)
    found = []
    for place in (CPU, device):
        moments = merge(*observe_halves(model, structures, batches, Observe(num_samples=128), device=place))
        repaired, _ = repair(model, apply_plan(model, plan), plan, batches, Repair(num_samples=128), device=place)
        found.append((tensors(moments), list(repaired.state_dict().values())))
        assert evaluate_module(repaired, batches, classification(), device=place).shape == (128,)
    for here, there in zip(*(moments + weights for moments, weights in found), strict=True):
        assert there.device == CPU
        torch.testing.assert_close(there, here, rtol=0, atol=1e-3 * float(here.abs().max()))
