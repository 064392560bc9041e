"""What a machine can do for a target: each verdict, its reason, and the fields that decide it."""

from dataclasses import replace
from typing import Any

import pytest

from deploypipe.errors import RuntimeUnavailableError
from deploypipe.runtimes import ability_for_target as module
from deploypipe.runtimes.ability_for_target import can, find_misfits
from deploypipe.runtimes.tensorrt_libraries import LIBRARIES
from deploypipe.runtimes.this_machine import Gpu, Machine, _is_portable, this_machine
from deploypipe.target import Target

SERVER = Machine(
    system="Linux",
    architecture="x86_64",
    cpu_features=frozenset({"avx2", "avx512_vnni"}),
    is_portable=False,
)
ADA = replace(SERVER, gpus=(Gpu(name="NVIDIA L4", compute_capability="8.9"),), driver="580.95.05")
ORIN = Machine(
    system="Linux",
    architecture="aarch64",
    board="NVIDIA Jetson Orin Nano Engineering Reference Developer Kit",
    gpus=(Gpu(name="Orin", compute_capability="8.7"),),
    driver="L4T 36.4.0",
)
MAC = Machine(system="Darwin", architecture="aarch64")


def target(**fields: Any) -> Target:
    return Target(**{"runtime": "onnxruntime", "name": "t", **fields})


@pytest.mark.parametrize(
    ("machine", "fields", "reason"),
    [
        (SERVER, {}, ""),
        (SERVER, {"machine": "x86_64", "cpu_features": ("avx2",), "is_portable": False}, ""),
        (SERVER, {"machine": "aarch64", "cpu_features": ("asimd",)}, "this machine is x86_64, not aarch64"),
        (SERVER, {"cpu_features": ("avx2", "amx_int8")}, "this processor has no amx_int8"),
        (SERVER, {"is_portable": True}, "this machine is not a laptop"),
        (MAC, {"is_portable": True}, "it is unknown whether this machine is a laptop"),
        (SERVER, {"board": "Thor"}, "this machine is of no known board, not Thor"),
        (ORIN, {"board": "Orin Nano"}, ""),
        (ORIN, {"board": "AGX Orin"}, "Orin Nano Engineering Reference Developer Kit, not AGX Orin"),
        (SERVER, {"provider": "coreml"}, "runs Linux, not macOS"),
        (MAC, {"provider": "coreml"}, ""),
        (SERVER, {"provider": "cuda"}, "no NVIDIA GPU is usable here"),
        (ADA, {"provider": "cuda", "gpu_names": ("L4",)}, ""),
        (ADA, {"provider": "cuda", "gpu_names": ("L40", "A100")}, "the GPU here is NVIDIA L4, not L40 or A100"),
        (ADA, {"runtime": "tensorrt", "compute_capabilities": ("8.0",)}, "has compute capability 8.9, not 8.0"),
        (ORIN, {"runtime": "tensorrt", "compute_capabilities": ("8.7",)}, ""),
    ],
)
def test_misfits(machine: Machine, fields: dict[str, Any], reason: str) -> None:
    told = "; ".join(find_misfits(target(**fields), machine))
    assert reason in told if reason else told == ""


def test_a_part_of_a_gpu_name_is_another_gpu() -> None:
    l40s = replace(ADA, gpus=(Gpu(name="NVIDIA L40S", compute_capability="8.9"),))
    assert find_misfits(target(runtime="tensorrt", gpu_names=("L4",)), l40s)


class TestVerdicts:
    @pytest.fixture(autouse=True)
    def everything_is_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        monkeypatch.setattr(module, "_missing_package", lambda _: "")

    def on(self, here: Machine, /, **fields: Any) -> module.Ability:
        self.patch.setattr(module, "this_machine", lambda: here)
        return can(target(**fields))

    def test_run(self) -> None:
        assert self.on(SERVER) == module.Ability(verdict="run")
        assert self.on(ORIN, runtime="tensorrt", board="Orin Nano").verdict == "run"
        assert self.on(ADA, runtime="tensorrt-rtx", compute_capabilities=("8.9",)).verdict == "run"

    def test_build_only(self) -> None:
        ability = self.on(SERVER, runtime="tensorrt-rtx", compute_capabilities=("8.9",))
        assert (ability.verdict, ability.is_the_device) == ("build only", False)
        assert ability.reason == "no NVIDIA GPU is usable here"

    def test_export_only(self) -> None:
        for fields, reason in (
            ({"runtime": "tensorrt"}, "a tensorrt engine is built on its own device"),
            ({"runtime": "tensorrt-rtx"}, "name the device's compute_capabilities"),
            ({"machine": "aarch64"}, "this machine is x86_64"),
        ):
            ability = self.on(SERVER, **fields)
            assert (ability.verdict, ability.is_the_device) == ("export only", False)
            assert reason in ability.reason

    def test_the_device_without_its_package(self) -> None:
        self.patch.setattr(module, "_missing_package", lambda _: "x is not installed; pip install x")
        ability = self.on(SERVER)
        assert (ability.verdict, ability.is_the_device) == ("export only", True)
        assert ability.reason == "x is not installed; pip install x"
        absent = self.on(SERVER, runtime="tensorrt-rtx", compute_capabilities=("8.9",))
        assert absent.reason == "no NVIDIA GPU is usable here; no engine is built: x is not installed; pip install x"


def test_the_package_of_a_tensorrt_target(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> None:
        raise RuntimeUnavailableError("the package 'tensorrt' is not installed; pip install 'deploypipe[tensorrt]'")

    monkeypatch.setattr(module, "this_machine", lambda: ORIN)
    monkeypatch.setattr(module, "load_library", absent)
    ability = can(target(runtime="tensorrt", board="Orin Nano"))
    assert (ability.verdict, ability.is_the_device) == ("export only", True)
    assert "pip install 'deploypipe[tensorrt]'" in ability.reason


def test_the_version_of_a_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    class TensorRt:
        __version__ = "10.3.0"

    monkeypatch.setattr(module, "this_machine", lambda: ORIN)
    monkeypatch.setattr(module, "load_library", lambda _: (TensorRt, LIBRARIES[0]))
    for wanted, verdict in (("10", "run"), ("10.3", "run"), ("1", "export only"), ("11", "export only")):
        ability = can(target(runtime="tensorrt", runtime_version=wanted))
        assert ability.verdict == verdict, wanted
    assert "tensorrt 10.3.0 is installed and the target is for 11" in ability.reason


def test_this_machine_is_inspected() -> None:
    machine = this_machine()
    assert machine.system and machine.architecture
    assert bool(machine.gpus) == bool(machine.driver)


@pytest.mark.parametrize(
    ("text", "expected"), [("10\n", True), ("3\n", False), ("23", False), ("1", None), ("", None), ("?", None)]
)
def test_chassis(text: str, expected: bool | None) -> None:
    assert _is_portable(text) is expected
