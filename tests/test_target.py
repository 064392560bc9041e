"""Targets: what a file may say, the errors, and the files that come with the package."""

from pathlib import Path
from typing import Any

import pytest

from deploypipe.errors import ConfigError
from deploypipe.files.json_records import from_plain
from deploypipe.runtimes.ability_for_target import can
from deploypipe.runtimes.this_machine import this_machine
from deploypipe.target import Target
from deploypipe.target_files import load_target

FOLDER = Path(__file__).parents[1] / "targets"
FILES = sorted(path.stem for path in FOLDER.glob("*.toml"))
WANTED = {
    "x86_server",
    "x86_laptop",
    "graviton3",
    "raspberry_pi_5",
    "jetson_orin_nano",
    "jetson_agx_orin",
    "jetson_thor",
    "l4",
    "a100",
    "h100",
    "rtx_4090",
    "rtx_50",
    "apple_silicon",
}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"provider": "cuda", "runtime": "tensorrt"}, "'cuda' belongs to onnxruntime; leave it out for tensorrt"),
        ({"provider": "openvino", "runtime": "eager"}, "'openvino' is not one of eager; write one of cpu, cuda"),
        ({"provider": "rocm"}, "provider: 'rocm' does not fit"),
        ({"provider_options": {"a": "b"}}, "provider_options need an onnxruntime provider other than cpu"),
        ({"provider": "openvino", "provider_options": {"threads": 4}}, "provider_options.threads: 4 does not fit"),
        ({"cuda_graph": True}, "cuda_graph = true needs an NVIDIA GPU and onnxruntime or TensorRT; leave it out"),
        ({"runtime": "eager", "provider": "cuda", "cuda_graph": True}, "cuda_graph = true needs an NVIDIA GPU"),
        ({"provider": "coreml", "precisions": ["int8"]}, "onnxruntime with coreml has no 'int8'; write fp32, fp16"),
        ({"runtime": "eager", "precisions": ["fp32", "int8"]}, "eager has no 'int8'"),
        ({"precisions": []}, "precisions is empty; write one or more of fp32, fp16, int8"),
        ({"compute_capabilities": ["sm89"]}, "'sm89' is not a compute capability; write one like '8.9'"),
        ({"batch_range": [8, 4, 16]}, r"batch_range = [8, 4, 16] is not a range; write [smallest, usual, largest]"),
        ({"batch_range": [0, 4, 16]}, "is not a range"),
        ({"batch_range": [1, 4]}, "batch_range"),
        ({"batch_range": [2, 4, 16]}, r"batch_size = 1 is outside batch_range = [2, 4, 16]; widen it"),
        ({"dynamic_dims": {"length": [4, 2, 8]}}, "dynamic_dims.length = [4, 2, 8] is not a range"),
        ({"memory": "8"}, "memory = '8' is not an amount of memory; write it like '8 GiB'"),
        ({"memory": "8 GB"}, "units: KiB, MiB, GiB"),
        ({"memory": "8 GiB", "workspace": "9 GiB"}, "workspace = '9 GiB' is more than memory = '8 GiB'; write less"),
        ({"is_portable": "yes"}, "is_portable"),
        ({"gpu": "L4"}, "gpu: unknown key; the keys here are"),
    ],
)
def test_errors(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_plain(Target, {"runtime": "onnxruntime", **fields}, "t.toml")
    assert str(caught.value).startswith("t.toml") and told in str(caught.value)


def test_what_follows_from_the_fields() -> None:
    plain = Target(runtime="onnxruntime")
    assert (plain.needs_gpu, plain.batches, plain.workspace_bytes, plain.memory_bytes) == (
        False,
        (1, 1, 128),
        None,
        None,
    )
    server = Target(runtime="onnxruntime", provider="cuda", batch_size=200, workspace="512 MiB", memory="1.5 GiB")
    assert (server.needs_gpu, server.batches) == (True, (1, 200, 200))
    assert (server.workspace_bytes, server.memory_bytes) == (512 * 2**20, 3 * 2**29)
    assert Target(runtime="tensorrt-rtx").needs_gpu


def test_the_devices_of_the_plan_are_there() -> None:
    assert set(FILES) >= WANTED


@pytest.mark.parametrize("name", FILES)
def test_files_that_come_along(name: str) -> None:
    target = load_target(str(FOLDER / f"{name}.toml"))
    text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    assert target.description and text.startswith("# ")
    assert target.budget.limits()
    if name in WANTED:  # a fact without a source helps nobody
        assert any(mark in text for mark in (".com", ".ai", "github.com", "SDM", "measured")), name
        assert target.precisions[0] == "fp32" and len(target.precisions) > 1
    if target.runtime.startswith("tensorrt"):
        assert target.compute_capabilities and target.memory
    ability = can(target)
    assert (ability.verdict == "run") == (ability.reason == "")


def test_what_this_machine_is_not() -> None:
    machine = this_machine()
    others = {"graviton3", "raspberry_pi_5"} if machine.architecture == "x86_64" else {"x86_server", "x86_laptop"}
    for name in others:
        ability = can(load_target(str(FOLDER / f"{name}.toml")))
        assert (ability.verdict, ability.is_the_device) == ("export only", False)
        assert machine.architecture in ability.reason
