"""Packed weights from the blocks of a GGUF file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_ext.nn import pack_linears, packed_bytes, packing

gguf: Any = pytest.importorskip("gguf")
quants: Any = pytest.importorskip("gguf.quants")

HEADS, KV_HEADS, WIDE, DEEP = 4, 2, 64, 96


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDE, WIDE, bias=False)
        self.k_proj = nn.Linear(WIDE, WIDE // 2, bias=False)
        self.v_proj = nn.Linear(WIDE, WIDE // 2, bias=False)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDE, DEEP, bias=False)
        self.down_proj = nn.Linear(DEEP, WIDE, bias=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), Mlp()


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(50, WIDE)
        self.layers = nn.ModuleList([Block()])


class Llama(nn.Module):
    """Linear layers with the names of transformers' Llama, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Inner()
        self.lm_head = nn.Linear(WIDE, 50, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight


# Names of the file's tensors, with a type for each, by the names of the layers.
TENSORS = {
    "model.layers.0.self_attn.q_proj": ("blk.0.attn_q", "Q4_1"),
    "model.layers.0.self_attn.k_proj": ("blk.0.attn_k", "Q8_0"),
    "model.layers.0.self_attn.v_proj": ("blk.0.attn_v", "Q4_0"),
    "model.layers.0.mlp.gate_proj": ("blk.0.ffn_gate", "Q4_1"),
    "model.layers.0.mlp.down_proj": ("blk.0.ffn_down", "F32"),
    "lm_head": ("token_embd", "Q8_0"),
}


def turned(weight: Tensor, heads: int) -> Tensor:
    """Return rows in the order of llama.cpp, as its ``convert_hf_to_gguf.py`` does."""
    half = weight.shape[0] // heads // 2
    return weight.view(heads, 2, half, -1).transpose(1, 2).reshape(weight.shape)


def write(path: Path, model: nn.Module, kind: str = "llama") -> dict[str, Tensor]:
    """Write a GGUF file, and return the dequantised weight of each layer that is not float32."""
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    found = {}
    for name, (stem, form) in TENSORS.items():
        weight = model.get_submodule(name).weight.detach()  # pyright: ignore
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(stem.rpartition(".")[2])
        rows = weight if heads is None or kind != "llama" else turned(weight, heads)
        dtype = gguf.GGMLQuantizationType[form]
        data = quants.quantize(rows.numpy(), dtype)
        writer.add_tensor(f"{stem}.weight", data, raw_dtype=None if form == "F32" else dtype)
        if form != "F32":  # The order of rows does not change their codes.
            again = quants.quantize(weight.numpy(), dtype)
            found[name] = torch.from_numpy(quants.dequantize(again, dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("keep", [True, False])
def test_layers_have_the_weights_of_the_file(tmp_path: Path, kind: str, keep: bool) -> None:
    torch.manual_seed(0)
    model = Llama().eval().requires_grad_(False)
    weights = write(tmp_path / "model.gguf", model, kind)
    pack_linears(model, gguf=tmp_path / "model.gguf", keep=keep)
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        x = torch.randn(5, weight.shape[1])
        torch.testing.assert_close(layer(x), x @ weight.t(), atol=1e-5, rtol=1e-5)
        if not keep:
            assert torch.equal(torch.Tensor(layer.weight).clone(), weight)
    assert type(model.get_submodule("model.layers.0.mlp.down_proj")) is nn.Linear
    eight, four = 32 * 64 + 64 * 64, 32 * 64
    assert packed_bytes(model) == eight * 34 // 32 + four * 18 // 32 + (64 + 96) * 64 * 20 // 32
    assert "packed to 4 bits with a scale and a minimum" in str(packing(model))


def test_files_that_do_not_fit_raise(tmp_path: Path) -> None:
    model, path = Llama().eval(), tmp_path / "model.gguf"
    write(path, model)
    down = "model.layers.0.mlp.down_proj"
    with pytest.raises(ValueError, match="model: expected plain linear layers, found none"):
        pack_linears(model, [down], gguf=path)
    with pytest.raises(ValueError, match="bits: expected None if gguf is set, found 8"):
        pack_linears(model, bits=8, gguf=path)
    model.lm_head = nn.Linear(WIDE, 49, bias=False).eval()
    with pytest.raises(ValueError, match=r"gguf: 'lm_head': expected shape \[49, 64\], found"):
        pack_linears(model, gguf=path)
    with pytest.raises(FileNotFoundError, match="other"):
        pack_linears(model, gguf=tmp_path / "other.gguf")
    write(path, Llama(), "bloom")
    with pytest.raises(ValueError, match=r"gguf: expected one of .*'bloom'"):
        pack_linears(model, gguf=path)
