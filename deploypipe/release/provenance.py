"""Provenance of a bundle, its inputs and code: an in-toto statement with a SLSA provenance predicate."""

from typing import Any

from deploypipe.files.hashing import digest
from deploypipe.files.json_records import to_plain
from deploypipe.records import FileEntry
from deploypipe.runs.result import RunResult

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
_BUILD_TYPE = "urn:deploypipe:run:1"


def provenance(result: RunResult, files: list[FileEntry]) -> dict[str, Any]:
    """The statement of https://slsa.dev/spec/v1.0/provenance: subjects are the files, dependencies the run's inputs.

    Hashes of networks and data are deploypipe's own (of values, not of files), and their names say so.
    """
    origin = result.origin
    dependencies = [
        {"name": "dense network", "digest": {"deploypipeModel": origin.model}},
        {"name": "data", "digest": {"deploypipeData": origin.data}},
        {"name": f"pipeline {result.pipeline}", "digest": {"deploypipeSource": origin.source}},
        *({"name": name, "uri": f"pkg:pypi/{name}@{version}"} for name, version in sorted(origin.packages.items())),
    ]
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": file.name, "digest": {"sha256": file.sha256}} for file in files],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": _BUILD_TYPE,
                "externalParameters": {
                    "pipeline": result.pipeline,
                    "recipe": to_plain(result.recipe),
                    "target": to_plain(result.target),
                },
                "internalParameters": {"device": result.benchmark.environment.device_fingerprint},
                "resolvedDependencies": dependencies,
            },
            "runDetails": {
                "builder": {"id": f"urn:deploypipe:{origin.packages.get('deploypipe', 'unknown')}"},
                "metadata": {"invocationId": digest(result), "finishedOn": result.benchmark.measured_at},
            },
        },
    }
