"""Time each operator of a file, with ONNX Runtime's own profile of the optimised graph."""

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from deploypipe.benchmark.bench_results import LayerTime
from deploypipe.provider_options import require_harmless_options
from deploypipe.runtimes import Array
from deploypipe.runtimes.onnxruntime import PROVIDERS
from deploypipe.target import Target

_NUM_WARM_UP, _NUM_RUNS = 5, 30
_SUFFIX = "_kernel_time"
_WARNINGS = 3


def profile_layers(path: Path, inputs: Mapping[str, Array], target: Target) -> tuple[LayerTime, ...]:
    """Time the operators, slowest first. For onnxruntime targets. Profiling makes the sum longer than a latency.

    The file must have run before: errors of onnxruntime are not caught.
    """
    import onnxruntime

    require_harmless_options(target)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = target.num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _WARNINGS
    options.enable_profiling = True
    first, *others = PROVIDERS[target.provider].names
    with TemporaryDirectory() as folder:
        options.profile_file_prefix = os.path.join(folder, "profile")
        providers = [(first, dict(target.provider_options)), *((name, {}) for name in others)]
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=providers)
        for _ in range(_NUM_WARM_UP + _NUM_RUNS):
            session.run(None, dict(inputs))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return read_profile(events, num_runs=_NUM_RUNS)


def read_profile(events: Sequence[Mapping[str, Any]], *, num_runs: int) -> tuple[LayerTime, ...]:
    """Read the last `num_runs` runs of a profile as `end_profiling` writes it, with times in microseconds."""
    runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == "model_run")[-num_runs:]
    times: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0.0] * len(runs))
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith(_SUFFIX):
            continue
        for i, (begin, end) in enumerate(runs):
            if begin <= event["ts"] <= end:
                about = event["args"]
                key = (event["name"].removesuffix(_SUFFIX), about.get("op_name", ""), about.get("provider", ""))
                times[key][i] += event["dur"]
    medians = {key: float(median(values)) for key, values in times.items()}
    total = sum(medians.values())
    return tuple(
        LayerTime(name=name, op_type=op, provider=provider, time_us=us, share=us / total if total else 0.0)
        for (name, op, provider), us in sorted(medians.items(), key=lambda item: -item[1])
    )
