"""The bill of materials: the model and the packages that made it, as CycloneDX JSON. The only importer of cyclonedx."""

import uuid
from datetime import datetime

from deploypipe.errors import DeploypipeError
from deploypipe.files.hashing import digest
from deploypipe.records import FileEntry
from deploypipe.runs.result import RunResult

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "urn:deploypipe:bundle")


def bill_of_materials(result: RunResult, files: list[FileEntry]) -> str:
    """CycloneDX 1.6, checked against its schema; the same run gives the same bytes. files: the model's."""
    try:
        from cyclonedx.model import HashAlgorithm, HashType, Property
        from cyclonedx.model.bom import Bom, BomMetaData
        from cyclonedx.model.component import Component, ComponentType
        from cyclonedx.output.json import JsonV1Dot6
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator
        from packageurl import PackageURL
    except ImportError as error:
        raise DeploypipeError(
            f"a bill of materials needs the package {error.name}; pip install 'deploypipe[release]'"
        ) from None
    report, origin = result.benchmark, result.origin
    accuracy = report.compressed.accuracy
    facts = {
        "pipeline": result.pipeline,
        "target": result.target.name,
        "precision": report.compressed.file.precision,
        "parameters": str(report.compressed.num_params),
        result.metric: "" if accuracy is None else f"{accuracy.value:.4f}",
        "dense network": origin.model,
        "data": origin.data,
    }
    model = Component(
        name=result.pipeline,
        version=files[0].sha256[:12],
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="model",
        properties=[Property(name=f"deploypipe:{name}", value=value) for name, value in facts.items() if value],
        components=[
            Component(
                name=file.name,
                type=ComponentType.FILE,
                bom_ref=f"file:{file.name}",
                hashes=[HashType(alg=HashAlgorithm.SHA_256, content=file.sha256)],
            )
            for file in files
        ],
    )
    packages = [
        Component(
            name=name,
            version=version,
            type=ComponentType.LIBRARY,
            bom_ref=f"pkg:{name}",
            purl=PackageURL("pypi", None, name, version),
        )
        for name, version in sorted(origin.packages.items())
    ]
    bom = Bom(
        serial_number=uuid.uuid5(_NAMESPACE, digest(result)),
        metadata=BomMetaData(component=model, timestamp=datetime.fromisoformat(report.measured_at)),
        components=packages,
    )
    bom.register_dependency(model, packages)
    text: str = JsonV1Dot6(bom).output_as_string(indent=1)
    if (problem := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)) is not None:
        raise DeploypipeError(f"the bill of materials does not fit its schema ({problem}); please report this")
    return text + "\n"
