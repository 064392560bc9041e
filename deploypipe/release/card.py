"""The model card: what a registry shows of a bundle. Markdown, with the front matter that registries read."""

import json
from collections.abc import Sequence

from deploypipe.records import Check
from deploypipe.report.tables import before_after, check_cells, int8_approval
from deploypipe.runs import RunResult


def model_card(result: RunResult) -> str:
    """Front matter as in https://huggingface.co/docs/hub/model-cards, metrics in its model-index form."""
    accuracy = result.benchmark.compressed.accuracy
    metric = {"type": "accuracy", "name": result.metric, "value": None if accuracy is None else accuracy.value}
    dataset = {"name": f"test split of {result.pipeline}", "type": result.pipeline}
    index = [
        {
            "name": result.pipeline,
            "results": [{"task": {"type": "other"}, "dataset": dataset, "metrics": [metric]}],
        }
    ]
    environment = result.benchmark.environment
    tags = ["onnx", *(["pruned"] if result.prune else []), result.benchmark.compressed.file.precision]
    lines = [
        "---",
        "library_name: onnx",
        f"tags: {json.dumps(tags)}",
        f"model-index: {json.dumps(index)}",
        "---",
        "",
        f"# {result.pipeline} for {result.target.name or result.target.runtime}",
        "",
        f"{result.decision.verdict.value}: {result.decision.reason}.",
        "",
        *table(("", "dense", "compressed", "change"), before_after(result)),
        "",
        f"Measured {result.benchmark.measured_at} on {environment.cpu}"
        f"{', ' + environment.gpu if environment.gpu else ''}, batch {result.target.batch_size}, "
        f"{result.target.num_threads} thread(s), {result.target.runtime}.",
        *_approval(result),
        "",
        "## Checks",
        "",
        *check_table(result.decision.checks),
        "",
        "## How to check this bundle",
        "",
        "`deploypipe verify DIR --key PUBLIC.pem` checks the signature, every hash, and the answers to stored samples.",
        "Where only numpy and onnxruntime are installed: `python -m deploypipe.verify DIR`.",
        "",
    ]
    return "\n".join(lines)


def _approval(result: RunResult) -> list[str]:
    choice = result.precision
    made = next((row.conversion for row in choice.rows if row.precision == choice.chosen), None) if choice else None
    return [f"The file is {approval}."] if made and (approval := int8_approval(made)) else []


def check_table(checks: tuple[Check, ...]) -> list[str]:
    """The gate's checks as a Markdown table."""
    return table(("check", "status", "measured", "limit", "reason"), [check_cells(check) for check in checks])


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Markdown lines."""
    return [_line(header), _line(("---",) * len(header)), *map(_line, rows)]


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
