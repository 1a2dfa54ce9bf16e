"""`ModelIndex`: the modules of a model that can have adapters, and the devices of their pages."""

import copy

import accelerate
import peft
import pytest
import torch
import transformers
from made_adapters import llama
from pool_support import Base, config
from torch import nn

import lora_ext
from lora_ext.adapter._model_index import ModelIndex
from lora_ext.pool import AdapterPool


def test_public_names_are_packages_or_the_context_manager_adapters():
    assert lora_ext.pool.AdapterPool is lora_ext.AdapterPool is AdapterPool
    assert lora_ext.adapter.save_adapter is not None
    assert lora_ext.adapters is lora_ext.nn.adapters, "found another object"


def _peft_model():
    return peft.get_peft_model(Base(), peft.LoraConfig(target_modules=["up"]))


def _attached():
    model = Base()
    return lora_ext.attach(model, AdapterPool(model, max_slots=1))


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: None, TypeError, "expected a torch.nn.Module, found None"),
        (lambda: "org/name", TypeError, "found 'org/name'; load the base model first, e.g. with"),
        (_peft_model, ValueError, r"found PeftModel; .*model\.unload\(\)"),
        (
            lambda: lora_ext.from_peft(_peft_model()).base_model.model,
            ValueError,
            r"FusedLinear at 'up",
        ),
        (_attached, ValueError, "found MultiLoraLinear at 'up'; detach the model first"),
        (
            lambda: nn.Sequential(lora_ext.nn.LoraLinear(nn.Linear(3, 3))),
            ValueError,
            "found LoraLinear at '0'; pass the model before",
        ),
        (lambda: nn.LayerNorm(3), ValueError, "expected at least one Linear, Conv1D or Embedding"),
    ],
)
def test_model_that_cannot_have_a_pool_is_refused_with_the_remedy(make, kind, words):
    with pytest.raises(kind, match=f"AdapterPool: model: .*{words}"):
        AdapterPool(make())


# -------------------------------------------------------------------------------------------------
# Devices


def test_model_on_meta_needs_a_device():
    with torch.device("meta"):
        model = Base()
    with pytest.raises(ValueError, match=r"device: expected .* up's weight on meta; pass device="):
        AdapterPool(model)
    assert AdapterPool(model, device="cpu").index.modules["up"].device.type == "cpu"


def test_pages_of_an_offloaded_module_are_on_its_execution_device():
    model = accelerate.cpu_offload(Base(), execution_device=torch.device("cpu"))
    assert model.up.weight.is_meta
    index = ModelIndex.build(model)
    assert {spec.device for spec in index.modules.values()} == {torch.device("cpu")}


def test_device_of_the_nearest_hook_is_used():
    # The devices of these hooks need not exist: the index only reads their names.
    model = nn.ModuleDict({"far": nn.ModuleDict({"near": nn.Linear(3, 3)}), "own": nn.Linear(3, 3)})
    hooks = {"far": "cuda:1", "far.near": None, "own": "cuda:0"}
    for name, device in hooks.items():
        module = model.get_submodule(name)
        own = accelerate.hooks.ModelHook()
        own.execution_device = device
        module._hf_hook = accelerate.hooks.SequentialHook(accelerate.hooks.ModelHook(), own)
    devices = {name: str(spec.device) for name, spec in ModelIndex.build(model).linear.items()}
    assert devices == {"far.near": "cuda:1", "own": "cuda:0"}


def _offloaded_to_disk(model, folder):
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu"}
    places |= dict.fromkeys(("model.layers", "model.norm", "lm_head"), "disk")
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=folder / "offloaded", force_hooks=True
    )


def _offloaded_to_memory(model, _folder):
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("offload", [_offloaded_to_disk, _offloaded_to_memory])
def test_offloaded_model_serves_the_same_adapters(offload, tmp_path):
    ids = torch.arange(2, 14).view(2, 6)
    model = llama()
    offloaded = offload(copy.deepcopy(model), tmp_path)
    assert offloaded.lm_head.weight.is_meta
    lora = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    trained = peft.get_peft_model(copy.deepcopy(model), lora)
    trained.save_pretrained(tmp_path / "adapter")
    logits = []
    for served in (model, offloaded):
        pool = AdapterPool(served, max_slots=2, max_rank=8)
        pool.load("a", tmp_path / "adapter")
        lora_ext.attach(served, pool)
        with torch.no_grad(), lora_ext.adapters(["a", None]):
            logits.append(served(ids).logits)
        lora_ext.detach(served)
    assert torch.equal(*logits)


