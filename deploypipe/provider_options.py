"""Which options of an ONNX Runtime provider only choose how it computes.

Options are handed to native code as they are. Some name a library that is loaded (`backend_path` of QNN,
`trt_extra_plugin_lib_paths`), others a file or folder that is read or written (an engine cache holds executable code).
A target may come from somebody else, so that what is not known to be harmless is off until a person allows it.
"""

import os
from typing import TYPE_CHECKING

from deploypipe.errors import ConfigError

if TYPE_CHECKING:
    from deploypipe.target import Target  # the command line reads this module's constants before it needs any target

ALLOWED_BY = "DEPLOYPIPE_ALLOW_PROVIDER_LIBRARIES"  # set to 1 by --allow-provider-libraries; children inherit it
OPTION = "--allow-provider-libraries"

_CUDA = (
    "device_id gpu_mem_limit arena_extend_strategy cudnn_conv_algo_search do_copy_in_default_stream "
    "cudnn_conv_use_max_workspace cudnn_conv1d_pad_to_nc1d enable_cuda_graph enable_skip_layer_norm_strict_mode "
    "use_tf32 prefer_nhwc use_ep_level_unified_stream sdpa_kernel fuse_conv_bias tunable_op_enable "
    "tunable_op_tuning_enable tunable_op_max_tuning_duration_ms"
)
_TENSORRT = (
    "device_id trt_max_partition_iterations trt_min_subgraph_size trt_max_workspace_size trt_fp16_enable "
    "trt_bf16_enable trt_int8_enable trt_dla_enable trt_dla_core trt_force_sequential_engine_build "
    "trt_context_memory_sharing_enable trt_layer_norm_fp32_fallback trt_build_heuristics_enable trt_sparsity_enable "
    "trt_builder_optimization_level trt_auxiliary_streams trt_tactic_sources trt_cuda_graph_enable "
    "trt_profile_min_shapes trt_profile_opt_shapes trt_profile_max_shapes"
)
_OPENVINO = (
    "device_type precision num_of_threads num_streams enable_opencl_throttling disable_dynamic_shapes "
    "enable_qdq_optimizer model_priority reshape_input"
)
_COREML = (
    "ModelFormat MLComputeUnits RequireStaticInputShapes EnableOnSubgraphs SpecializationStrategy "
    "AllowLowPrecisionAccumulationOnGPU ProfileComputePlan"
)
_QNN = (
    "backend_type profiling_level rpc_control_latency vtcm_mb htp_performance_mode qnn_context_priority "
    "htp_graph_finalization_optimization_mode soc_model htp_arch device_id enable_htp_fp16_precision "
    "offload_graph_io_quantization enable_htp_spill_fill_buffer enable_htp_shared_memory_allocator"
)
# By provider, by their names in ONNX Runtime's documentation (onnxruntime.ai/docs/execution-providers).
_HARMLESS: dict[str, frozenset[str]] = {
    "cuda": frozenset(_CUDA.split()),
    "tensorrt": frozenset(_TENSORRT.split()),
    "openvino": frozenset(_OPENVINO.split()),
    "coreml": frozenset(_COREML.split()),
    "qnn": frozenset(_QNN.split()),
}


def require_harmless_options(target: "Target") -> None:
    """ConfigError for the first provider option that may load a library or touch files, unless a person allowed it."""
    if os.environ.get(ALLOWED_BY) == "1":
        return
    harmless = _HARMLESS.get(target.provider, frozenset())
    for key in target.provider_options:
        if key not in harmless:
            raise ConfigError(
                f"target {target.name or target.runtime}",
                f"provider_options.{key}",
                f"may load a library, or read and write files (of {target.provider}'s options, known not to: "
                f"{', '.join(sorted(harmless)) or 'none'})",
                f"leave it out, or add {OPTION} if you know where this target comes from",
            )
