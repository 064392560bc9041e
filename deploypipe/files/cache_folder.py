"""The folder in which measurements outlive a run."""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO, TypeVar
from deploypipe.errors import ExhaustedError, RunFolderError
from deploypipe.files.exhausted_resources import find_exhaustion
from deploypipe.files.json_records import from_json, from_plain, to_json, to_plain
from deploypipe.recipe import Recipe
from deploypipe.records import (
    BaselineComparison,
    BenchmarkReport,
    EngineFile,
    Event,
    GateDecision,
    Golden,
    Origin,
    PrecisionChoice,
    Progress,
    PruneReport,
    PruningPlan,
    RepairReport,
    ScoreSummary,
    SearchResult,
    StageTime,
    Structures,
    TrainLog,
    silent,
)
from deploypipe.runs.stage_mirror import download_stage, upload_stage
from deploypipe.scheduling.exclusive_measurement import give_way, pause, side_by_side, try_lock
from deploypipe.target import Target
from deploypipe.text import strict_json
from deploypipe.text.masked_addresses import masked
from deploypipe.text.sealed_json import seal, unseal



def cache_folder() -> Path:
    """Where measurements outlive a run: `DEPLOYPIPE_CACHE`, or ~/.cache/deploypipe."""
    return Path(os.environ.get("DEPLOYPIPE_CACHE") or Path.home() / ".cache" / "deploypipe")
