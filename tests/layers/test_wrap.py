"""``wrap``, compared with get_peft_model and without PEFT, and ``unwrap``, which is bitwise."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from adapted_models import adapted, llama
from torch import Tensor, nn

import lora_ext
from lora_ext import LoraConfig
from lora_ext.adapter import save_adapter
from lora_ext.nn import LoraConv, LoraEmbedding, LoraLinear, adapted_layers, unwrap, wrap

PREFIX = "base_model.model."
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # sums of some tens of terms of order one, in another order


def gpt2() -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    return transformers.GPT2LMHeadModel(config).eval()


def vision() -> transformers.ViTForImageClassification:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).eval()


def pair(make, **fields) -> tuple[nn.Module, nn.Module]:
    """Return a model with adapters of lora_ext and one with equal adapters of PEFT."""
    fields = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **fields}
    ours = wrap(make(), LoraConfig(**fields))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(make(), peft.LoraConfig(**fields)).eval()
    state = {name.removeprefix(PREFIX): value for name, value in theirs.state_dict().items()}
    ours.load_state_dict(state)  # strict, so the keys are equal
    return ours, theirs


def run(model: nn.Module) -> Tensor:
    if any(isinstance(m, transformers.ViTForImageClassification) for m in model.modules()):
        return model(pixel_values=torch.linspace(-1, 1, 384).view(2, 3, 8, 8)).logits
    return model(input_ids=IDS).logits


def assert_agree(ours: nn.Module, theirs: nn.Module) -> None:
    """Check that outputs, trainable parameters and every gradient agree."""
    y, expected = run(ours), run(theirs)
    torch.testing.assert_close(y, expected, **CLOSE)
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    mine = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    peft_ = {n.removeprefix(PREFIX): p.grad for n, p in theirs.named_parameters()}
    peft_ = {n: g for n, g in peft_.items() if g is not None}
    assert mine.keys() == peft_.keys() and mine
    torch.testing.assert_close(mine, peft_, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.[01]\..*(up|v)_proj", "use_rslora": True},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "use_dora": True},
        {"target_modules": "all-linear", "exclude_modules": ["v_proj"], "lora_bias": True},
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {r".*layers\.1.*": 3},
        },
        {"target_modules": ["embed_tokens", "k_proj"]},
        {"target_modules": ["lm_head"]},
    ],
    ids=str,
)
def test_wrapped_llama_equals_peft(fields: dict):
    assert_agree(*pair(llama, **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        {"target_modules": "all-linear", "fan_in_fan_out": True},
        {"target_modules": ["c_fc", "wte"], "fan_in_fan_out": True},
    ],
    ids=str,
)
def test_layers_with_a_transposed_weight_equal_peft(fields: dict):
    ours, theirs = pair(gpt2, **fields)
    assert not any("lm_head" in name for name in adapted_layers(ours))
    assert_agree(ours, theirs)


def test_patch_embedding_of_a_vision_model_equals_peft():
    ours, theirs = pair(vision, target_modules=["projection", "query"])
    assert any(isinstance(m, LoraConv) for m in ours.modules())
    assert_agree(ours, theirs)


def test_classifier_of_a_sequence_task_is_not_targeted():
    fields = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}
    ours = adapted_layers(wrap(vision(), LoraConfig(**fields)))
    theirs = adapted_layers(peft.get_peft_model(vision(), peft.LoraConfig(**fields)))
    assert "classifier" not in ours
    assert set(ours) == {name.removeprefix(PREFIX) for name in theirs}


@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_of_16_bit_layers_have_the_dtype_of_peft(autocast: bool):
    def make():
        return llama().to(torch.bfloat16)

    ours = wrap(make(), LoraConfig(), autocast_adapter_dtype=autocast)
    config = peft.LoraConfig(target_modules="all-linear")
    theirs = peft.get_peft_model(make(), config, autocast_adapter_dtype=autocast)
    expected = {n.removeprefix(PREFIX): p.dtype for n, p in theirs.named_parameters()}
    assert {n: p.dtype for n, p in ours.named_parameters()} == expected
    assert run(ours).dtype == torch.bfloat16


def test_new_adapter_keeps_the_output_and_only_its_parameters_are_trainable():
    model = llama()
    before = run(model)
    assert wrap(model, LoraConfig()) is model
    torch.testing.assert_close(run(model), before, **CLOSE)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert all(layer.active_adapters == ["default"] for layer in adapted_layers(model).values())


def test_unwrapping_restores_every_object_flag_and_bit():
    model = llama()
    model.model.layers[0].requires_grad_(False)
    hook = model.lm_head.register_forward_hook(lambda *_: None)
    modules = dict(model.named_modules())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = set(model.__dict__)
    wrap(model, LoraConfig(init_lora_weights="pissa", r=2))
    assert not torch.equal(model.lm_head.weight, model.model.layers[0].mlp.up_proj.weight[:11])
    assert unwrap(model) is model
    assert all(m is modules[name] for name, m in model.named_modules())
    assert list(modules) == [name for name, _ in model.named_modules()]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[n], state[n]) for n in state)
    assert set(model.__dict__) == attributes
    assert len(model.lm_head._forward_hooks) == 1
    hook.remove()
    wrap(model, LoraConfig())  # wrapped again
    unwrap(model)


def test_adapter_with_two_random_factors_can_start_with_the_output_of_the_base_model():
    base = run(llama())
    settings = {"init_lora_weights": "init_ab", "target_modules": ["q_proj", "down_proj"]}
    assert (run(wrap(llama(), LoraConfig(**settings))) - base).abs().max() > 1e-3
    config = LoraConfig(**settings, preserve_base_output=True)
    assert "preserve_base_output" not in config.to_dict()
    model = wrap(llama(), config)
    torch.testing.assert_close(run(model), base, **CLOSE)
    assert torch.equal(run(unwrap(model)), base)
    with pytest.raises(ValueError, match="preserve_base_output: expected true or false, found 1"):
        LoraConfig(preserve_base_output=1)


def test_second_adapter_is_inactive_until_it_is_chosen():
    model = wrap(llama(), LoraConfig(target_modules=["q_proj"]), "french")
    wrap(model, LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False), "german")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".french." in name for name in trained)
    assert len(adapted_layers(model, "french")) == 3 and len(adapted_layers(model, "german")) == 6
    base = run(unwrap(copy.deepcopy(model)))
    torch.testing.assert_close(run(model), base, **CLOSE)
    with lora_ext.adapters(["german", None]):
        mixed = run(model)
    torch.testing.assert_close(mixed[1], base[1], **CLOSE)
    assert (mixed[0] - base[0]).abs().max() > 1e-3
    message = r"wrap: model.*q_proj: .* 'german' exists already; .* another adapter_name"
    with pytest.raises(ValueError, match=message):
        wrap(model, LoraConfig(target_modules=["q_proj"]), "german")
    unwrap(model)
    assert adapted_layers(model) == {}


def test_unwrapping_a_copy_restores_the_modules_of_the_copy():
    model = wrap(llama(), LoraConfig())
    twin = copy.deepcopy(model)
    inner = twin.model.layers[0].mlp.up_proj.base_layer
    unwrap(twin)
    assert twin.model.layers[0].mlp.up_proj is inner
    assert len(adapted_layers(model)) == 21


def test_unsupported_modules_leave_the_model_unchanged():
    model = llama()
    modules = dict(model.named_modules())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    targets, ranks = ["q_proj", "down_proj"], {"layers.2.mlp.down_proj": 20}
    config = LoraConfig(r=2, target_modules=targets, rank_pattern=ranks, init_lora_weights="pissa")
    message = r"wrap: model.layers.2.mlp.down_proj: init_lora_weights: 'pissa' needs r"
    with pytest.raises(ValueError, match=message):
        wrap(model, config)
    assert dict(model.named_modules()) == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    after = model.state_dict()
    assert all(torch.equal(after[name], state[name]) for name in state)
    with pytest.raises(RuntimeError, match=r"unwrap: model: .*, found a .* that is not wrapped$"):
        unwrap(model)


def test_failing_second_adapter_leaves_the_first_unchanged():
    model = wrap(llama(), LoraConfig(target_modules=["q_proj"]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"embed_tokens: lora_bias"):
        wrap(model, LoraConfig(target_modules=r".*(q_proj|embed_tokens)", lora_bias=True), "other")
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nothing", r"target_modules: expected a module .* to match \('nothing',\), found none"),
        ("mlp", "model.layers.0.mlp: target_modules: expected a Linear, .* found a LlamaMLP"),
    ],
)
def test_config_that_does_not_fit_raises(target: str, message: str):
    with pytest.raises(ValueError, match=f"wrap: {message}"):
        wrap(llama(), LoraConfig(target_modules=[target]))
    with pytest.raises(TypeError, match=r"wrap: config: expected .*\.LoraConfig, found .*dict"):
        wrap(llama(), {"r": 4})


def test_unused_rank_pattern_warns():
    with pytest.warns(UserWarning, match=r"wrap: config: rank_pattern\['typo'\] matches no"):
        wrap(llama(), LoraConfig(rank_pattern={"typo": 4}))


def test_models_with_other_adapters_raise():
    for model in (adapted("ours"), adapted("peft"), adapted("fused")):
        with pytest.raises(RuntimeError, match=r"wrap: model: expected .* only adapters"):
            wrap(model, LoraConfig())
    model = llama()
    lora_ext.attach(model, lora_ext.AdapterPool(model, max_slots=1, max_rank=4))
    with pytest.raises(RuntimeError, match=r"found MultiLoraEmbedding at 'model.embed_tokens'"):
        wrap(model, LoraConfig())


def test_layers_with_a_weight_that_is_read_without_a_call_raise():
    model = nn.ModuleDict({"body": nn.TransformerEncoderLayer(16, 2, 24), "head": nn.Linear(4, 4)})
    with pytest.raises(NotImplementedError, match=r"found 'body.linear1'; its parent module"):
        wrap(model, LoraConfig(target_modules=["linear1"]))
    assert list(adapted_layers(wrap(model, LoraConfig()))) == ["head"]


def test_float8_weights_are_refused_unless_the_layer_converts_them():
    class Converted(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight.float())

    config = LoraConfig(target_modules=["0", "1"])
    for layer in (nn.Linear(8, 8), nn.Embedding(5, 8), nn.Conv1d(2, 2, 1), Converted(8, 8, False)):
        model = nn.ModuleList([nn.Linear(8, 8), layer.to(torch.float8_e4m3fn)])
        if isinstance(layer, Converted):
            assert wrap(model, config)[1](torch.randn(3, 8)).dtype == torch.float32
            continue
        with pytest.raises(ValueError, match=r"wrap: 1: \w+: base_layer.weight: .* torch.float8"):
            wrap(model, config)
        assert type(model[0]) is nn.Linear and model[1] is layer


def test_convolutions_of_overlapping_windows_raise():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(NotImplementedError, match=r"wrap: 0: LoraConv: base_layer: expected str"):
        wrap(model, LoraConfig(target_modules=["0"]))


@pytest.mark.filterwarnings("ignore:unmerge")
def test_merged_adapters_and_replaced_layers_prevent_unwrapping():
    model = wrap(llama(), LoraConfig(init_lora_weights=False))
    layer = model.model.layers[1].mlp.up_proj
    layer.merge(keep_copy=True)
    with pytest.raises(RuntimeError, match=r"unwrap: model.layers.1.mlp.up_proj: .* unmerge them"):
        unwrap(model)
    layer.unmerge()
    model.model.layers[1].mlp.up_proj = nn.Identity()
    with pytest.raises(RuntimeError, match=r"up_proj: expected the layer that wrap has inser"):
        unwrap(model)
    assert isinstance(model.lm_head, nn.Linear) and len(adapted_layers(model)) == 20
    model.model.layers[1].mlp.up_proj = layer
    unwrap(model)


def test_trained_adapter_is_saved_and_peft_loads_it(tmp_path: Path):
    model = llama()
    config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    wrap(model, config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        run(model).square().mean().backward()
        optimizer.step()
    state = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    save_adapter(tmp_path, config, state)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing keys.
        theirs = peft.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    torch.testing.assert_close(run(theirs), run(model), **CLOSE)


def test_layers_of_every_kind_are_wrapped():
    model = wrap(gpt2(), LoraConfig(target_modules=r".*(c_attn|wte)"))
    assert {type(layer) for layer in adapted_layers(model).values()} == {LoraLinear, LoraEmbedding}


@pytest.mark.slow
def test_peft_is_not_needed():
    code = """
import sys
sys.modules["peft"] = None  # any import of it raises
import torch
import lora_ext
model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
lora_ext.nn.wrap(model, lora_ext.LoraConfig(r=1))
model(torch.ones(1, 2)).sum().backward()
assert list(lora_ext.nn.adapted_layers(model, "default")) == ["0", "1"]
lora_ext.nn.unwrap(model)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
