"""A run beside the one under test."""

import threading
from pathlib import Path

from deploypipe.scheduling.exclusive_measurement import exclusive_measurement, shared_machine


def start_measuring(folder: Path) -> threading.Event:
    """A run beside this one, which measures as soon as it can; set when it does."""
    measured = threading.Event()

    def measure_once() -> None:
        with shared_machine(folder), exclusive_measurement():
            measured.set()

    threading.Thread(target=measure_once, daemon=True).start()
    return measured
