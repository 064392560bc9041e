"""The table of rules: for each tensor operation, which axes of its operands are the same and what its result's are.

A rule gets the trace, the operation's arguments by name and its result. It returns the axes of the result, or of each
result where there are several. Operations that PyTorch marks as pointwise need no row. A new rule is a function in one
of the three modules imported here and one row in `RULES`.
"""

from collections.abc import Callable, Mapping

from deploypipe.pruning.tracing import elementwise_rules, layer_rules, shape_rules
from deploypipe.pruning.tracing.trace_record import Rule


def _each(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


def _named(names: str, make: Callable[[str], Rule]) -> dict[str, Rule]:
    return {name: make(name) for name in names.split()}


RULES: Mapping[str, Rule] = {
    **_each(
        "dropout feature_dropout alpha_dropout contiguous clone detach alias to _to_copy type_as lift_fresh",
        elementwise_rules.same,
    ),
    **_each(
        "zeros_like ones_like empty_like full_like rand_like randn_like bernoulli fill zero hardswish rrelu",
        elementwise_rules.same,
    ),
    **_each("copy where masked_fill", elementwise_rules.pointwise),
    **_named(
        "mean sum amax amin max min var std var_mean std_mean prod any all logsumexp",
        elementwise_rules.reduce,
    ),
    **_named("argmax argmin norm linalg_vector_norm median nanmean", elementwise_rules.reduce),
    **_named("softmax _softmax log_softmax _log_softmax cumsum cumprod sort argsort", elementwise_rules.along),
    **_each("view reshape _unsafe_view _reshape_alias unflatten", shape_rules.view),
    **_each("flatten view_as reshape_as squeeze unsqueeze", shape_rules.reshape),
    **_each("permute transpose swapaxes swapdims t numpy_T", shape_rules.permute),
    **_each("movedim moveaxis", shape_rules.movedim),
    **_each("expand expand_as broadcast_to", shape_rules.expand),
    "repeat": shape_rules.repeat,
    "repeat_interleave": shape_rules.repeat_interleave,
    **_each("cat concat concatenate", shape_rules.cat),
    "stack": shape_rules.stack,
    "_pack_padded_sequence": shape_rules.pack,
    "_pad_packed_sequence": shape_rules.unpack,
    **_each(
        "split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk tensor_split",
        shape_rules.split,
    ),
    "slice": shape_rules.slice_axis,
    **_each("select unbind", shape_rules.select),
    "index": shape_rules.index,
    **dict.fromkeys(("index_add", "index_copy"), shape_rules.index_add),
    "index_select": shape_rules.index_select,
    "gather": shape_rules.gather,
    "embedding": layer_rules.embedding,
    "flip": shape_rules.flip,
    "roll": shape_rules.roll,
    **_each(
        "pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d", shape_rules.pad
    ),
    **{
        f"{kind}_pool{d}d": layer_rules.spatial
        for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp")
        for d in (1, 2, 3)
    },
    **{f"max_pool{d}d_with_indices": layer_rules.spatial for d in (1, 2, 3)},
    **_each("upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d", layer_rules.spatial),
    **_each("upsample_linear1d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa", layer_rules.spatial),
    **_each(
        "grid_sampler grid_sampler_2d grid_sampler_3d _adaptive_avg_pool2d _adaptive_avg_pool3d", layer_rules.spatial
    ),
    **_each("max_unpool2d max_unpool3d", layer_rules.unpool),
    "im2col": layer_rules.im2col,
    "pixel_shuffle": layer_rules.pixel_shuffle,
    "pixel_unshuffle": layer_rules.pixel_unshuffle,
    "channel_shuffle": layer_rules.channel_shuffle,
    "glu": layer_rules.glu,
    "linear": layer_rules.linear,
    **_each("conv1d conv2d conv3d convolution _convolution", layer_rules.convolution),
    **_each("conv_transpose1d conv_transpose2d conv_transpose3d", layer_rules.transposed),
    **_each("matmul mm bmm mv dot", layer_rules.matmul),
    **_each("addmm baddbmm", layer_rules.addmm),
    "einsum": layer_rules.einsum,
    "scaled_dot_product_attention": layer_rules.attention,
    **_each("batch_norm instance_norm", layer_rules.batch_norm),
    **_each("layer_norm rms_norm", layer_rules.layer_norm),
    "group_norm": layer_rules.group_norm,
    "prelu": layer_rules.prelu,
    **_each("_weight_norm _weight_norm_interface", layer_rules.weight_norm),
}
