"""`LoraAdapter` is equal from a folder, state dict or model, and after saving and loading."""

import copy
import dataclasses
import json

import peft
import pytest
import torch
import transformers
from made_adapters import llama
from safetensors.torch import load_file
from torch import nn

import lora_ext
from lora_ext.adapter import Factors, LoraAdapter
from lora_ext.nn import LoraEmbedding, LoraLinear
from lora_ext.pool import AdapterPool

pytestmark = pytest.mark.filterwarnings("ignore")


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ids))


CASES = {
    "plain": (llama, {"target_modules": ["q_proj", "v_proj"]}),
    "all-linear": (llama, {"target_modules": "all-linear", "lora_dropout": 0.1}),
    "regex": (llama, {"target_modules": r".*\.(q|up)_proj", "use_rslora": True}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"q_proj": 3},
            "alpha_pattern": {r"layers\.1\..*": 5},
        },
    ),
    "dora": (llama, {"target_modules": ["o_proj"], "use_dora": True}),
    "embedding-and-head": (llama, {"target_modules": ["embed_tokens", "lm_head"]}),
    "bias": (gpt2, {"target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True}),
}


def peft_model(case, adapter="default"):
    make, fields = CASES[case]
    config = peft.LoraConfig(r=6, lora_alpha=10, init_lora_weights=False, **fields)
    model = peft.get_peft_model(make(), config, adapter_name=adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model


def assert_peft_finds_every_key(model, folder):
    """Check that PEFT loads the folder without missing or unexpected keys; return its model."""
    adapter = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    found = adapter.load_adapter(folder, "again")
    assert found.unexpected_keys == []
    assert [key for key in found.missing_keys if "lora_" in key] == []
    return adapter


@pytest.mark.parametrize("case", CASES)
def test_folder_state_dict_and_model_give_the_same_adapter(case, tmp_path):
    model = peft_model(case, "red")
    model.save_pretrained(tmp_path)
    loaded = LoraAdapter.load(tmp_path / "red")
    assert loaded == LoraAdapter.from_model(model, "red")
    assert loaded == LoraAdapter.from_model(lora_ext.from_peft(model), "red")
    state = load_file(tmp_path / "red" / "adapter_model.safetensors")
    assert loaded == LoraAdapter.load((model.peft_config["red"], state))
    layers = {
        name: module
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert loaded.modules.keys() == layers.keys(), "expected names of modules in the base model"
    for name, factors in loaded.modules.items():
        layer = layers[name]
        a, b, scaling, bias, after, embedding, before = factors
        assert before is None and factors.sums == (after is None)
        assert embedding == isinstance(layer.base_layer, nn.Embedding)
        delta = layer.get_delta_weight("red")
        delta = delta.T if embedding or type(layer.base_layer).__name__ == "Conv1D" else delta
        assert torch.allclose(scaling * (b @ a), delta, atol=1e-5)  # (O, I); sums of 6 products
        assert scaling == layer.scaling["red"]
        assert (bias is None) != ("lora_bias" in CASES[case][1])
        assert (after is None) != ("use_dora" in CASES[case][1])


@pytest.mark.parametrize("case", CASES)
def test_saved_adapters_load_here_and_in_peft(case, tmp_path):
    model = peft_model(case)
    adapter = LoraAdapter.from_model(model)
    adapter.save(tmp_path / "saved")
    assert LoraAdapter.load(tmp_path / "saved") == adapter
    theirs = assert_peft_finds_every_key(CASES[case][0](), tmp_path / "saved")
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(theirs.eval()(ids).logits, model.eval()(ids).logits)
    model.save_pretrained(tmp_path / "peft")
    written = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert written.keys() == load_file(tmp_path / "peft" / "adapter_model.safetensors").keys()


def test_adapter_is_independent_of_its_model_and_immutable():
    model = peft_model("plain")
    adapter = LoraAdapter.from_model(model)
    before = copy.deepcopy(adapter)
    assert before == adapter
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert before == adapter and adapter != LoraAdapter.from_model(model)
    with pytest.raises(TypeError):
        adapter.modules["new"] = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        adapter.config = None


def test_equality_compares_only_fields_that_change_the_output():
    adapter = LoraAdapter.from_model(peft_model("dora"))
    name, factors = next(iter(adapter.modules.items()))

    def changed(**fields):
        return LoraAdapter(adapter.config, {**adapter.modules, name: factors._replace(**fields)})

    assert adapter == changed()
    wider = {key: value.double() for key, value in factors._asdict().items() if key in ("a", "b")}
    assert adapter == changed(**wider), "expected equality of different dtypes"
    assert adapter == LoraAdapter(
        dataclasses.replace(adapter.config, task_type="X"), adapter.modules
    )
    a = factors.a.clone()
    a[0, 0] += 1
    different = {
        "a": a,
        "b": factors.b[:, :-1],
        "scaling": factors.scaling * 2,
        "bias": torch.zeros(32),
        "after": None,
    }
    for field, value in different.items():
        assert adapter != changed(**{field: value}), field
    assert adapter != LoraAdapter(adapter.config, {"elsewhere": factors})
    assert adapter != "adapter"


# -------------------------------------------------------------------------------------------------
# Layers of this package


def wrapped(**settings):
    """Return a model with three adapted layers of different ranks or scales, and its base model."""
    torch.manual_seed(0)
    model = nn.Module()
    model.embed = nn.Embedding(7, 12)
    model.blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
    model.up = nn.Linear(12, 20)
    base = copy.deepcopy(model)
    for i in (0, 1):
        model.blocks[i] = LoraLinear(
            model.blocks[i], r=2 + i, lora_alpha=8, init_lora_weights="gaussian", **settings
        )
    model.up = LoraLinear(model.up, r=2, lora_alpha=3, init_lora_weights="gaussian", **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model, base


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.25}],
)
def test_layers_of_this_package_are_saved_for_peft(settings, tmp_path):
    model, base = wrapped(**settings)
    adapter = LoraAdapter.from_model(model)
    assert adapter.modules.keys() == {"blocks.0", "blocks.1", "up"}
    assert {n: f.scaling for n, f in adapter.modules.items()} == {
        "blocks.0": model.blocks[0].scaling["default"],
        "blocks.1": model.blocks[1].scaling["default"],
        "up": model.up.scaling["default"],
    }
    adapter.save(tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["lora_dropout"] == settings.get("lora_dropout", 0.0)
    assert set(raw["target_modules"]) == {"blocks.0", "blocks.1", "up"}
    theirs = assert_peft_finds_every_key(base, tmp_path)
    x = torch.randn(5, 12)
    for name in ("blocks.0", "blocks.1", "blocks.2", "up"):
        ours, peers = model.eval().get_submodule(name), theirs.base_model.model.get_submodule(name)
        assert torch.allclose(ours(x), peers.eval()(x), atol=1e-5)
    pool = AdapterPool(base, max_slots=1, max_rank=8)
    pool.load("a", tmp_path)
    assert LoraAdapter.load(tmp_path) == adapter


def test_embedding_layers_and_names_that_are_suffixes_are_saved(tmp_path):
    torch.manual_seed(0)
    base = nn.ModuleDict(
        {
            "embed": nn.Embedding(7, 12),
            "up": nn.Linear(12, 12),
            "block": nn.ModuleDict({"up": nn.Linear(12, 12)}),
            "a": nn.ModuleDict({"b": nn.Linear(12, 12)}),
            "c": nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(12, 12)})}),
        }
    )
    model = copy.deepcopy(base)
    model["embed"] = LoraEmbedding(model["embed"], r=2)
    model["up"] = LoraLinear(model["up"], r=2)  # block.up, which also ends in "up", has no adapter
    model["a"]["b"] = LoraLinear(model["a"]["b"], r=4)
    # The name ends in "a.b", but its rank differs from that of a.b.
    model["c"]["a"]["b"] = LoraLinear(model["c"]["a"]["b"], r=3)
    adapter = LoraAdapter.from_model(model)
    assert adapter.modules["embed"].a.shape == (2, 7) and adapter.modules["embed"].embedding
    assert adapter.modules.keys() == {"embed", "up", "a.b", "c.a.b"}
    adapter.save(tmp_path)
    assert_peft_finds_every_key(base, tmp_path)
    assert LoraAdapter.load(tmp_path) == adapter
    AdapterPool(base, max_slots=1, max_rank=8).load("a", tmp_path)


