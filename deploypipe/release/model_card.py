"""The model card that a registry shows for a bundle: Markdown, with the front matter that registries read."""

import json
from math import isfinite

from deploypipe.records import Check
from deploypipe.report.run_tables import before_after, check_cells, int8_approval
from deploypipe.report.safe_markdown import plain, table
from deploypipe.runs.result import RunResult
from deploypipe.text.printable_text import printable


def model_card(result: RunResult) -> str:
    """The card's text, with front matter as in https://huggingface.co/docs/hub/model-cards and its model-index."""
    name, accuracy = printable(result.pipeline), result.benchmark.compressed.accuracy
    metric = {
        "type": "accuracy",
        "name": printable(result.metric),
        "value": None if accuracy is None or not isfinite(accuracy.value) else accuracy.value,
    }
    dataset = {"name": f"test split of {name}", "type": name}
    index = [
        {
            "name": name,
            "results": [{"task": {"type": "other"}, "dataset": dataset, "metrics": [metric]}],
        }
    ]
    environment = result.benchmark.environment
    tags = ["onnx", *(["pruned"] if result.prune else []), result.benchmark.compressed.file.precision]
    lines = [
        "---",
        "library_name: onnx",
        f"tags: {_yaml(tags)}",
        f"model-index: {_yaml(index)}",
        "---",
        "",
        f"# {plain(result.pipeline)} for {plain(result.target.name or result.target.runtime)}",
        "",
        f"{result.decision.verdict.value}: {plain(result.decision.reason)}.",
        "",
        *table(("", "dense", "compressed", "change"), before_after(result)),
        "",
        f"Measured {result.benchmark.measured_at} on {plain(environment.cpu)}"
        f"{', ' + plain(environment.gpu) if environment.gpu else ''}, batch {result.target.batch_size}, "
        f"{result.target.num_threads} thread(s), {result.target.runtime}.",
        *_approval(result),
        "",
        "## Checks",
        "",
        *check_table(result.decision.checks),
        "",
        "## How to check this bundle",
        "",
        "`deploypipe verify DIR --key PUBLIC.pem` checks signature, hashes, and the outputs for stored samples.",
        "With only numpy and onnxruntime installed: `python -m deploypipe.verify DIR`.",
        "",
    ]
    return "\n".join(lines)


def _yaml(value: object) -> str:
    """A value as JSON, which is YAML, but without escapes: YAML rejects those of characters beyond U+FFFF."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _approval(result: RunResult) -> list[str]:
    choice = result.precision
    made = next((row.conversion for row in choice.rows if row.precision == choice.chosen), None) if choice else None
    return [f"The file is {plain(approval)}."] if made and (approval := int8_approval(made)) else []


def check_table(checks: tuple[Check, ...]) -> list[str]:
    """The gate's checks as a Markdown table."""
    return table(("check", "status", "measured", "limit", "reason"), [check_cells(check) for check in checks])
