"""Read a plan from its file."""

from pathlib import Path

from deploypipe.errors import RunFolderError
from deploypipe.files.json_records import from_json
from deploypipe.records import PruningPlan

PLAN = "plan.json"
_MAX_BYTES = 2**28


def read_plan(file: Path) -> PruningPlan:
    """The plan in a file that exists. Raises RunFolderError if it is too large, ConfigError if it is not a plan."""
    with file.open("rb") as stream:
        content = stream.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise RunFolderError(f"{file}: has more than {_MAX_BYTES:,} bytes, too many for a plan; check the path")
    return from_json(PruningPlan, content, str(file))
