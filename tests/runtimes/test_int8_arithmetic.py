"""The 8-bit arithmetic of targets, and the probe of this processor."""

from dataclasses import replace

import pytest

from deploypipe.runtimes import int8_arithmetic
from deploypipe.runtimes.int8_arithmetic import VNNI, Int8Kernels, kernels_of, saturates_here
from deploypipe.runtimes.this_machine import this_machine
from deploypipe.target import Target

X86 = Target(runtime="onnxruntime", machine="x86_64")


@pytest.mark.parametrize(
    ("target", "saturate"),
    [
        (replace(X86, cpu_features=("avx2", "fma")), True),
        (replace(X86, cpu_features=("avx512f", "avx512bw")), True),
        (replace(X86, cpu_features=("avx2", "avx_vnni")), False),
        (replace(X86, cpu_features=("avx512f", "avx512_vnni")), False),
        (replace(X86, provider="openvino", cpu_features=("avx2",)), True),
        (replace(X86, provider="cuda", cpu_features=("avx2",)), False),
        (Target(runtime="onnxruntime", machine="aarch64", cpu_features=("asimd",)), False),
        (Target(runtime="tensorrt", machine="x86_64", cpu_features=("avx2",)), False),
    ],
)
def test_a_target_saturates_where_its_processor_has_no_vnni(target: Target, saturate: bool) -> None:
    assert kernels_of(target).saturate is saturate


def test_the_tensorrt_provider_takes_tensorrts_recipe() -> None:
    target = Target(runtime="onnxruntime", provider="tensorrt", precisions=("fp32", "int8"))
    assert kernels_of(target) == Int8Kernels(runtime="tensorrt")


def test_a_target_that_names_no_features_is_a_machine_like_this_one() -> None:
    saturate = this_machine().architecture == "x86_64" and saturates_here()
    assert kernels_of(Target(runtime="onnxruntime")).saturate is saturate


def test_the_probe_agrees_with_the_processors_features() -> None:
    machine = this_machine()
    if machine.architecture != "x86_64" or not machine.cpu_features:
        pytest.skip("only x86 processors saturate, and this one lists no features")
    assert saturates_here() is VNNI.isdisjoint(machine.cpu_features)


def test_files_are_evaluated_in_float_if_kernels_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, saturating = (Int8Kernels(runtime="onnxruntime", saturate=saturate) for saturate in (False, True))
    for here in (False, True):
        monkeypatch.setattr(int8_arithmetic, "saturates_here", lambda here=here: here)
        assert exact.are_emulated_here is here
        assert not saturating.are_emulated_here
        assert Int8Kernels(runtime="tensorrt").are_emulated_here
