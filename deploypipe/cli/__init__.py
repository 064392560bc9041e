"""The command line; the only package that prints. Exit codes: 0 SHIP, 1 HOLD, 2 error, 130 interrupted."""

# These add their commands to `app`; help lists them in this order.
from deploypipe.cli import run_command

# isort: split
from deploypipe.cli import init_command, network_commands

# isort: split
from deploypipe.cli import look_commands, runs_command

# isort: split
from deploypipe.cli import measure_commands

# isort: split
from deploypipe.cli import engine_command, release_commands

# isort: split
from deploypipe.cli import blockwise_command, worker_command

# isort: split
from deploypipe.cli import reproduce_command
from deploypipe.cli.app import app

__all__ = [
    "app",
    "blockwise_command",
    "engine_command",
    "init_command",
    "look_commands",
    "main",
    "measure_commands",
    "network_commands",
    "release_commands",
    "reproduce_command",
    "run_command",
    "runs_command",
    "worker_command",
]


def main() -> None:
    """Entry point of the console script."""
    app()
