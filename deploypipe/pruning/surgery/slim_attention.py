"""Multi-head attention with fewer heads than `nn.MultiheadAttention` allows: what is left when heads are removed."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.errors import PlanError
from deploypipe.pruning.modules.hook_computed_weights import plain_copy


def with_slim_attention(model: nn.Module) -> nn.Module:
    """A copy that computes the same, with attention whose output projection can be observed and repaired.

    `nn.MultiheadAttention` reads the weights of its output projection without calling it. All parameters keep their
    names and values, so the fingerprint stays the same. Only weights that hooks compute become plain. Attention with
    bias_k or add_zero_attn is left unchanged.
    """
    copy = plain_copy(model)
    for module in list(copy.modules()):
        for name, child in module.named_children():
            if type(child) is nn.MultiheadAttention and child.bias_k is None and not child.add_zero_attn:
                setattr(module, name, SlimAttention.of(child))
    return copy


class SlimAttention(nn.Module):
    """Compute what `nn.MultiheadAttention` does, from the same parameters under the same names.

    PyTorch's own module requires heads * head dimension = input width, so it cannot lose heads.
    """

    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    out_proj: nn.Linear
    _qkv_same_embed_dim = False  # stops nn.TransformerEncoderLayer from using the fused kernel, which has that rule

    def __init__(self, num_heads: int, scale: float, dropout: float, batch_first: bool) -> None:
        super().__init__()
        self.num_heads, self.scale, self.dropout, self.batch_first = num_heads, scale, dropout, batch_first

    @classmethod
    def of(cls, dense: nn.MultiheadAttention) -> "SlimAttention":
        """The same attention, sharing the parameters of `dense`."""
        if dense.bias_k is not None or dense.add_zero_attn:
            raise PlanError("attention with bias_k or add_zero_attn cannot lose heads; name it in keep")
        slim = cls(dense.num_heads, dense.head_dim**-0.5, dense.dropout, dense.batch_first)
        for name, parameter in dense._parameters.items():
            slim.register_parameter(name, parameter)
        slim.out_proj = dense.out_proj
        return slim.train(dense.training)

    def _projections(self) -> list[tuple[Tensor, Tensor | None]]:
        biases: Any = self.in_proj_bias.chunk(3) if self.in_proj_bias is not None else [None] * 3
        if self.in_proj_weight is not None:
            weights: Any = self.in_proj_weight.chunk(3)
        else:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        return list(zip(weights, biases, strict=True))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`, for batched inputs."""
        inputs = (query, key, value) if self.batch_first else tuple(x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (
            F.linear(x, weight, bias).reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
            for x, (weight, bias) in zip(inputs, self._projections(), strict=True)
        )
        mask = self._mask(attn_mask, key_padding_mask, q)
        share = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.scale
            weights = (scores if mask is None else scores + mask).softmax(-1)
            heads = F.dropout(weights, share, self.training) @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, share, scale=self.scale)
        output: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
        """Both masks as one mask to add to the scores: (n or 1, heads or 1, queries or 1, keys)."""
        masks = []
        for mask in (attn_mask, padding):
            if mask is not None and not mask.is_floating_point():
                mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
            masks.append(mask)
        attn_mask, padding = masks
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.reshape(like.shape[0], -1, *attn_mask.shape[1:])
        if padding is None:
            return attn_mask
        padding = padding[:, None, None, :]
        return padding if attn_mask is None else attn_mask + padding
