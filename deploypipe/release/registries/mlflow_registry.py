"""MLflow 3 as the registry: each bundle becomes a run, an onnx model, a version of it, and aliases.

The run is logged first, then the version is created, and the alias, by which it is found, is set last: an interrupted
promotion publishes nothing, and the same call completes it. One of two importers of mlflow.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from deploypipe.errors import BundleError, DeploypipeError, NoVersionError
from deploypipe.files.json_records import to_plain
from deploypipe.installed_packages import ONNXRUNTIME, find_package
from deploypipe.release.bundle import MODEL
from deploypipe.release.manifest import Manifest
from deploypipe.runs.result import RunResult
from deploypipe.text.masked_addresses import masked, without_secrets
from deploypipe.tracking.event_figures import final_figures
from deploypipe.tracking.mlflow_tracker import MLFLOW_SETTINGS
from deploypipe.tracking.tracked_run import flat_parameters
from deploypipe.verify import golden_case

_DIGEST, _COMPLETE = "deploypipe.digest", "deploypipe.complete"
_CPU = ["CPUExecutionProvider"]
_BUNDLE, _MODEL = "bundle", "model"
_MAX_PARAMS = 100  # logged by one call
_MAX_VALUE = 500  # characters of a parameter; longer ones are only in the bundle
_DEAD_AFTER_S = 24 * 3600.0
_MAX_MESSAGE = 200  # characters of an error


def promote(bundle: Path, manifest: Manifest, result: RunResult, alias: str) -> int:
    """Log the bundle on the server of MLFLOW_TRACKING_URI unless it is there, and point `alias` to its version.

    Raises BundleError if the server refuses or does not respond; the alias then still points to the earlier version.
    """
    with _server() as mlflow:
        client = mlflow.MlflowClient()
        version = _find(client, manifest) or _add(mlflow, client, bundle, manifest, result)
        client.set_registered_model_alias(manifest.name, alias, version)
        return int(version)


def download(name: str, alias: str, folder: Path) -> tuple[Path, str]:
    """Download an alias's bundle to a new folder inside `folder`; return the folder and the digest of its promotion.

    Raises BundleError like `promote`, NoVersionError if there is no such alias.
    """
    with _server() as mlflow:
        client = mlflow.MlflowClient()
        models = client.search_registered_models(f"name = '{name}'")
        aliases = models[0].aliases if models else {}
        if alias not in aliases:
            known = ", ".join(sorted(aliases)) or "none"
            raise NoVersionError(
                f"models:/{name}@{alias}: there is no such alias (known: {known}); set it with `deploypipe promote`"
            )
        version = client.get_model_version(name, aliases[alias])
        if not (version.run_id and _DIGEST in version.tags):
            raise BundleError(
                f"models:/{name}@{alias}: was not promoted by deploypipe; set the alias with `deploypipe promote`"
            )
        local = mlflow.artifacts.download_artifacts(run_id=version.run_id, artifact_path=_BUNDLE, dst_path=str(folder))
        return Path(local), version.tags[_DIGEST]


def _find(client: Any, manifest: Manifest) -> str | None:
    """The first version with the same content."""
    versions = client.search_model_versions(f"name = '{manifest.name}'")
    numbers = [int(version.version) for version in versions if version.tags.get(_DIGEST) == manifest.digest]
    return str(min(numbers)) if numbers else None


def _add(mlflow: ModuleType, client: Any, bundle: Path, manifest: Manifest, result: RunResult) -> str:
    run = _find_run(client, manifest)
    if run is None:
        run = _log_run(mlflow, client, bundle, manifest, result)
    if not client.search_registered_models(f"name = '{manifest.name}'"):
        client.create_registered_model(manifest.name)
    [output] = run.outputs.model_outputs
    version = client.create_model_version(
        manifest.name,
        source=f"models:/{output.model_id}",
        run_id=run.info.run_id,
        model_id=output.model_id,
        tags={_DIGEST: manifest.digest, "deploypipe.verdict": result.decision.verdict.value},
    )
    return str(version.version)


def _find_run(client: Any, manifest: Manifest) -> Any:
    """The bundle's run, if it was logged completely; an incomplete one is deleted."""
    experiment = client.get_experiment_by_name(manifest.name)
    if experiment is None:
        return None
    _remove_leftovers(client, experiment.experiment_id)
    found = client.search_runs([experiment.experiment_id], f"tags.`{_DIGEST}` = '{manifest.digest}'")
    complete = [run for run in found if _COMPLETE in run.data.tags]
    for run in found if not complete else ():
        client.delete_run(run.info.run_id)
    return complete[0] if complete else None


