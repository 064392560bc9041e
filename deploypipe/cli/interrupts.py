"""An interrupt is never lost: it is raised again at the next event of the run."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def kept_interrupts() -> Iterator[Callable[[], None]]:
    """Raise an interrupt again that came where Python drops exceptions: in a finaliser, or below native code.

    Yields what raises it. Python would print the dropped one with a traceback: it is not shown.
    """
    is_pressed = False

    def handle(*_: object) -> None:
        nonlocal is_pressed
        is_pressed = True
        raise KeyboardInterrupt

    def raise_if_interrupted() -> None:
        if is_pressed:
            raise KeyboardInterrupt

    def tell_dropped(dropped: "sys.UnraisableHookArgs") -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            tell_others(dropped)

    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield raise_if_interrupted
        return
    tell_others = sys.unraisablehook
    sys.unraisablehook = tell_dropped
    signal.signal(signal.SIGINT, handle)
    try:
        yield raise_if_interrupted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = tell_others
