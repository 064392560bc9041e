"""The folder for measurements that are kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The cache folder: `DEPLOYPIPE_CACHE`, or ~/.cache/deploypipe."""
    return Path(os.environ.get("DEPLOYPIPE_CACHE") or Path.home() / ".cache" / "deploypipe")
