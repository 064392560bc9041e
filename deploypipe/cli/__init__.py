"""The command line; the only package that prints. Exit codes: 0 SHIP, 1 HOLD, 2 error, 130 interrupted."""

from deploypipe.cli import run  # these add their commands to `app`; this one stands first in its help

# isort: split
from deploypipe.cli import blockwise, commands, releases, workers
from deploypipe.cli.app import app
from deploypipe.cli.named import load_target

__all__ = ["app", "blockwise", "commands", "load_target", "main", "releases", "run", "workers"]


def main() -> None:
    """Entry point of the console script."""
    app()
