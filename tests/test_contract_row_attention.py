"""Laws of row attention. The result of a row depends, bitwise, only on its query and the keys and
values that it attends to."""

from collections.abc import Iterator

import pytest
import torch
from backends import Backend
from contract import assert_same_bits, with_threads
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lora_ext import ops

HEADS, GROUPS, WIDTH = 6, 2, 20


def draw(rows: int, keys: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(rows + keys)
    sizes = ((rows, HEADS), (keys, GROUPS), (keys, GROUPS))
    return tuple(
        torch.randn(2, n, heads, WIDTH, generator=g).to(device, dtype).transpose(1, 2)
        for n, heads in sizes
    )


def alone(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Iterator[Tensor]:
    """Yield the result ``(H, E)`` of each row, computed by a separate call with copies of its
    keys."""
    for b in range(q.shape[0]):
        for t in range(q.shape[2]):
            keys = seen[b % seen.shape[0], t].nonzero()[:, 0].to(q.device)
            own = (x[b : b + 1, :, keys] for x in (k, v))
            yield ops.row_attention(q[b : b + 1, :, t : t + 1], *own)[0, :, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_of_a_batch_equals_the_row_alone_bitwise(backend: Backend, dtype: torch.dtype) -> None:
    rows, keys = (9, 21) if backend.small else (23, 150)
    q, k, v = draw(rows, keys, dtype, backend.device)
    at, t = torch.arange(keys), torch.arange(rows)[:, None]
    g = torch.Generator().manual_seed(3)
    causal = (at <= t + keys - rows)[None]
    holes = causal & (torch.rand(2, rows, keys, generator=g) < 0.7)
    padded = causal & (at >= torch.tensor([0, 8])[:, None, None])
    padded[1, 0] = False
    spans = torch.stack([t - 3, t + 9], -1).transpose(0, 1)
    window = (at >= spans[..., :1]) & (at < spans[..., 1:])
    calls = [
        (causal, {"causal": True}),
        (holes, {"mask": holes}),
        (padded, {"mask": padded}),
        (padded, {"mask": padded, "causal": True}),
        (window, {"spans": spans}),
        (window & holes, {"spans": spans, "mask": holes}),
    ]
    for seen, how in calls:
        how = {n: x.to(q.device) if isinstance(x, Tensor) else x for n, x in how.items()}
        together = ops.row_attention(q, k, v, **how)
        rows_alone = torch.stack([*alone(q, k, v, seen)])
        assert_same_bits(together.transpose(1, 2).flatten(0, 1), rows_alone, str(sorted(how)))


def test_unseen_keys_change_no_bit_whatever_they_contain(backend: Backend) -> None:
    q, k, v = draw(5, 12, torch.float32, backend.device)
    seen = torch.arange(12, device=q.device) % 3 != 1
    expected = ops.row_attention(q, k[:, :, seen], v[:, :, seen])
    for garbage in (torch.nan, torch.inf, 1e30):
        for t in (k, v):
            t[:, :, ~seen] = garbage
        mask = seen.expand(1, 5, 12)
        assert_same_bits(ops.row_attention(q, k, v, mask=mask), expected)
    q[1, 2, 3] = torch.nan  # NaN in one row does not affect other rows.
    found = ops.row_attention(q, k, v, mask=mask)
    assert found[1, 2, 3].isnan().all()
    found[1, 2, 3] = expected[1, 2, 3]
    assert_same_bits(found, expected)


def test_threads_and_strides_change_no_bit_and_double_backward_raises() -> None:
    q, k, v = draw(60, 70, torch.float32)
    expected = ops.row_attention(q, k, v, causal=True)
    for _ in with_threads(1, 2, 3):
        assert_same_bits(ops.row_attention(q, k, v, causal=True), expected)
    dense = [t.contiguous() for t in (q, k, v)]
    assert_same_bits(ops.row_attention(*dense, causal=True), expected)
    turned = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
    assert_same_bits(ops.row_attention(*turned, causal=True), expected)
    assert expected.transpose(1, 2).is_contiguous()
    q, k, v = (t.requires_grad_() for t in draw(2, 2, torch.float32))
    with pytest.raises(ValueError, match="not itself differentiable"):
        torch.autograd.grad(ops.row_attention(q, k, v).sum(), q, create_graph=True)


@pytest.mark.parametrize("sees", ["causal", "cached", "padded"])
def test_gradient_equals_that_of_torch_attention(sees: str) -> None:
    rows, keys = 7, 11 if sees == "cached" else 7
    q, k, v = draw(rows, keys, torch.float32)
    seen = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows).expand(2, 1, rows, keys)
    if sees == "padded":
        seen = seen & (torch.arange(keys) >= torch.tensor([0, 3])[:, None, None, None])
    grads = []
    for ours in (True, False):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        if ours:
            how = {"mask": seen[:, 0]} if sees == "padded" else {"causal": True}
            y = ops.row_attention(*leaves, **how)
        else:
            wide = [t.double() for t in leaves]
            y = scaled_dot_product_attention(*wide, attn_mask=seen, enable_gqa=True)
        weights = torch.linspace(-1, 1, y.numel()).view(y.shape) * seen.any(-1)[..., None]
        grads.append(torch.autograd.grad((y * weights).nansum(), leaves))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
