"""A finished run, written by hand."""

from dataclasses import replace
from typing import Literal

from deploypipe import records as r
from deploypipe.recipe import Recipe
from deploypipe.runs.result import RunResult
from deploypipe.target import Budget, Target

_STATE = r.MachineState(
    load=0.1,
    clock_mhz=3000.0,
    temperature_c=50.0,
    num_throttled=3,
    num_quota_throttled=5,
    busy_s=100.0,
    stolen_s=1.0,
    own_s=10.0,
    at_s=1000.0,
)


def conditions(verdict: Literal["steady", "throttled", "noisy"], *reasons: str) -> r.Conditions:
    """Of a measurement of six seconds."""
    after = replace(_STATE, at_s=1006.0)
    return r.Conditions(before=_STATE, after=after, other_cpus=0.0, stolen_share=0.0, verdict=verdict, reasons=reasons)


def interval(value: float, half: float) -> r.Interval:
    return r.Interval(value=value, low=value - half, high=value + half)


def measurement(name: str, scale: float) -> r.Measurement:
    return r.Measurement(
        file=r.ModelFile(
            path=f"08-export-abc/{name}.onnx",
            sha256=name.ljust(64, "0"),
            size_bytes=int(2_000_000 * scale),
            precision="fp32",
            opset=20,
            max_abs_error=1e-6,
            input_names=("input",),
            output_names=("output",),
        ),
        num_params=int(800_000 * scale),
        num_macs=int(7_000_000 * scale),
        latency=r.Latency(
            batch_size=1,
            num_threads=1,
            samples_ms=tuple(scale * (0.2 + 0.0001 * (i % 37)) for i in range(400)),
            p50_ms=interval(0.2 * scale, 0.001),
            p90_ms=0.21 * scale,
            p99_ms=None,
        ),
        peak_memory_mib=60.0 * scale,
        per_sample_metric=(1.0,) * 490 + (0.0,) * 10,
        accuracy=interval(0.98, 0.01),
    )


def trial(number: int, latency_p50_ms: float, is_feasible: bool) -> r.Trial:
    candidate = r.Candidate(
        accuracy=0.95,
        latency_p50_ms=latency_p50_ms,
        peak_memory_mib=None,
        file_size_mib=1.0,
        num_params=400_000,
        num_macs=3_000_000,
    )
    cut = r.GroupCut(group="layer1.0.conv1", asked=17, removed=tuple(range(16, 32)), num_units=32, reason="steps of 8")
    plan = r.PruningPlan(model_fingerprint="m", cuts=(cut,), edits=(), blocks=("layer1.1",))
    return r.Trial(
        number=number,
        knobs={"mix": 0.5},
        candidate=candidate,
        violations={"latency_p50": latency_p50_ms / 0.14 - 1},
        feasible=is_feasible,
        plan=plan,
    )


def group(name: str, num_units: int) -> r.ChannelGroup:
    member = r.Member(module=name, side="out", units=tuple((unit,) for unit in range(num_units)))
    return r.ChannelGroup(name=name, num_units=num_units, members=(member,), params_per_unit=10.0, macs_per_unit=100.0)


def score_summary() -> r.ScoreSummary:
    kept = (0.0, 0.6, 0.96, 1.0)
    groups = (
        r.GroupSummary(
            name="layer1.0.conv1",
            num_units=3,
            kept_information=kept,
            redundant=(1, 1, 0),
            suggested=2,
            stability=0.95,
            null=0.03,
            reason="",
        ),
        r.GroupSummary(
            name="layer1.1.conv1",
            num_units=3,
            kept_information=kept,
            redundant=(1, 1, 0),
            suggested=None,
            stability=0.41,
            null=None,
            reason="nothing of it <could> be observed",
        ),
    )
    return r.ScoreSummary(
        scorer="mipp",
        num_samples=512,
        shares=(0.9, 0.95, 0.99),
        groups=groups,
        shaky=("layer1.1.conv1",),
        samples_wanted=3000,
        block_names=("layer1.0", "layer1.1"),
        block_cka=((1.0, 0.99), (0.99, 1.0)),
        clusters=(("layer1.0", "layer1.1"),),
    )


