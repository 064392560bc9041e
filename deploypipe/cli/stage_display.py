"""Show the events of a run: a live view in a terminal, plain lines elsewhere."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from deploypipe.cli.exit_codes import say
from deploypipe.cli.interrupts import kept_interrupts
from deploypipe.cli.live_stages import LiveStages
from deploypipe.records import Cached, Event, Finished, Note, Notify, Planned, Progress, Started, Warned
from deploypipe.records.stages import PREPARATION, STAGES, doing_of, title_of, work_of
from deploypipe.report.run_tables import seconds

TITLE_WIDTH = max(len(stage.title) for stage in STAGES)
_QUIET_SECONDS = 10.0  # at least, between two lines about the same stage
_QUIET_SHARE = 0.25  # of the stage's time so far: a stage of ten hours has about forty lines
_UNSTORED = {stage.name for stage in PREPARATION}
_IN_PARTS = "finalist"  # each is stored as a stage of its own, and all of them share a line


@contextmanager
def shown_stages() -> Iterator[Notify]:
    """A listener that shows events: a live view in a terminal, plain lines in a file, a CI log or a dumb terminal.

    NO_COLOR leaves the live view without colours.
    """
    console = Console(file=sys.stdout)  # also while the live view has put itself in its place
    with kept_interrupts() as raise_if_interrupted:
        if not _is_live(console):
            plain = PlainStages()

            def show(event: Event) -> None:
                raise_if_interrupted()
                plain(event)

            yield show
            return
        with LiveStages(console, TITLE_WIDTH) as live:

            def show_live(event: Event) -> None:
                raise_if_interrupted()
                live(event)

            yield show_live


def _is_live(console: Console) -> bool:
    """Whether lines can be drawn again. FORCE_COLOR makes rich say yes in a CI log, too."""
    is_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    return sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal and not is_ci


class PlainStages:
    """One line for each stage that ends, and a few while it lasts.

    Work inside a stage (one trial's repair, the timed runs) reports progress under its own name. It is shown on the
    stage's line, but it does not show how much of the stage is left.
    """

    def __init__(self) -> None:
        self.stage, self.begun, self.shown = "", 0.0, 0.0
        self.parts: list[float] = []  # seconds that each part took

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        if self._is_end_of_part(event, now):
            return
        match event:
            case Started():
                self.stage, self.begun, self.shown = event.stage, now, now
                if event.stage in _UNSTORED:
                    say(doing_of(event.stage), flush=True)
            case Cached():
                _say_of(event.stage, "cached")
            case Finished() if event.stage not in _UNSTORED:
                _say_of(event.stage, f"done in {seconds(now - self.begun)}")
            case Note():
                _say_of(event.stage, event.text)
            case Warned():
                say(f"warning: {event.text}", file=sys.stderr, flush=True)
            case Progress():
                quiet = max(_QUIET_SECONDS, _QUIET_SHARE * (now - self.begun))
                if event.total and event.done and now - self.shown > quiet:
                    self.shown = now
                    _say_of(self.stage, self._progress_text(event, now - self.begun))

    def _is_end_of_part(self, event: Event, now: float) -> bool:
        """Whether a part of a stage ends, whose time is added up. The stage's line comes before the next stage's."""
        if isinstance(event, Planned):
            return False
        if event.stage == _IN_PARTS and isinstance(event, Cached | Finished):
            self.parts.append(now - self.begun if isinstance(event, Finished) else 0.0)
            return True
        if self.parts and event.stage != _IN_PARTS:
            _say_of(_IN_PARTS, f"done in {seconds(sum(self.parts))}" if any(self.parts) else "cached")
            self.parts.clear()
        return False

    def _progress_text(self, event: Progress, passed_s: float) -> str:
        text = f"{event.done} of {event.total}"
        if event.stage != self.stage:
            return f"{work_of(event.stage)} {text}"
        return f"{text}, about {seconds(passed_s / event.done * (event.total - event.done))} left"


def _say_of(stage: str, text: str) -> None:
    say(f"{title_of(stage):<{TITLE_WIDTH}} {text}", flush=True)