# -------------------------------------------------------------------------------------------------
# Modules whose inputs are not the rows of the batch (routed experts), and modules never called


_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def _small(name, kind="ForCausalLM", **fields):
    """Return a function that makes a small model of the transformers class ``name + kind``."""
    config = getattr(transformers, f"{name}Config")
    return lambda: getattr(transformers, f"{name}{kind}")(config(**fields))


_mixtral = _small("Mixtral", **_SMALL, **_HEADS, num_local_experts=4)
_qwen2_moe = _small(
    "Qwen2Moe", **_SMALL, **_HEADS, num_experts=4,
    moe_intermediate_size=16, shared_expert_intermediate_size=24,
)  # fmt: skip
_jetmoe = _small("JetMoe", **_SMALL, num_key_value_heads=4, kv_channels=8, num_local_experts=4)
_switch = _small(
    "SwitchTransformers", "ForConditionalGeneration", d_model=32, d_ff=48, d_kv=8, num_heads=4,
    num_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, vocab_size=64,
    num_experts=4,
)  # fmt: skip


class _ExpertsInAList(nn.Module):
    """Mixture of experts with one module per expert, as in earlier versions of Mixtral."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(12, 12)
        self.block_sparse_moe = nn.Module()
        self.block_sparse_moe.gate = nn.Linear(12, 2)
        self.block_sparse_moe.experts = nn.ModuleList(
            nn.ModuleDict({"w1": nn.Linear(12, 20), "w2": nn.Linear(20, 12)}) for _ in range(2)
        )


MIXTURES = {
    "mixtral": (_mixtral, {"model.layers.0.self_attn.q_proj"}),
    "qwen2-moe": (_qwen2_moe, {"model.layers.0.mlp.shared_expert.up_proj"}),
    "jetmoe": (
        _jetmoe,
        {"model.layers.0.self_attention.experts.router.layer", "model.layers.0.mlp.router.layer"},
    ),
    "switch": (_switch, {"encoder.block.0.layer.0.SelfAttention.q"}),
    "list": (_ExpertsInAList, {"q_proj", "block_sparse_moe.gate"}),
}


@pytest.mark.parametrize("family", MIXTURES)
def test_pool_of_a_mixture_excludes_its_routed_experts(family):
    make, some = MIXTURES[family]
    model = make()
    pool = AdapterPool(model, max_slots=1, max_rank=8)
    assert some <= pool.modules.keys(), "expected modules that process all tokens in the pool"
    assert not [name for name in pool.modules if ".experts." in name and "router" not in name]
    lora_ext.attach(model, pool)
    lora_ext.detach(model)


EXPERT = "block_sparse_moe.experts.1.w1"


def _factors(name, i=12, o=20):
    stem = f"base_model.model.{name}.lora_"
    return {stem + "A.weight": torch.ones(4, i), stem + "B.weight": torch.ones(o, 4)}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "make", [_ExpertsInAList, lambda: nn.ModuleDict({"q_proj": nn.Linear(12, 12)})]
)
@pytest.mark.parametrize("targets", [["q_proj", "w1"], None])
def test_adapter_of_routed_experts_is_refused_by_name(make, targets, strict):
    # The second model has no module named EXPERT, like models that store all experts in one tensor.
    pool = AdapterPool(make(), max_slots=1, max_rank=8)
    raw = config(targets=()) | {"target_modules": targets}
    tensors = _factors("q_proj", 12, 12) | _factors(EXPERT)
    with pytest.raises(NotImplementedError, match=rf"{EXPERT}.*routed experts"):
        pool.load("a", (raw, tensors), strict=strict)
    assert pool.names == []


@pytest.mark.parametrize("strict", [True, False])
def test_factors_of_a_module_that_is_not_called_are_never_skipped(strict):
    # PEFT's all-linear includes ``out_proj``, which attention reads outside its forward.
    model = nn.ModuleDict({"layer": nn.MultiheadAttention(12, 2), "up": nn.Linear(12, 20)})
    pool = AdapterPool(model, max_slots=1, max_rank=8)
    assert list(pool.modules) == ["up"]
    raw = config(targets=()) | {"target_modules": "all-linear"}
    tensors = _factors("up") | _factors("layer.out_proj", 12, 12)
    message = "layer.out_proj.lora_A.weight: .*NonDynamicallyQuantizableLinear of MultiheadAtt"
    with pytest.raises(NotImplementedError, match=message):
        pool.load("a", (raw, tensors), strict=strict)


# -------------------------------------------------------------------------------------------------
# Layers whose weights are read although the layers are not called


class _Reads(nn.Module):
    """Model that, like Mamba, uses the weight of the layer ``read`` without calling this layer. The
    model calls the layer ``asked``, and also reads the dtype of the weight of ``asked``."""

    def __init__(self):
        super().__init__()
        self.read, self.asked, self.called = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        x = self.asked(x.to(self.asked.weight.dtype))
        return self.called(x @ self.read.weight.T)


_MAMBA = {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 11, "time_step_rank": 2}
_BLOOM = {"hidden_size": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11}
_EXACT = {"pretraining_tp": 2, "slow_but_exact": True}
_JAMBA = {
    "vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "mamba_dt_rank": 2, "num_experts": 1,
    "attn_layer_period": 2, "attn_layer_offset": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "ends"),
    [
        (lambda: nn.Sequential(_Reads()), {"read"}),
        (_small("Mamba", "Model", **_MAMBA), {"dt_proj"}),
        (_small("FalconMamba", "Model", **_MAMBA), {"dt_proj"}),
        (_small("Jamba", "Model", **_JAMBA), {"dt_proj"}),
        (_small("Bloom", "Model", **_BLOOM), set()),
        (_small("Bloom", "Model", **_BLOOM, **_EXACT), {"dense", "dense_4h_to_h"}),
    ],
    ids=["ours", "mamba", "falcon-mamba", "jamba", "bloom", "exact-bloom"],
)
def test_layers_that_are_not_called_but_used_by_weight_are_bypassed(make, ends):
    assert {name.rpartition(".")[2] for name in ModelIndex.build(make()).bypassed} == ends


@pytest.mark.parametrize("strict", [True, False])
def test_adapter_on_a_layer_that_is_not_called_is_refused_by_name(strict):
    # B = 0 is accepted: PEFT adds factors to these layers too, and they receive no gradient.
    pool = AdapterPool(nn.Sequential(_Reads()), max_slots=1, max_rank=2)
    targets = ["read", "called"]
    state = {}
    for name in targets:
        state[f"base_model.model.0.{name}.lora_A.weight"] = torch.ones(2, 4)
        state[f"base_model.model.0.{name}.lora_B.weight"] = torch.zeros(4, 2)
    pool.load("zeros", (config(2, targets), state))
    state["base_model.model.0.called.lora_B.weight"] = torch.ones(4, 2)
    pool.update("zeros", (config(2, targets), state))
    state["base_model.model.0.read.lora_B.weight"] = torch.ones(4, 2)
    with pytest.raises(NotImplementedError, match=r"0\.read\.lora_B.*expected zeros.*_Reads reads"):
        pool.update("zeros", (config(2, targets), state), strict=strict)
    whole = {f"base_model.model.0.read.{k}": torch.ones(v) for k, v in
             (("weight", (4, 4)), ("bias", 4))}  # fmt: skip
    del state["base_model.model.0.read.lora_A.weight"]
    del state["base_model.model.0.read.lora_B.weight"]
    with pytest.raises(NotImplementedError, match=r"0\.read\.weight: modules_to_save"):
        pool.update(
            "zeros",
            ({**config(2, ["called"]), "modules_to_save": ["read"]}, {**state, **whole}),
            strict=strict,
        )
