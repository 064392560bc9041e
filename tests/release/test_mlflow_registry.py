"""MLflow as the registry: a real server with a SQLite store, which goes down in the middle of a promotion."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
from releasable_run import write_run
from typer.testing import CliRunner

from deploypipe.cli import app
from deploypipe.errors import BundleError
from deploypipe.release.bundle import make_bundle
from deploypipe.release.manifest import check_manifest
from deploypipe.release.registries.registry import promote, resolve
from deploypipe.verify import golden_case

mlflow = pytest.importorskip("mlflow", reason="mlflow is absent; pip install 'deploypipe[mlflow]'")

RUNNER = CliRunner()
NAME = "digits-x86_cpu"
_STARTING_SECONDS = 300  # a machine at other work takes minutes


class Server:
    """`mlflow server` on a port of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        begun = time.monotonic()
        while not self._answers():
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() - begun < _STARTING_SECONDS, (self.folder / "log").read_text()
            time.sleep(0.2)

    def kill(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _answers(self) -> bool:
        try:
            with urlopen(f"{self.address}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("mlflow") / "server")
    made.start()
    yield made
    made.kill()


@pytest.fixture(autouse=True)
def environment(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setenv("DEPLOYPIPE_CACHE", str(tmp_path / "cache"))
    mlflow.set_tracking_uri(None)
    yield
    mlflow.set_tracking_uri(None)


def bundle_of(folder: Path, seed: int) -> Path:
    write_run(folder / f"run-{seed}", seed=seed)
    return make_bundle(folder / f"run-{seed}", folder / "bundles")


def test_a_bundle_is_logged_registered_and_found_again(tmp_path: Path) -> None:
    first, second = (bundle_of(tmp_path, seed) for seed in (0, 1))
    assert [promote(bundle, "models:/", "production") for bundle in (first, second, first)] == [1, 2, 1]
    assert promote(second, "models:", "staging") == 2
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"  # and MLflow reports nothing to its makers
    client = mlflow.MlflowClient()
    version = client.get_model_version_by_alias(NAME, "production")
    assert version.tags["deploypipe.digest"] == check_manifest(first).digest
    experiment = client.get_experiment_by_name(NAME).experiment_id
    [run] = [run for run in client.search_runs([experiment]) if run.info.run_name == first.name]
    assert run.info.status == "FINISHED"
    assert run.data.params["target.runtime"] == "onnxruntime" and run.data.params["pipeline"] == "digits"
    assert run.data.metrics["compressed.accuracy"] == pytest.approx(0.98)
    assert run.data.tags["gate"].startswith("SHIP") and run.data.tags["gate.accuracy_drop"] == "PASS"
    trials = client.load_table(experiment, "trials.json", run_ids=[run.info.run_id])
    assert len(trials) > 0 and {"trial", "accuracy", "feasible"} <= set(trials.columns)

    inputs, answers = golden_case(first), golden_case(first, "model.onnx")
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@production")
    np.testing.assert_allclose(model.predict(inputs)["output"], answers["output"], rtol=1e-5)

    found = resolve(f"models:/{NAME}@production")
    assert {path.name: path.read_bytes() for path in found.iterdir()} == {
        path.name: path.read_bytes() for path in first.iterdir()
    }
    (found / "model.onnx").write_bytes(b"changed in the cache")
    assert check_manifest(resolve(f"models:/{NAME}@production")).digest == check_manifest(first).digest
    with pytest.raises(BundleError, match="nobody"):
        resolve(f"models:/{NAME}@nobody")
    with pytest.raises(BundleError, match="no_such"):
        resolve("models:/no_such@production")


def test_the_gate_compares_with_an_alias(tmp_path: Path) -> None:
    promote(bundle_of(tmp_path, 2), "models:", "champion")
    write_run(tmp_path / "worse", num_wrong=30)
    held = RUNNER.invoke(app, ["gate", str(tmp_path / "worse"), "--baseline", f"models:/{NAME}@champion"])
    assert held.exit_code == 1 and "accuracy against baseline" in held.output, held.output
    verified = RUNNER.invoke(app, ["verify", f"models:/{NAME}@champion"])
    assert verified.exit_code == 0, verified.output


@pytest.mark.slow
@pytest.mark.parametrize("step", ["log_artifacts", "create_model_version", "set_registered_model_alias"])
def test_a_server_that_goes_down_publishes_nothing_and_is_completed_later(
    step: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_of(tmp_path, {"log_artifacts": 3, "create_model_version": 4}.get(step, 5))
    owner = mlflow if step == "log_artifacts" else mlflow.MlflowClient
    original = getattr(owner, step)

    def go_down(*arguments: object, **options: object) -> object:
        server.kill()
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, go_down)
        with pytest.raises(BundleError, match=f"MLflow at {server.address}"):
            promote(bundle, "models:", f"after_{step}")
    server.start()
    with pytest.raises(BundleError, match="after_"):
        resolve(f"models:/{NAME}@after_{step}")
    number = promote(bundle, "models:", f"after_{step}")
    assert promote(bundle, "models:", f"after_{step}") == number
    digest = check_manifest(bundle).digest
    assert check_manifest(resolve(f"models:/{NAME}@after_{step}")).digest == digest
    versions = mlflow.MlflowClient().search_model_versions(f"name = '{NAME}'")
    assert sum(version.tags["deploypipe.digest"] == digest for version in versions) == 1


def test_a_password_in_the_address_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:hunter2@127.0.0.1:9")
    with pytest.raises(BundleError) as told:
        promote(bundle_of(tmp_path, 6), "models:", "production")
    assert "127.0.0.1:9" in str(told.value) and "hunter2" not in str(told.value)
