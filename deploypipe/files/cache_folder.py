"""The folder in which measurements outlive a run."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where measurements outlive a run: `DEPLOYPIPE_CACHE`, or ~/.cache/deploypipe."""
    return Path(os.environ.get("DEPLOYPIPE_CACHE") or Path.home() / ".cache" / "deploypipe")
