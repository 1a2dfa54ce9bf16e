"""Embeddings and convolutions with adapters, compared with PEFT's layers with equal parameters."""

import copy

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import layer as peft_layers_of
from peft_layers import CLOSE, assert_layers_agree, gradients
from torch import Tensor, nn

import lora_ext
from lora_ext.nn import LoraConv, LoraEmbedding

pytestmark = pytest.mark.hosts


class Scaled(nn.Embedding):
    """Embedding that scales its output, as in Gemma."""

    def __init__(self, *sizes: int):
        super().__init__(*sizes, padding_idx=1)
        self.register_buffer("embed_scale", torch.tensor(2.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale


def pair(base: nn.Module, *settings: dict):
    theirs_of = {
        nn.Embedding: peft_layers_of.Embedding,
        Scaled: peft_layers_of.Embedding,
        nn.Conv1d: peft_layers_of.Conv1d,
        nn.Conv2d: peft_layers_of.Conv2d,
        nn.Conv3d: peft_layers_of.Conv3d,
    }
    ours_of = LoraEmbedding if isinstance(base, nn.Embedding) else LoraConv
    torch.manual_seed(0)
    common = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
    theirs, ours = None, None
    for i, s in enumerate(settings):
        config = LoraConfig(**{**common, **s})
        size = {"r": config.r, "lora_alpha": config.lora_alpha, "config": config}
        if theirs is None or ours is None:
            theirs = theirs_of[type(base)](copy.deepcopy(base), "0", **size)
            ours = ours_of(copy.deepcopy(base), "0", **{**common, **s})
        else:
            theirs.update_layer(str(i), **size)
            ours.add_adapter(str(i), **{**common, **s})
    names = [str(i) for i in range(len(settings))]
    for layer in (theirs, ours):
        layer.set_adapter(names)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


KINDS = {
    "plain": [{}],
    "rslora": [{"use_rslora": True}],
    "several": [{}, {"r": 2}, {"r": 8, "lora_alpha": 1}],
    "dora": [{"use_dora": True}],
    "plain, dora": [{}, {"use_dora": True}],
}


def assert_embeddings_agree(ours, theirs, x: Tensor, **names) -> None:
    y, expected = ours(x, *names.values()), theirs(x, **names)
    torch.testing.assert_close(y, expected, **CLOSE)
    at = torch.zeros((), requires_grad=True)
    mine, peft = gradients(y + at, ours, at), gradients(expected + at, theirs, at)
    for name, grad in peft.items():
        assert (grad is None) == (mine[name] is None), name
    found = {n: g for n, g in peft.items() if g is not None}
    torch.testing.assert_close({n: mine[n] for n in found}, found, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", [nn.Embedding(11, 24), Scaled(11, 24)], ids=["plain", "scaled"])
def test_embeddings_equal_peft(kind, base):
    ours, theirs = pair(base, *KINDS[kind])
    x = torch.tensor([[0, 1, 10], [3, 3, 1]])
    assert_embeddings_agree(ours, theirs, x)


def test_each_sequence_of_tokens_uses_its_adapter():
    ours, theirs = pair(Scaled(11, 24), {}, {"r": 2})
    x = torch.tensor([[0, 1, 10], [3, 3, 1], [4, 5, 6]])
    names = ["1", "__base__", "0"]
    assert_embeddings_agree(ours, theirs, x, adapter_names=names)
    with lora_ext.adapters(["1", None, "0"]):
        assert torch.equal(ours(x), ours(x, names))
    ours.adapter_active["1"] = False
    assert torch.equal(ours(x, names)[:2], ours.base_layer(x)[:2])
    ours.adapter_active["0"] = False
    assert torch.equal(ours(x), ours.base_layer(x))


def test_one_row_of_positions_in_a_block_for_several_rows_raises():
    layer = LoraEmbedding(nn.Embedding(9, 5), "red", r=2, init_lora_weights=False)
    positions, names = torch.arange(3)[None], ["red", None, "red"]
    expected = layer(positions, names)  # Here, names are an argument of this layer.
    with lora_ext.adapters([names], pool=layer.pool):
        assert torch.equal(layer(positions), expected)
    with lora_ext.adapters(names, pool=layer.pool):
        with pytest.raises(ValueError, match="an embedding with one row of 3 tokens or positions"):
            layer(positions)


def test_initial_embeddings_equal_those_of_peft():
    torch.manual_seed(1)
    expected = nn.init.normal_(torch.empty(24, 8))
    base = nn.Embedding(11, 24)
    torch.manual_seed(1)
    ours = LoraEmbedding(base)
    assert torch.equal(ours.lora_embedding_B["default"], expected)
    assert not ours.lora_embedding_A["default"].any()
    with pytest.raises(ValueError, match="lora_bias: expected False for a LoraEmbedding"):
        ours.add_adapter("b", lora_bias=True)
    with pytest.raises(ValueError, match=r"expected nn\.Embedding, found Linear"):
        LoraEmbedding(nn.Linear(2, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_merging_embeddings_keeps_the_output(kind):
    ours, _ = pair(nn.Embedding(11, 24), *KINDS[kind])
    x = torch.arange(11)
    expected, weight = ours(x), ours.weight.detach().clone()
    ours.merge(keep_copy=True)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)
    ours.unmerge()
    assert torch.equal(ours.weight, weight)


CONVS = {
    "1d": (nn.Conv1d(3, 12, 4, 4), (2, 3, 12)),
    "2d": (nn.Conv2d(3, 12, (4, 2), (4, 2), bias=False), (2, 3, 8, 6)),
    "2d, rest": (nn.Conv2d(3, 12, 4, 4), (2, 3, 11, 6)),
    "3d": (nn.Conv3d(2, 12, 2, 2, padding="valid"), (2, 2, 4, 2, 6)),
    "pointwise": (nn.Conv2d(5, 12, 1), (2, 5, 3, 4)),
    "one image": (nn.Conv2d(3, 12, 2, 2), (3, 4, 6)),
}


@pytest.mark.parametrize("kind", [*KINDS, "bias"])
@pytest.mark.parametrize("shape", CONVS)
def test_patch_convolutions_equal_peft(kind, shape):
    base, size = CONVS[shape]
    has_bias = {"lora_bias": base.bias is not None}
    ours, theirs = pair(base, *KINDS.get(kind, [has_bias]))
    x = torch.randn(size, requires_grad=True)
    if shape == "one image":
        # PEFT's DoRA layer stores the bias with a batch dimension.
        y = ours(x[None])[0]
        torch.testing.assert_close(ours(x), y, **CLOSE)
        return
    assert ours(x).is_contiguous()
    assert_layers_agree(ours, theirs, x)


def test_each_image_uses_its_adapter():
    ours, theirs = pair(nn.Conv2d(3, 12, 4, 4), {}, {"r": 2})
    x = torch.randn(3, 3, 8, 4, requires_grad=True)
    assert_layers_agree(ours, theirs, x, adapter_names=["1", "__base__", "0"])
    ours.adapter_active["0"] = ours.adapter_active["1"] = False
    assert torch.equal(ours(x), ours.base_layer(x))


def test_convolution_with_a_hook_is_called():
    ours, theirs = pair(nn.Conv2d(3, 12, 4, 4), {}, {"use_dora": True})
    seen = []
    ours.base_layer.register_forward_hook(lambda *_: seen.append(1))
    assert_layers_agree(ours, theirs, torch.randn(2, 3, 8, 4, requires_grad=True))
    assert seen


@pytest.mark.parametrize("kind", KINDS)
def test_merging_patch_convolutions_keeps_the_output(kind):
    ours, _ = pair(nn.Conv2d(3, 12, 4, 4), *KINDS[kind])
    x = torch.randn(2, 3, 8, 4)
    expected, weight = ours(x), ours.weight.detach().clone()
    ours.merge(keep_copy=True, safe_merge=True)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)
    ours.unmerge()
    assert torch.equal(ours.weight, weight)


@pytest.mark.parametrize("scheme", ["pissa", "olora"])
def test_split_weights_of_convolutions_are_restored(scheme):
    base = nn.Conv2d(3, 12, 4, 4)
    x = torch.randn(2, 3, 8, 4)
    expected, weight = base(x), base.weight.detach().clone()
    ours = LoraConv(base, init_lora_weights=scheme)
    torch.testing.assert_close(ours(x), expected, **CLOSE)
    ours.delete_adapter("default")
    assert torch.equal(base.weight, weight)


@pytest.mark.parametrize(
    ("conv", "text"),
    [
        (nn.Conv2d(4, 4, 4, 2), r"stride=\(2, 2\)"),
        (nn.Conv2d(4, 4, 3, 3, padding=1), r"padding=\(1, 1\)"),
        (nn.Conv1d(4, 4, 2, 2, dilation=2), r"dilation=\(2,\)"),
        (nn.Conv2d(4, 4, 2, 2, groups=2), "groups=2"),
    ],
)
def test_unsupported_convolutions_raise(conv, text):
    with pytest.raises(NotImplementedError, match=text):
        LoraConv(conv)


def test_layer_that_is_not_a_convolution_raises():
    with pytest.raises(ValueError, match="found Linear"):
        LoraConv(nn.Linear(2, 2))
