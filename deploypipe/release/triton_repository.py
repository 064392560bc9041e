"""Write a bundle as a model of a Triton Inference Server's repository: NAME/config.pbtxt and NAME/1/.

The configuration's fields are those of model_config.proto (triton-inference-server/common).
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx

from deploypipe.errors import BundleError
from deploypipe.release.bundle import ENGINE, MODEL, load_bundle
from deploypipe.release.manifest import check_manifest
from deploypipe.target import Target
from deploypipe.untrusted_files.onnx_file_check import check_onnx_file

_TYPES = {
    **{"FLOAT": "FP32", "FLOAT16": "FP16", "DOUBLE": "FP64", "BFLOAT16": "BF16", "BOOL": "BOOL", "STRING": "STRING"},
    **{name: name for name in ("UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64")},
}


def write_triton(bundle: Path, repository: Path) -> Path:
    """Write the bundle's model into the model repository, under the bundle's name, and return its folder.

    The model is the bundle's engine if it has one, else the ONNX file for onnxruntime with the target's provider and
    threads. The folder appears whole or not at all. Raises BundleError if the bundle was changed, the folder exists, or
    Triton has no type for a tensor.
    """
    result, manifest = load_bundle(bundle), check_manifest(bundle)
    checked = check_onnx_file(bundle / MODEL)
    graph = onnx.load(bundle / MODEL, load_external_data=False).graph
    final = repository / manifest.name
    if final.exists():
        raise BundleError(f"{final}: exists already; remove it, or write to another --out")
    repository.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=repository, prefix=".triton.") as scratch:
        version = Path(scratch) / manifest.name / "1"
        version.mkdir(parents=True)
        if result.engine:
            shutil.copyfile(bundle / ENGINE, version / "model.plan")
        else:
            shutil.copyfile(bundle / MODEL, version / "model.onnx")
            for name in checked.data:
                shutil.copyfile(bundle / name, version / name)
        text = triton_config(manifest.name, graph, result.target, has_engine=result.engine is not None)
        (version.parent / "config.pbtxt").write_text(text, encoding="utf-8")
        version.parent.rename(final)
    return final


def triton_config(name: str, graph: onnx.GraphProto, target: Target, *, has_engine: bool) -> str:
    """The text of config.pbtxt. BundleError for a tensor that Triton has no type for."""
    weights = {weight.name for weight in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    outputs = list(graph.output)
    batched = all(_is_batched(value) for value in (*inputs, *outputs))
    max_batch = target.batches[2] if batched else 0
    lines = [
        f"name: {_text(name)}",
        f'backend: "{"tensorrt" if has_engine else "onnxruntime"}"',
        f"max_batch_size: {max_batch}",
        *_tensors("input", inputs, skip=batched),
        *_tensors("output", outputs, skip=batched),
        f"instance_group [ {{ count: 1 kind: {'KIND_GPU' if target.needs_gpu else 'KIND_CPU'} }} ]",
    ]
    if max_batch > 1:
        preferred = f" preferred_batch_size: [ {target.batch_size} ]" if target.batch_size > 1 else ""
        lines.append(f"dynamic_batching {{{preferred} }}")
    if not has_engine and not target.needs_gpu:
        lines.append(_parameter("intra_op_thread_count", target.num_threads))
    if not has_engine and target.provider == "tensorrt":
        lines.append('optimization { execution_accelerators { gpu_execution_accelerator : [ { name: "tensorrt" } ] } }')
    return "\n".join(lines) + "\n"


def _parameter(key: str, value: int) -> str:
    return f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}'


def _is_batched(value: onnx.ValueInfoProto) -> bool:
    dims = value.type.tensor_type.shape.dim
    return len(dims) > 0 and not dims[0].HasField("dim_value")


def _tensors(kind: str, values: Sequence[onnx.ValueInfoProto], *, skip: bool) -> list[str]:
    """skip: leave out the batch axis, because Triton adds it."""
    lines = []
    for value in values:
        tensor = value.type.tensor_type
        onnx_type = onnx.TensorProto.DataType.Name(tensor.elem_type)
        if onnx_type not in _TYPES:
            raise BundleError(f"{kind} {value.name!r}: Triton has no type for ONNX's {onnx_type}; export another one")
        dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim][1 if skip else 0 :]
        # A scalar for each sample is [ 1 ] to Triton, and reshaped to what the model gives.
        shape = ", ".join(map(str, dims)) or "1"
        reshape = "" if dims else " reshape { shape: [ ] }"
        data_type = f"TYPE_{_TYPES[onnx_type]}"
        lines.append(f"{kind} [ {{ name: {_text(value.name)} data_type: {data_type} dims: [ {shape} ]{reshape} }} ]")
    return lines


def _text(value: str) -> str:
    return json.dumps(value)