def test_scale_set_by_hand_is_saved(tmp_path):
    model, _ = wrapped()
    model.up.scaling["default"] = 0.7
    adapter = LoraAdapter.from_model(model)
    adapter.save(tmp_path)
    assert LoraAdapter.load(tmp_path) == adapter
    assert adapter.modules["up"].scaling == 0.7


# -------------------------------------------------------------------------------------------------
# Errors


def test_models_without_a_single_adapter_are_refused():
    with pytest.raises(ValueError, match=r"LoraAdapter.from_model: model: expected .* found none"):
        LoraAdapter.from_model(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"adapter: expected one of \['red'\], found 'blue'"):
        LoraAdapter.from_model(peft_model("plain", "red"), "blue")
    with pytest.raises(ValueError, match=r"adapter: expected one of \['default'\], found 'blue'"):
        LoraAdapter.from_model(wrapped()[0], "blue")
    model, _ = wrapped()
    model.blocks[2] = LoraLinear(model.blocks[2], r=2, use_dora=True)
    with pytest.raises(ValueError, match=r"use_dora: expected .* all layers.* blocks\.0"):
        LoraAdapter.from_model(model)


def test_save_refuses_a_configuration_that_contradicts_the_factors(tmp_path):
    adapter = LoraAdapter.from_model(peft_model("plain"))
    name, factors = next(iter(adapter.modules.items()))
    doubled = {**adapter.modules, name: factors._replace(scaling=2 * factors.scaling)}
    with pytest.raises(ValueError, match=rf"{name}: scaling: expected .*, found"):
        LoraAdapter(adapter.config, doubled).save(tmp_path)
    stray = {**adapter.modules, "elsewhere": factors}
    with pytest.raises(
        ValueError, match=r"factors only of modules that .* found base_model.model.elsewhere"
    ):
        LoraAdapter(adapter.config, stray).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_file_that_contradicts_its_config_is_refused():
    adapter = LoraAdapter.from_model(peft_model("plain"))
    state = adapter.state_dict()
    with pytest.raises(ValueError, match="adapter config targets, found"):
        LoraAdapter.load(({**adapter.config.to_dict(), "target_modules": ["q_proj"]}, state))
    with pytest.raises(ValueError, match="surprise"):
        LoraAdapter.load((adapter.config, {**state, "surprise": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"shape: expected \(7, "):
        LoraAdapter.load(({**adapter.config.to_dict(), "r": 7}, state))


# -------------------------------------------------------------------------------------------------
# Loading into a pool


@pytest.mark.parametrize("case", CASES)
def test_pool_loads_models_and_values_like_their_folder(case, tmp_path):
    base = CASES[case][0]().eval()
    model = peft_model(case)
    model.save_pretrained(tmp_path)
    pool = AdapterPool(base, max_slots=4, max_rank=8)
    sources = {
        "folder": tmp_path,
        "model": model,
        "value": LoraAdapter.from_model(model),
        "loaded": LoraAdapter.load(tmp_path),
    }
    for name, source in sources.items():
        assert pool.load(name, source) == ()
    ids = torch.arange(12).view(2, 6)
    lora_ext.attach(base, pool)
    with torch.no_grad():
        logits = []
        for name in sources:
            with lora_ext.adapters(name):
                logits.append(base(ids).logits)
    assert all(torch.equal(logits[0], other) for other in logits[1:])
    assert (logits[0] - model.eval()(ids).logits).abs().max() < 1e-4


def test_pool_loads_the_active_or_the_named_adapter_of_a_model():
    model = peft_model("plain", "red")
    model.add_adapter("blue", peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False))
    pool = AdapterPool(llama(), max_slots=4, max_rank=8)
    pool.load("one", model)
    pool.load("two", model, adapter_name="blue")
    model.set_adapter("blue")
    pool.load("three", model)
    pool.update("one", model)
    targets = {name: set(pool._residence.by_name[name].pages) for name in pool.names}
    assert all("o_proj" in name for name in targets["two"]) and targets["two"] == targets["three"]
    assert targets["one"] == targets["two"], "it was updated"
    with pytest.raises(ValueError, match=r"expected one of \['red', 'blue'\], found 'green'"):
        pool.load("four", model, adapter_name="green")
    with pytest.raises(ValueError, match="adapter_name: expected None if source is a dir"):
        pool.load("four", "adapters/red", adapter_name="red")
    model.base_model.set_adapter(["red", "blue"])
    with pytest.raises(ValueError, match=r"adapter_name: expected a name, .*\['red', 'blue'\]"):
        pool.load("four", model)
    assert pool.prefetch({"four": LoraAdapter.from_model(model, "red")}) == ["four"]


@pytest.mark.parametrize("strict", [True, False])
def test_peft_model_with_a_trained_head_is_refused(strict):
    model = peft_model("embedding-and-head")
    with torch.no_grad():
        model.get_output_embeddings().base_layer.weight[0] += 1
    base = llama()
    pool = AdapterPool(base, max_slots=2, max_rank=8)
    for source in (model, LoraAdapter.from_model(model)):
        with pytest.raises(ValueError, match=r"lm_head.*expected the values of the base"):
            pool.load("a", source, strict=strict)


def test_factors_have_no_bias_by_default():
    assert Factors(torch.ones(1, 2), torch.ones(3, 1), 1.0).bias is None


@pytest.mark.parametrize("fields", [{}, {"bias": "all"}, {"modules_to_save": ["1"]}], ids=str)
def test_peft_layers_in_an_unwrapped_model_are_read(fields, tmp_path):
    base = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4))
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **fields)
    wrapped = peft.get_peft_model(copy.deepcopy(base), config)
    inside = copy.deepcopy(wrapped.base_model.model)
    inside.peft_config = wrapped.peft_config
    value = LoraAdapter.from_model(inside)
    assert value == LoraAdapter.from_model(wrapped)
    value.save(tmp_path)
    wrapped.save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == theirs.keys()


def test_transformers_model_with_injected_peft_layers_is_read():
    model = llama()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    assert {name.rpartition(".")[2] for name in LoraAdapter.from_model(model).modules} == {"q_proj"}
