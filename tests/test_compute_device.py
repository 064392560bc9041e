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
