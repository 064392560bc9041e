"""A dozen of the networks of `benchmarks/architectures.py`: half of everything goes, and all that follows holds."""

import pytest
from architectures import CHECKS, INSTALL, YES, judge
from zoo import NETWORKS

from deploypipe.pruning.modules.module_calls import one_thread_if_small

WITH_ONNX = ("BertForSequenceClassification", "UNet-2d")  # the slowest check
FAST = (
    *WITH_ONNX,
    "ConvNextForImageClassification",
    "LlamaForCausalLM",
    "MobileNetV2ForImageClassification",
    "T5ForConditionalGeneration",
    "ViTForImageClassification",
    "DenseNet-3d",
    "densenet40_k12_bc_cifar10",
    "regnety002",
    "resnet20_cifar10",
    "ghostnet",
)


ALWAYS = ("BertForSequenceClassification", "UNet-2d", "T5ForConditionalGeneration", "DenseNet-3d")


def mark(name: str) -> object:
    """The others are left to continuous integration; pytorchcv is not among what tests install."""
    return pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow)


@pytest.mark.parametrize("name", [mark(name) for name in FAST])
def test_half_of_everything_goes(name: str) -> None:
    network = NETWORKS[name]
    pytest.importorskip(network.source, reason=f"{network.source} is not installed; {INSTALL}")
    with one_thread_if_small(0):
        facts = dict(judge(network, with_onnx=name in WITH_ONNX))
    made = [c for c in CHECKS if c not in ("parity", "depth") or (name in WITH_ONNX and c in facts)]
    assert {check: facts[check] for check in made} == dict.fromkeys(made, YES)
    assert facts["quarantined"] == []
    assert facts["params_after"] < 0.8 * facts["params_before"]
