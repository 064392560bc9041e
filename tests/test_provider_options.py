"""Options of a provider that may load a library or touch files are off until a person allows them."""

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deploypipe.cli import app
from deploypipe.errors import ConfigError
from deploypipe.files.json_records import load_toml
from deploypipe.provider_options import ALLOWED_BY, OPTION, require_harmless_options
from deploypipe.runtimes import make_runtime
from deploypipe.target import Target

LOADING = [
    ("cuda", "gpu_external_alloc"),
    ("cuda", "user_compute_stream"),
    ("tensorrt", "trt_extra_plugin_lib_paths"),
    ("tensorrt", "trt_engine_cache_path"),
    ("tensorrt", "trt_engine_cache_enable"),
    ("tensorrt", "trt_ep_context_file_path"),
    ("openvino", "cache_dir"),
    ("openvino", "load_config"),
    ("coreml", "ModelCacheDirectory"),
    ("qnn", "backend_path"),
    ("qnn", "op_packages"),
    ("qnn", "profiling_file_path"),
    ("qnn", "what_the_next_version_brings"),
    ("qnn", "Backend_Path"),
]


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOWED_BY, "")


def target(provider: Any, **options: str) -> Target:
    return Target(runtime="onnxruntime", name="theirs", provider=provider, provider_options=options)


@pytest.mark.parametrize(("provider", "key"), LOADING)
def test_an_option_that_may_load_a_library_is_refused(provider: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"target theirs: provider_options\.{key}: may load a library.*{OPTION}"):
        make_runtime(target(provider, **{key: "/tmp/theirs.so"}))


def test_options_that_choose_how_to_compute_pass() -> None:
    for path in sorted(Path(__file__).parents[1].glob("targets/*.toml")):
        require_harmless_options(load_toml(Target, path))
    require_harmless_options(target("qnn", htp_performance_mode="burst"))
    require_harmless_options(target("openvino", device_type="CPU"))


def test_a_person_allows_them_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("theirs.toml").write_text(
        'runtime = "onnxruntime"\nprovider = "qnn"\n[provider_options]\nbackend_path = "/tmp/theirs.so"\n'
    )
    Path("pipe.py").write_text("print('executed')\n")
    for command in (["run", "./pipe.py", "./theirs.toml"], ["bench", "x.onnx", "./theirs.toml"]):
        refused = CliRunner().invoke(app, command)
        assert refused.exit_code == 2 and "provider_options.backend_path" in refused.stderr, refused.output
        assert "executed" not in refused.output
    override = ["run", "./pipe.py", "x86_cpu", "--set", "target.provider=cuda"]
    refused = CliRunner().invoke(app, [*override, "--set", 'target.provider_options={gpu_external_alloc = "1"}'])
    assert "provider_options.gpu_external_alloc" in refused.stderr
    allowed = CliRunner().invoke(app, ["bench", "x.onnx", "./theirs.toml", OPTION])
    assert "provider_options" not in allowed.output and allowed.exit_code == 2
    assert os.environ[ALLOWED_BY] == "1"
