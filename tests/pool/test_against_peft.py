"""Adapters saved by PEFT and loaded into a pool, and adapters saved here and loaded by PEFT."""

import peft
import pytest
import torch
from pool_support import assert_slot_holds, config, state
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lora_ext.adapter import save_adapter
from lora_ext.pool import AdapterPool, unpack

pytestmark = pytest.mark.filterwarnings("ignore")


def llama():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def gpt2():
    ids = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, **ids))


CASES = {
    "plain": (llama, {"target_modules": ["q_proj", "v_proj"]}),
    "all-linear": (llama, {"target_modules": "all-linear"}),
    "regex": (llama, {"target_modules": r"model\.layers\.[02]\..*\.(q|up)_proj"}),
    "head": (llama, {"target_modules": ["lm_head", "o_proj"]}),
    "exclude": (
        llama,
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    ),
    "exclude-regex": (
        llama,
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.1\..*q_proj"},
    ),
    "layers": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}),
    "one-layer": (llama, {"target_modules": ["q_proj"], "layers_to_transform": 0}),
    "layers-pattern": (
        llama,
        {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "rank-pattern": (
        llama,
        {
            "target_modules": "all-linear",
            "rank_pattern": {
                "q_proj": 12,
                r"layers\.1\.mlp\.(up|gate)_proj": 1,
                "^model.layers.2.self_attn.v_proj": 9,
            },
            "alpha_pattern": {"v_proj": 5, "layers.0.self_attn.k_proj": 32},
        },
    ),
    "pattern-order": (
        llama,
        {
            "target_modules": ["q_proj", "k_proj"],
            "rank_pattern": {r"0.self_attn.\w_proj": 3, "q_proj": 16},
        },
    ),
    "rslora": (
        llama,
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"v_proj": 7}},
    ),
    "bias": (gpt2, {"target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d-wrong-flag": (gpt2, {"target_modules": ["c_fc"], "fan_in_fan_out": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_pages_equal_the_tensors_that_peft_saved(case, tmp_path):
    torch.manual_seed(0)
    make, fields = CASES[case]
    base = make()
    pool = AdapterPool(base, max_slots=2, max_rank=16)
    lora = peft.LoraConfig(r=6, lora_alpha=10, init_lora_weights=False, **fields)
    model = peft.get_peft_model(base, lora)
    if fields.get("lora_bias"):
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.default.bias"):
                torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    assert pool.load("a", tmp_path) == ()
    # The state dict of the model, whose keys contain the adapter name, must give the same adapter.
    live = {k: v for k, v in model.state_dict().items() if "lora_" in k}
    pool.load("b", (lora, live))
    layers = {
        name: module
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert layers
    with pool.acquire(["a", "b"]) as slots:
        for slot in slots:
            for name, slab in pool.modules.items():
                if name not in layers:
                    assert slab.a_pages is None, "found pages of a module without an adapter"
                    continue
                layer, rank = layers[name], int(slab.ranks[slot])
                pages = [q for q in slab.page_table[slot].tolist() if q >= 0]
                a, b = unpack(slab.a_pages, slab.b_pages, pages, rank)
                assert torch.equal(a, layer.lora_A["default"].weight)
                assert torch.equal(b, layer.lora_B["default"].weight)
                assert float(slab.scale[slot]) == pytest.approx(layer.scaling["default"], rel=1e-6)
                if fields.get("lora_bias"):
                    assert torch.equal(slab.bias[slot], layer.lora_B["default"].bias)
        assert {name for name, slab in pool.modules.items() if slab.a_pages is not None} == set(
            layers
        )


def test_update_computed_from_the_pages_equals_the_delta_weight_of_peft():
    torch.manual_seed(1)
    base = llama()
    pool = AdapterPool(base, max_slots=1, max_rank=16)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=6, target_modules=["up_proj"], init_lora_weights=False)
    )
    pool.load("x", (model.peft_config["default"], model.state_dict()))
    name = "model.layers.1.mlp.up_proj"
    layer, slab = model.base_model.model.get_submodule(name), pool.modules[name]
    a, b = unpack(slab.a_pages, slab.b_pages, slab.page_table[0, :1].tolist(), 6)
    assert torch.allclose(slab.scale[0] * (b @ a), layer.get_delta_weight("default"), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_peft_loads_folders_written_by_save_adapter(dtype, tmp_path):
    base = llama()
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    g = torch.Generator().manual_seed(2)
    tensors = {}
    for name in names:
        tensors[f"{name}.lora_A.weight"] = torch.randn(5, 32, generator=g).to(dtype)
        tensors[f"{name}.lora_B.mine.weight"] = torch.randn(32, 5, generator=g).to(dtype)
    save_adapter(tmp_path, config(5, ["q_proj"]), tensors)
    pool = AdapterPool(llama(), max_slots=1, max_rank=8, dtype=dtype)
    pool.load("x", tmp_path)
    loaded = peft.PeftModel.from_pretrained(base.to(dtype), tmp_path, autocast_adapter_dtype=False)
    for name in names:
        layer = loaded.base_model.model.get_submodule(name)
        assert torch.equal(layer.lora_A["default"].weight, tensors[f"{name}.lora_A.weight"])
        assert torch.equal(layer.lora_B["default"].weight, tensors[f"{name}.lora_B.mine.weight"])
        assert int(pool.modules[name].ranks[0]) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_bin_file_of_tensors_is_loaded(tmp_path):
    from pool_support import Base

    save_adapter(tmp_path, config(), state(3))
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(state(3), tmp_path / "adapter_model.bin")
    pool = AdapterPool(Base(), max_slots=1, max_rank=8)
    pool.load("x", tmp_path)
    assert_slot_holds(pool, 0, state(3), 2.0)
