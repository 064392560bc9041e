"""Hand figures to a tracker from a separate thread, through a bounded queue."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import Empty, Full, Queue
from typing import TypeAlias

from deploypipe.tracking.mlflow_tracker import MlflowTracker
from deploypipe.tracking.tensorboard_tracker import TensorboardTracker
from deploypipe.tracking.tracked_run import Figure, Outcome

Tracker: TypeAlias = MlflowTracker | TensorboardTracker

_MAX_WAITING = 1_000  # events; a run has about a hundred in an hour
_MAX_AT_ONCE = 100
_MAX_MESSAGE = 200  # characters of an error


class Delivery:
    """One tracker's queue and thread. `put` never waits."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._waiting: Queue[Sequence[Figure] | Outcome] = Queue(_MAX_WAITING)
        self._problem, self._is_reported = "", False
        self._thread = threading.Thread(target=self._work, name=f"{tracker.title} tracking", daemon=True)
        # The run imports some of the same packages. Two threads at once would see them half imported.
        with self._noting_problems():
            tracker.import_packages()
            self._thread.start()

    def put(self, figures: Sequence[Figure]) -> None:
        if figures and not self._problem:
            try:
                self._waiting.put_nowait(figures)
            except Full:
                self._problem = f"{self._tracker.title} is too slow, so later figures of this run are not tracked"

    def take_problem(self) -> str:
        """Return the problem of the delivery, but only once; "" if there is none or it was returned before."""
        if not self._problem or self._is_reported:
            return ""
        self._is_reported = True
        return self._problem

    def close(self, outcome: Outcome, seconds: float) -> None:
        """Send the end of the run, and wait for at most `seconds` until all is delivered."""
        if not self._thread.is_alive():
            return
        try:
            self._waiting.put_nowait(outcome)
        except Full:
            return
        self._thread.join(seconds)
        if self._thread.is_alive() and not self._problem:
            problem = f"{self._tracker.title} did not take the last figures within {seconds:g} s"
            self._problem = f"{problem}; what it shows of this run may be incomplete"

    def _work(self) -> None:
        with self._noting_problems():
            self._tracker.open()
            while True:
                figures, outcome = self._next()
                if figures:
                    self._tracker.log(figures)
                if outcome is not None:
                    self._tracker.close(outcome)
                    return

    @contextmanager
    def _noting_problems(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a server, its client library and their network may raise anything
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:_MAX_MESSAGE]
            self._problem = f"{self._tracker.title}: {reason}; the run goes on without it"

    def _next(self) -> tuple[list[Figure], Outcome | None]:
        """Wait for the first item, then take all that wait; also return the run's end if it is among them."""
        figures: list[Figure] = []
        item = self._waiting.get()
        while not isinstance(item, Outcome):
            figures += item
            if len(figures) >= _MAX_AT_ONCE:
                return figures, None
            try:
                item = self._waiting.get_nowait()
            except Empty:
                return figures, None
        return figures, item
