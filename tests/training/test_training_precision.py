"""bf16 where the machine computes in it, and nowhere else."""

import re

import pytest
import torch

from deploypipe.recipe import Finetune
from deploypipe.runtimes.this_machine import Machine
from deploypipe.training import training_precision
from deploypipe.training.training_precision import native_precision, with_precision


@pytest.mark.parametrize(
    ("architecture", "features", "capability", "expected", "reason"),
    [
        ("x86_64", {"avx2", "avx512f", "avx512_bf16"}, "AVX512", "bf16", "has avx512_bf16$"),
        ("x86_64", {"avx2", "amx_bf16"}, "AVX512", "bf16", "has amx_bf16$"),
        ("x86_64", {"avx2", "avx512f", "avx512_vnni"}, "AVX512", "fp32", "has none of avx512_bf16, amx_bf16"),
        ("x86_64", {"avx2"}, "AVX2", "fp32", "has none of"),
        ("x86_64", {"avx2", "avx512_bf16"}, "AVX2", "fp32", "limited to AVX2"),
        ("aarch64", {"asimd", "bf16"}, "DEFAULT", "bf16", "has bf16$"),
        ("aarch64", {"asimd"}, "DEFAULT", "fp32", "has none of bf16"),
        ("arm64", set(), "DEFAULT", "fp32", "has none of bf16"),
    ],
)
def test_auto_goes_by_what_the_processor_has(
    architecture: str, features: set[str], capability: str, expected: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(system="Linux", architecture=architecture, cpu_features=frozenset(features))
    monkeypatch.setattr(training_precision, "this_machine", lambda: machine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    found, why = native_precision()
    assert found == expected and re.search(reason, why)
    assert with_precision(Finetune()).precision == expected
    assert with_precision(Finetune(precision="bf16")).precision == "bf16"


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp32")])
def test_on_a_gpu_it_goes_by_the_gpu(has_bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert native_precision()[0] == expected and "Tesla T4" in native_precision()[1]
