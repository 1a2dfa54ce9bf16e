"""DoRA and embedding adapters compared with PEFT, alone and in mixed batches."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import assert_alone_and_mixed_equal_peft, make_model, make_pair, make_peft, tokens

import lora_ext
from lora_ext.adapter import save_adapter
from lora_ext.nn import MultiLoraEmbedding
from lora_ext.pool import unpack

DORA: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "red": {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
        "green": {"r": 12, "target_modules": "all-linear", "use_dora": True, "use_rslora": True},
        "blue": {"r": 8, "target_modules": ["q_proj", "o_proj"]},
    },
    "gpt2": {
        "red": {"r": 4, "target_modules": ["c_attn"], "use_dora": True},
        "green": {"r": 12, "target_modules": ["c_attn", "c_proj", "c_fc"], "use_dora": True},
        "blue": {"r": 8, "target_modules": ["c_attn", "c_fc"], "lora_bias": True},
    },
    "bert": {
        "red": {"r": 4, "target_modules": ["query", "value"], "use_dora": True},
        "green": {"r": 12, "target_modules": "all-linear", "use_dora": True},
        "blue": {"r": 8, "target_modules": ["query", "pooler.dense", "classifier"]},
    },
}
EMBEDDINGS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "red": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
        "green": {"r": 12, "target_modules": ["embed_tokens"]},
        "blue": {"r": 8, "target_modules": ["q_proj", "o_proj"], "use_dora": True},
    },
    "gpt2": {
        "red": {"r": 4, "target_modules": ["wte", "c_attn"]},
        "green": {"r": 12, "target_modules": ["wte"]},
        "blue": {"r": 8, "target_modules": ["c_attn"]},
    },
    "bert": {
        "red": {"r": 4, "target_modules": ["word_embeddings", "query"]},
        "green": {"r": 16, "target_modules": ["word_embeddings", "token_type_embeddings"]},
        "blue": {"r": 8, "target_modules": ["query"]},
    },
}
NAMES = ["red", "green", "__base__", "blue", "green", None, "red"]
# All tensors are float64 except the scale, which the pool stores in float32. Scales are exact in
# float32 or, like 16 / sqrt(12), have a relative error of 2**-25. Activations are about 1.
BOUND = 1e-6


@pytest.mark.parametrize("kind", [DORA, EMBEDDINGS], ids=["dora", "embeddings"])
@pytest.mark.parametrize("family", DORA)
def test_adapters_alone_and_mixed_equal_peft(family: str, kind: Any, tmp_path: Path) -> None:
    model, reference, pool = make_pair(family, tmp_path, kind[family], torch.float64)
    moved = assert_alone_and_mixed_equal_peft(model, reference, NAMES, BOUND)
    assert (moved if kind is DORA else moved.amax(1)).min() > 1e-3
    # PEFT saves Llama's input embedding too; its weight equals that of the base model.
    assert pool.update("red", tmp_path / "red") == ()


def make(directory: Path, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    return make_pair("llama", directory, EMBEDDINGS["llama"], dtype)[:2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_rows_keep_every_bit_and_adapted_rows_round_once(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model, _ = make(tmp_path, dtype)
    layer, ids = model.model.embed_tokens, tokens(len(NAMES), 6)
    assert isinstance(layer, MultiLoraEmbedding) and isinstance(layer.base, torch.nn.Embedding)
    pool, slab = layer.pool, layer.slab
    results = []
    for grad in (False, True):
        layer.weight.requires_grad_(grad)
        with torch.set_grad_enabled(grad), lora_ext.adapters(NAMES):
            results.append(layer(ids).detach())
    base = layer.base(ids).detach()
    for row, name in enumerate(NAMES):
        assert torch.equal(results[0][row], base[row]) == (name not in ("red", "green"))
        if name not in ("red", "green"):
            assert torch.equal(results[1][row], base[row])
            continue
        with pool.acquire([name]) as (slot,):
            pages = [q for q in slab.page_table[slot].tolist() if q >= 0]
            a, b = (
                t.double() for t in unpack(slab.a_pages, slab.b_pages, pages, int(slab.ranks[slot]))
            )
            exact = base[row].double() + float(slab.scale[slot]) * a[:, ids[row]].T @ b.T
        # v and the sum are in float32 with and without gradients. The result is then rounded once,
        # or twice with gradients.
        unit = torch.finfo(dtype).eps / 2
        size = exact.abs().max() + (exact - base[row]).abs().max()
        assert (results[0][row] - exact).abs().max() <= (unit + 20 * 2**-24) * size
        assert (results[1][row] - exact).abs().max() <= (2 * unit + 20 * 2**-24) * size


def test_embedding_accepts_names_per_token_and_one_name(tmp_path: Path) -> None:
    model, _ = make(tmp_path)
    layer, ids = model.model.embed_tokens, tokens(2, 3)
    with torch.no_grad():
        whole = {}
        for name in (*EMBEDDINGS["llama"], None):
            with lora_ext.adapters(name):
                whole[name] = layer(ids)
        names = [["red", None, "green"], ["blue", "red", None]]
        with lora_ext.adapters(names):
            mixed = layer(ids)
    for i, row in enumerate(names):
        for j, name in enumerate(row):
            assert torch.equal(mixed[i, j], whole[name][i, j])
    assert torch.equal(whole["blue"], whole[None]), "expected no change by adapter blue"
    assert not torch.equal(whole["red"], whole["green"])


@pytest.mark.parametrize("length", [4, 5])
def test_positions_shared_by_all_sequences_raise(length: int, tmp_path: Path) -> None:
    """Check also 4 positions and 4 sequences, so that four names fit the positions too."""
    base = make_model("gpt2")
    make_peft(base, {"red": {"r": 4, "target_modules": ["wpe"]}}).save_pretrained(tmp_path)
    pool = lora_ext.AdapterPool(base, max_slots=1, max_rank=8)
    pool.load("red", tmp_path / "red")
    model: Any = lora_ext.attach(base, pool)
    names, ids = ["red", None, None, "red"], tokens(4, length)
    torch._dynamo.reset()
    wpe = model.transformer.wpe
    compiled = torch.compile(wpe, backend="aot_eager", fullgraph=True)
    positions = torch.arange(4)[None]
    with torch.no_grad():
        with lora_ext.adapters(names):
            with pytest.raises(ValueError, match="adapters: names: "):
                model(ids)
            for embed in (wpe, compiled):
                with pytest.raises(ValueError, match=r"one row of 4 tokens .* \[\[\.\.\.\]\]"):
                    embed(positions)
        with lora_ext.adapters([names]):  # one name per token of one sequence
            one, whole = compiled(positions), wpe(positions)
        with lora_ext.adapters("red"):
            red, four = wpe(positions), model(ids).logits
            for i in range(4):
                torch.testing.assert_close(model(ids[i : i + 1]).logits[0], four[i])
    torch.testing.assert_close(one, whole)
    assert torch.equal(whole[0, [0, 3]], red[0, [0, 3]])
    assert torch.equal(whole[0, 1:3], wpe.base(positions)[0, 1:3])


def test_adapters_work_after_eviction_saving_copy_compile_and_detach(tmp_path: Path) -> None:
    model, reference = make(tmp_path)
    pool, ids = model.model.embed_tokens.pool, tokens(2, 3)
    with torch.no_grad(), lora_ext.adapters("red"):
        expected = model(ids).logits
    state = {k: v for k, v in reference.state_dict().items() if ".red" in k and "lora_" in k}
    save_adapter(tmp_path / "ours", reference.peft_config["red"], state)
    for number in range(4):  # There are four slots, so other adapters are evicted.
        pool.load(f"other {number}", tmp_path / "ours")
    assert "red" not in pool._residence.by_name
    torch._dynamo.reset()
    compiled = torch.compile(model.model.embed_tokens, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for name in ("red", "other 0", None):
            with lora_ext.adapters(name):
                torch.testing.assert_close(compiled(ids), model.model.embed_tokens(ids))
                for m in (model, copy.deepcopy(model)):
                    assert torch.equal(m(ids).logits, expected) == (name is not None)
    lora_ext.detach(model)
    assert type(model.model.embed_tokens) is torch.nn.Embedding


def test_every_spelling_of_the_magnitude_loads_and_peft_loads_ours(tmp_path: Path) -> None:
    _, reference, pool = make_pair("llama", tmp_path, DORA["llama"], torch.float64)
    state = {k: v for k, v in reference.state_dict().items() if "lora_" in k and ".red." in k}
    config = reference.peft_config["red"]
    keys = [k for k in state if "magnitude" in k]
    assert keys and all(k.endswith("lora_magnitude_vector.red.weight") for k in keys)
    for end in (".red.weight", ".red", ".weight", ""):
        renamed = {
            k.removesuffix(".red.weight") + end if "magnitude" in k else k: v
            for k, v in state.items()
        }
        pool.load("again", (config, renamed))
        slab = pool.modules["model.layers.0.self_attn.q_proj"]
        with pool.acquire(["red", "again"]) as (red, again):
            assert torch.equal(slab.after[red], slab.after[again])
        pool.unload("again")
    state = {k: v for k, v in reference.state_dict().items() if ".green." in k}
    save_adapter(tmp_path / "ours", reference.peft_config["green"], state)
    loaded: Any = peft.PeftModel.from_pretrained(
        make_model("llama").double(), tmp_path / "ours", adapter_name="green"
    )
    again = loaded.state_dict()
    assert any("magnitude" in key for key in state)
    assert all(torch.equal(again[key], value) for key, value in state.items())
