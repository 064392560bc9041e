"""The figures that a run's events hold, by the names that trackers show."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict

from deploypipe.budgets import figures
from deploypipe.records import BenchmarkReport, EpochEnded, Event, Finished, RunEnded, Started, Trial, TrialEnded
from deploypipe.tracking.tracked_run import Figure


class EventFigures:
    """Called with each event of a run, in order. `texts`: the verdict and its reason, once there is one."""

    def __init__(self) -> None:
        self.texts: Mapping[str, str] = {}
        self._num_trainings = 0

    def __call__(self, event: Event) -> list[Figure]:
        match event:
            case Started(stage="finetune"):
                self._num_trainings += 1  # a network that the benchmark finds too slow is followed by another one
            case Finished() if event.seconds is not None:
                return [Figure(name=f"seconds/{event.stage}", value=event.seconds)]
            case EpochEnded():
                return list(_of_epoch(event, self._training(event)))
            case TrialEnded():
                return list(_of_trial(event.trial))
            case RunEnded():
                self.texts = {"verdict": event.decision.verdict.value, "reason": event.decision.reason}
                return [
                    Figure(name=f"final/{name}", value=value) for name, value in final_figures(event.report).items()
                ]
        return []

    def _training(self, event: EpochEnded) -> str:
        if event.trial is not None:
            return f"finalist_{event.trial}"
        return "finetune" if self._num_trainings < 2 else f"finetune_{self._num_trainings}"


def _of_epoch(event: EpochEnded, training: str) -> Iterator[Figure]:
    epoch = event.epoch
    values = {"val_accuracy": epoch.val_accuracy}
    if epoch.epoch:  # epoch 0 is the state before the first step
        values |= {"train_loss": epoch.train_loss, "learning_rate": epoch.learning_rate, "seconds": epoch.seconds}
    for name, value in values.items():
        if math.isfinite(value):
            yield Figure(name=f"{training}/{name}", value=value, step=epoch.epoch)


def _of_trial(trial: Trial) -> Iterator[Figure]:
    values = {"is_feasible": trial.feasible, **asdict(trial.candidate)}
    values |= {f"knob_{name}": value for name, value in trial.knobs.items()}
    for name, value in values.items():
        if isinstance(value, bool | int | float) and math.isfinite(value):
            yield Figure(name=f"trial/{name}", value=float(value), step=trial.number)


def final_figures(report: BenchmarkReport) -> dict[str, float]:
    """All figures of both files, and how they compare."""
    found: dict[str, float | None] = {}
    for name, measured in (("dense", report.dense), ("compressed", report.compressed)):
        accuracy = measured.accuracy.value if measured.accuracy else None
        found |= {f"{name}.{key}": value for key, value in {"accuracy": accuracy, **figures(measured)}.items()}
    for key, interval in (("latency_ratio", report.latency_ratio), ("accuracy_drop_pp", report.accuracy_drop_pp)):
        if interval:
            found |= {key: interval.value, f"{key}.low": interval.low, f"{key}.high": interval.high}
    return {key: float(value) for key, value in found.items() if value is not None}
