"""Live tracking: MLflow and TensorBoard show a run while it is at work. Trackers listen to the run's events.

MLflow is used if MLFLOW_TRACKING_URI is set, TensorBoard if a folder is named. A tracker that is down or slow is
reported once, and neither stops nor slows the run.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from deploypipe.errors import ConfigError, DeploypipeError
from deploypipe.records import Event, Notify, Warned
from deploypipe.tracking.delivery import Delivery
from deploypipe.tracking.event_figures import EventFigures
from deploypipe.tracking.mlflow_tracker import MlflowTracker
from deploypipe.tracking.tensorboard_tracker import TensorboardTracker
from deploypipe.tracking.tracked_run import Outcome, TrackedRun
from deploypipe.user_code_errors import find_user_error

_STAGE = "tracking"
_WAIT_S = 10.0  # for the last figures, when the run is over


def require_packages(tensorboard: Path | None) -> None:
    """Raise ConfigError if TensorBoard files are asked for and its package is missing."""
    if tensorboard is not None and find_spec("tensorboard") is None:
        raise ConfigError(
            "--tensorboard", "", "the package tensorboard is not installed", "pip install 'deploypipe[tracking]'"
        )


@contextmanager
def tracked(notify: Notify, run: TrackedRun, tensorboard: Path | None = None) -> Iterator[Notify]:
    """A listener that passes events on to `notify`, and their figures to the trackers. An error ends the tracked run as
    FAILED, an interrupt as KILLED, both with the message."""
    deliveries = _deliveries(notify, run, tensorboard)
    if not deliveries:
        yield notify
        return
    figures_of = EventFigures()

    def report(event: Event) -> None:
        notify(event)
        figures = figures_of(event)
        for delivery in deliveries:
            delivery.put(figures)
        _report(deliveries, notify)

    try:
        yield report
    except BaseException as error:
        _close(deliveries, _outcome_of(error), notify)
        raise
    _close(deliveries, Outcome(status="FINISHED", texts=figures_of.texts), notify)


def _deliveries(notify: Notify, run: TrackedRun, tensorboard: Path | None) -> list[Delivery]:
    deliveries = []
    if address := os.environ.get("MLFLOW_TRACKING_URI"):
        if find_spec("mlflow") is None:
            problem = "MLFLOW_TRACKING_URI is set, but mlflow is not installed, so this run is not tracked"
            notify(Warned(stage=_STAGE, text=f"{problem}; pip install 'deploypipe[mlflow]', or unset it"))
        else:
            deliveries.append(Delivery(MlflowTracker(run, address)))
    if tensorboard is not None:
        deliveries.append(Delivery(TensorboardTracker(run, tensorboard / run.name)))
    return deliveries


def _report(deliveries: Sequence[Delivery], notify: Notify) -> None:
    """Warn about each problem once, from the run's own thread."""
    for delivery in deliveries:
        if text := delivery.take_problem():
            notify(Warned(stage=_STAGE, text=text))


def _close(deliveries: Sequence[Delivery], outcome: Outcome, notify: Notify) -> None:
    for delivery in deliveries:
        delivery.close(outcome, _WAIT_S)
    _report(deliveries, notify)


def _outcome_of(error: BaseException) -> Outcome:
    if not isinstance(error, Exception):
        return Outcome(status="KILLED", texts={"error": "interrupted; the same command resumes"})
    shown = error if isinstance(error, DeploypipeError) else find_user_error(error)
    texts: Mapping[str, str] = {"error": str(shown) if shown else f"{type(error).__name__}: {error}"}
    return Outcome(status="FAILED", texts=texts)
