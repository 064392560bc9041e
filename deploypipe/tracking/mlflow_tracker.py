"""A run in MLflow: parameters, figures, verdict and status. One of two importers of mlflow."""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deploypipe.files.atomic import write_atomically
from deploypipe.files.hashing import digest
from deploypipe.runs.store import MLFLOW_RUN
from deploypipe.text import strict_json
from deploypipe.text.masked_addresses import masked, without_secrets
from deploypipe.tracking.tracked_run import Figure, Outcome, TrackedRun

_EXPERIMENT = "deploypipe"
_MAX_PARAMS = 100  # logged by one call
_MAX_VALUE = 500  # characters of a parameter
MLFLOW_SETTINGS = {  # defaults of the environment, unless the user has set them
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds of a request, and retries: mlflow's own 120 and 7 take minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class MlflowTracker:
    """The same command in the same folder continues the same run; other parameters begin another one."""

    def __init__(self, run: TrackedRun, address: str) -> None:
        self.title = f"MLflow at {masked(address)}"
        self._run, self._address = run, address
        self._key = digest([masked(address), dict(run.parameters)])
        self._client: Any = None
        self._run_id = ""
        self._is_resumed = False
        self._known: dict[str, set[int]] = {}  # steps of each series that a resumed run has already

    def import_packages(self) -> None:
        """Import mlflow and all that it shares with the run."""
        for name, value in MLFLOW_SETTINGS.items():
            os.environ.setdefault(name, value)
        import_module("mlflow.entities")
        for name in ("sqlalchemy", "alembic"):  # of a store in a database; the search uses them too
            if find_spec(name):
                import_module(name)

    def open(self) -> None:
        for name in ("mlflow", "alembic", "urllib3"):  # each retry would be a line in the middle of the run's own
            logging.getLogger(name).setLevel(logging.ERROR)
        with _masked_errors(self._address):
            from mlflow import MlflowClient

            self._client = MlflowClient(tracking_uri=self._address)
            if not self._continue():
                self._begin()

    def log(self, figures: Sequence[Figure]) -> None:
        with _masked_errors(self._address):
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            metrics = [Metric(f.name, f.value, now, f.step or 0) for f in figures if not self._is_known(f)]
            if metrics:
                self._client.log_batch(self._run_id, metrics=metrics)

    def close(self, outcome: Outcome) -> None:
        with _masked_errors(self._address):
            texts = {"error": "", **outcome.texts} if self._is_resumed else outcome.texts
            for name, text in texts.items():
                self._client.set_tag(self._run_id, f"deploypipe.{name}", text)
            self._client.set_terminated(self._run_id, outcome.status)

    def _begin(self) -> None:
        run = self._client.create_run(self._experiment(), run_name=self._run.name)
        self._run_id = run.info.run_id
        from mlflow.entities import Param

        parameters = [Param(key, value[:_MAX_VALUE]) for key, value in self._run.parameters.items()]
        for start in range(0, len(parameters), _MAX_PARAMS):
            self._client.log_batch(self._run_id, params=parameters[start : start + _MAX_PARAMS])
        state = {"run_id": self._run_id, "key": self._key}
        write_atomically(self._run.folder / MLFLOW_RUN, (strict_json.dumps(state) + "\n").encode())

    def _continue(self) -> bool:
        """Continue the run that the folder names; False if there is none, or if it is no longer on the server."""
        run_id = _stored_run(self._run.folder / MLFLOW_RUN, self._key)
        if not run_id:
            return False
        from mlflow.exceptions import MlflowException

        try:
            is_alive = bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        if is_alive:
            self._client.update_run(run_id, status="RUNNING")
            self._run_id, self._is_resumed = run_id, True
        return is_alive

    def _experiment(self) -> str:
        if number := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return number
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _EXPERIMENT)
        found = self._client.get_experiment_by_name(name)
        if found is None:
            from mlflow.exceptions import MlflowException

            try:
                return str(self._client.create_experiment(name))
            except MlflowException:  # another run created it at the same moment, or the server refuses
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _is_known(self, figure: Figure) -> bool:
        """Whether a resumed run has this step already: finished trials are reported again."""
        if not self._is_resumed or figure.step is None:
            return False
        if figure.name not in self._known:
            history = self._client.get_metric_history(self._run_id, figure.name)
            self._known[figure.name] = {metric.step for metric in history}
        return figure.step in self._known[figure.name]


@contextmanager
def _masked_errors(address: str) -> Iterator[None]:
    """Take the secret parts of the address out of the text of an error."""
    try:
        yield
    except Exception as error:  # of mlflow, of requests, of a database: only the text is used
        raise RuntimeError(without_secrets(str(error) or type(error).__name__, address)) from None


def _stored_run(path: Path, key: str) -> str:
    try:
        state = strict_json.loads(path.read_bytes())
        return str(state["run_id"]) if state["key"] == key else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""
