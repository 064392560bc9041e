"""The command line; the only package that prints. Exit codes: 0 SHIP, 1 HOLD, 2 error, 130 interrupted."""

from deploypipe.cli import run_command  # these add their commands to `app`; this one stands first in its help

# isort: split
from deploypipe.cli import blockwise_command, network_commands, release_commands, worker_command
from deploypipe.cli.app import app

__all__ = [
    "app",
    "blockwise_command",
    "main",
    "network_commands",
    "release_commands",
    "run_command",
    "worker_command",
]


def main() -> None:
    """Entry point of the console script."""
    app()
