"""How a command ends: exit codes, and one line for every error. Imports nothing heavy, so that `--help` is fast."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import typer

from deploypipe.errors import DeploypipeError
from deploypipe.files.exhausted_resources import find_exhaustion
from deploypipe.installed_packages import find_missing
from deploypipe.text.printable_text import printable

_INTERRUPTED = "interrupted; the same command resumes"
EXIT_HOLD, EXIT_DIFFERENT, EXIT_ERROR, EXIT_INTERRUPTED = 1, 1, 2, 130


def say(line: object, *, file: TextIO | None = None, flush: bool = False) -> None:
    """Print one line. Names and reasons in it come from elsewhere: what would steer the terminal is shown instead."""
    print(printable(str(line)), file=file, flush=flush)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Every failure leaves with its own code: HOLD (1) is a decision and never an accident."""
    try:
        with _terminated_like_interrupted():
            yield
    except KeyboardInterrupt:
        _say_interrupted()
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except DeploypipeError as error:
        say(f"error: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_ERROR) from None
    except BrokenPipeError:  # `deploypipe ... | head`: the reader of the output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_ERROR) from None
    except Exception as error:
        if _comes_from_an_interrupt(error):
            _say_interrupted()
            raise typer.Exit(EXIT_INTERRUPTED) from None
        if not (problem := _not_a_bug(error)):
            traceback.print_exc()
            problem = "this is a bug in deploypipe; please report it with the lines above"
        say(f"error: {problem}", file=sys.stderr)
        raise typer.Exit(EXIT_ERROR) from None


def _say_interrupted() -> None:
    """Print an error in one line. A process for one of several targets leaves that to its parent."""
    from multiprocessing import parent_process  # late: help need not wait for it

    if parent_process() is None:
        say(_INTERRUPTED, file=sys.stderr)


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM, by which CI servers and schedulers cancel a job, ends a command like Ctrl-C: what is half-written is
    removed. torchrun ends its processes by it and does not wait: there it stays as it was."""

    def handle(number: int, _: object) -> None:
        if os.getpid() != ours:  # a pipeline's own process, forked from this one
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        raise KeyboardInterrupt

    ours, is_main = os.getpid(), threading.current_thread() is threading.main_thread()
    if not is_main or "TORCHELASTIC_RUN_ID" in os.environ or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _comes_from_an_interrupt(error: BaseException | None) -> bool:
    """Whether an interrupt hit a library in the middle of its work, and the library raised its own error."""
    while error and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _not_a_bug(error: Exception) -> str:
    """Name what the machine lacks, and the remedy; empty if the error is a bug of ours."""
    if found := find_exhaustion(error):
        problem, remedy = found
        return f"{problem}; {remedy}, and run the same command again"
    if isinstance(error, ImportError) and (problem := find_missing()):
        return problem
    from deploypipe.user_code_errors import find_user_error  # late: brings torch

    if fault := find_user_error(error):
        return str(fault)
    if isinstance(error, OSError) and error.filename:
        path = error.filename2 or error.filename  # the second is what a file was to be renamed to
        return f"{path}: {error.strerror}; check the path and its rights"
    return ""