def _remove_leftovers(client: Any, experiment_id: str) -> None:
    """Delete runs of interrupted promotions that started over a day ago, so that none is still being logged."""
    before = int((time.time() - _DEAD_AFTER_S) * 1000)
    for run in client.search_runs([experiment_id], f"attributes.start_time < {before}"):
        if _DIGEST in run.data.tags and _COMPLETE not in run.data.tags:
            client.delete_run(run.info.run_id)


def _log_run(mlflow: ModuleType, client: Any, bundle: Path, manifest: Manifest, result: RunResult) -> Any:
    experiment = client.get_experiment_by_name(manifest.name)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(manifest.name)
    checks = {f"gate.{check.name}": check.status.value for check in result.decision.checks}
    tags = {_DIGEST: manifest.digest, "gate": f"{result.decision.verdict.value}: {result.decision.reason}", **checks}
    with mlflow.start_run(experiment_id=experiment_id, run_name=bundle.name, tags=tags) as run:
        params = list(_params(result).items())
        for start in range(0, len(params), _MAX_PARAMS):
            mlflow.log_params(dict(params[start : start + _MAX_PARAMS]))
        mlflow.log_metrics(final_figures(result.benchmark))
        if result.search:
            for trial in result.search.trials:
                mlflow.log_metric("trial.accuracy", trial.candidate.accuracy, step=trial.number)
            mlflow.log_table(_trial_table(result), "trials.json")
        mlflow.log_artifacts(str(bundle), _BUNDLE)
        mlflow.log_artifact(str(bundle / "report.html"))
        _log_model(mlflow, bundle, result)
        mlflow.set_tag(_COMPLETE, "true")
    return client.get_run(run.info.run_id)


def _log_model(mlflow: ModuleType, bundle: Path, result: RunResult) -> None:
    """Log the model for `mlflow.pyfunc` and the server's tools. The approved bytes are those in the bundle."""
    mlflow.onnx.log_model(
        onnx.load(bundle / MODEL),
        name=_MODEL,
        signature=mlflow.models.infer_signature(golden_case(bundle), golden_case(bundle, MODEL)),
        pip_requirements=["onnx", find_package(ONNXRUNTIME).name, "numpy", "pandas"],
        onnx_execution_providers=[
            *(["CUDAExecutionProvider"] if result.target.needs_gpu else []),
            "CPUExecutionProvider",
        ],
        save_as_external_data=bool(result.benchmark.compressed.file.data),
    )


def _params(result: RunResult) -> dict[str, str]:
    settings = {"recipe": to_plain(result.recipe), "target": to_plain(result.target), "pipeline": result.pipeline}
    return {key: value for key, value in flat_parameters(settings, "") if len(value) <= _MAX_VALUE}


def _trial_table(result: RunResult) -> dict[str, list[Any]]:
    """A column for each figure and knob, a row for each trial."""
    trials = result.search.trials if result.search else ()
    rows = [
        {"trial": trial.number, "feasible": trial.feasible, **asdict(trial.candidate), **trial.knobs}
        for trial in trials
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


@contextmanager
def _server() -> Iterator[ModuleType]:
    """mlflow with its telemetry off. Its errors become BundleError, without a password in the address."""
    for name, value in MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import mlflow
        import mlflow.onnx
        from mlflow.exceptions import MlflowException
        from requests.exceptions import RequestException
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        raise DeploypipeError(f"{error.name} is missing; pip install 'deploypipe[mlflow]'") from None
    try:
        yield mlflow
    except (MlflowException, RequestException, SQLAlchemyError, ValueError) as error:  # the last: an odd address
        text = (str(error).splitlines() or [type(error).__name__])[0][:_MAX_MESSAGE]
        address = mlflow.get_tracking_uri()
        message = without_secrets(text, address)
        raise BundleError(
            f"MLflow at {masked(address)}: {message}; check that MLFLOW_TRACKING_URI names a running server, and repeat"
        ) from None