def finished_run() -> RunResult:
    rows = (
        r.PruneRow(name="layer1.0.conv1", kind="channels", width_before=32, asked=17, realised=16, reason="steps of 8"),
        r.PruneRow(name="layer1.1", kind="block", width_before=1, asked=0, realised=0),
    )
    epochs = tuple(
        r.EpochLog(epoch=i, learning_rate=0.01, train_loss=1.0 / (i + 1), val_accuracy=0.95 + 0.01 * i, seconds=1.0)
        for i in range(4)
    )
    return RunResult(
        pipeline="digits",
        metric="top-1 accuracy",
        recipe=Recipe(),
        target=Target(runtime="onnxruntime", name="x86_cpu", budget=Budget(latency_p50="0.7x", accuracy_drop_pp=2.0)),
        structures=r.Structures(
            model_fingerprint="m",
            groups=(group("layer1.0.conv1", 32), group("layer1.1.conv1", 32), group("layer2.0.conv1", 64)),
            blocks=(r.Block(name="layer1.1", params=10, macs=20),),
            frozen=(r.Frozen(name="linear", kind="channels", reason="its outputs are the network's <outputs>"),),
            num_params=800_000,
            num_macs=7_000_000,
        ),
        scores=score_summary(),
        search=r.SearchResult(
            dense=trial(0, 0.2, True).candidate,
            trials=(trial(0, 0.12, True), trial(1, 0.18, False), trial(2, 0.13, True)),
            best=0,
        ),
        prune=r.PruneReport(
            rows=rows, params_before=800_000, params_after=400_000, macs_before=7_000_000, macs_after=3_000_000
        ),
        repair=r.RepairReport(
            rows=(
                r.RepairRow(module="head", reason="is called more than once"),
                r.RepairRow(module="layer1.0.conv2", error_before=0.4, error_after=0.05),
            ),
            num_samples=300,
        ),
        training=r.TrainLog(epochs=epochs, chosen_epoch=3),
        benchmark=r.BenchmarkReport(
            dense=measurement("dense", 1.0),
            compressed=measurement("model", 0.5),
            latency_ratio=interval(0.5, 0.01),
            accuracy_drop_pp=interval(0.2, 0.4),
            environment=r.Environment(
                cpu="Some CPU",
                cpu_features=("avx2", "avx512f"),
                num_cpus=2,
                governor="",
                load_before=0.3,
                memory_gib=15.0,
                gpu="",
                system="Linux",
                versions={"torch": "2.13.0"},
                device_fingerprint="abc",
            ),
            is_steady=True,
        ),
        decision=r.GateDecision(
            verdict=r.Verdict.SHIP,
            checks=(
                r.Check(
                    name="latency_p50",
                    status=r.Status.PASS,
                    measured=0.1,
                    interval=interval(0.1, 0.001),
                    limit=0.14,
                    unit="ms",
                    reason="the interval lies below the limit",
                ),
            ),
            reason="all checks passed",
        ),
        stages=tuple(
            r.StageTime(stage=s, seconds=2.0, was_cached=s == "score") for s in ("baseline", "score", "search")
        ),
    )


def untouched_run() -> RunResult:
    """A dense model that met the budget, on a machine that could not measure everything."""
    result = finished_run()
    bare = replace(result.benchmark.dense, latency=None, peak_memory_mib=None, accuracy=None, per_sample_metric=())
    benchmark = replace(result.benchmark, dense=bare, compressed=bare, latency_ratio=None, accuracy_drop_pp=None)
    unknown = r.Check(
        name="latency_p50",
        status=r.Status.UNKNOWN,
        measured=None,
        interval=None,
        limit=None,
        unit="ms",
        reason="was not measured",
    )
    decision = r.GateDecision(verdict=r.Verdict.HOLD, checks=(unknown,), reason="latency_p50 is UNKNOWN")
    return replace(
        result, scores=None, search=None, prune=None, repair=None, training=None, benchmark=benchmark, decision=decision
    )
