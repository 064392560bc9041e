"""SlimAttention computes what PyTorch's attention does."""

from collections.abc import Callable

import networks
import pytest
import torch
from torch import Tensor, nn

from deploypipe.errors import PlanError
from deploypipe.networks.fingerprints import model_fingerprint
from deploypipe.pruning.surgery.slim_attention import SlimAttention, with_slim_attention

CAUSAL = torch.ones(7, 7, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "masks",
    [{}, {"attn_mask": CAUSAL}, {"key_padding_mask": PADDING}, {"attn_mask": CAUSAL, "key_padding_mask": PADDING}],
    ids=["plain", "causal", "padding", "both"],
)
def test_equals_pytorch_attention(batch_first: bool, bias: bool, need_weights: bool, masks: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(12, 3, bias=bias, batch_first=batch_first).eval()
    x = torch.randn(2, 7, 12) if batch_first else torch.randn(7, 2, 12)
    expected, seen = (each(x, x, x, need_weights=need_weights, **masks) for each in (dense, SlimAttention.of(dense)))
    torch.testing.assert_close(seen[0], expected[0])
    assert (seen[1] is None) == (expected[1] is None)
    if need_weights:
        torch.testing.assert_close(seen[1], expected[1])


def test_queries_of_another_width_and_a_mask_for_each_head() -> None:
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(12, 3, kdim=5, vdim=4, batch_first=True).eval()
    query, key, value = torch.randn(2, 6, 12), torch.randn(2, 9, 5), torch.randn(2, 9, 4)
    mask = torch.rand(6, 6, 9) > 0.8
    expected, _ = dense(query, key, value, attn_mask=mask)
    seen, _ = SlimAttention.of(dense)(query, key, value, attn_mask=mask)
    torch.testing.assert_close(seen, expected)


def test_a_whole_network_keeps_its_fingerprint_and_its_outputs() -> None:
    model, tokens = networks.build("encoder")
    slim = with_slim_attention(model)
    assert model_fingerprint(slim) == model_fingerprint(model)
    assert not any(isinstance(m, nn.MultiheadAttention) for m in slim.modules())
    torch.testing.assert_close(slim.eval()(tokens), model.eval()(tokens))


@pytest.mark.parametrize("make", [lambda: {"add_bias_kv": True}, lambda: {"add_zero_attn": True}])
def test_attention_with_extra_keys_is_left_unchanged(make: Callable[[], dict[str, bool]]) -> None:
    dense = nn.MultiheadAttention(8, 2, **make())
    with pytest.raises(PlanError, match="name it in keep"):
        SlimAttention.of(dense)
    assert isinstance(with_slim_attention(nn.Sequential(dense))[0], nn.MultiheadAttention)
