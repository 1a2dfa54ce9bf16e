"""PEFT saves the base weight of an adapted head with the adapter; it must equal the model's."""

import copy
import gc

import accelerate
import peft
import pytest
import torch
from made_adapters import llama
from safetensors.torch import load_file, save_file
from torch import nn

import lora_ext
from lora_ext.pool import AdapterPool

pytestmark = pytest.mark.filterwarnings("ignore")

EMBEDDING = "base_model.model.model.embed_tokens"
HEAD = "base_model.model.lm_head"


def small(tied=False, vocabulary=64):
    return llama(1, vocab_size=vocabulary, tie_word_embeddings=tied)


def trained(model, targets):
    """Return a PEFT model that wraps a copy of ``model`` and has random factors."""
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    return peft.get_peft_model(copy.deepcopy(model), config)


def pool_of(model, **settings):
    return AdapterPool(model, max_slots=2, max_rank=8, **settings)


TARGETS = {
    "head": (["q_proj", "lm_head"], {f"{HEAD}.base_layer.weight"}),
    "embedding": (["q_proj", "embed_tokens"], {f"{EMBEDDING}.base_layer.weight"}),
    "both": (
        ["lm_head", "embed_tokens"],
        {f"{HEAD}.base_layer.weight", f"{EMBEDDING}.base_layer.weight"},
    ),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("case", TARGETS)
def test_equal_base_weight_is_accepted_and_a_changed_one_is_refused(case, strict, tied, tmp_path):
    targets, expected = TARGETS[case]
    model = small(tied)
    theirs = trained(model, targets)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    assert {key for key in tensors if "lora_" not in key} == expected, "as saved by PEFT"

    pool = pool_of(model)
    assert pool.load("same", tmp_path, strict=strict) == (), "expected no skipped base weights"
    lora_ext.attach(model, pool)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad(), lora_ext.adapters("same"):
        assert (model(ids).logits - theirs(ids).logits).abs().max() < 1e-5
    # The weight is compared with that of the live model, even while the pool is attached.
    for key in expected:
        changed = dict(tensors)
        changed[key] = tensors[key].clone()
        changed[key][-1, -1] += 1e-3
        save_file(changed, path)
        with pytest.raises(ValueError, match=rf"{key}: expected the values of the base"):
            pool.load("other", tmp_path, strict=strict)
    assert pool.names == ["same"]


@pytest.mark.parametrize("strict", [True, False])
def test_base_weight_of_a_head_without_adapter_is_compared_too(strict, tmp_path):
    # With ``save_embedding_layers=True``, PEFT's keys of embedding and head lack ``base_layer``.
    model = small()
    theirs = trained(model, ["q_proj"])
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    keys = {k for k in load_file(tmp_path / "adapter_model.safetensors") if "lora_" not in k}
    assert keys == {f"{HEAD}.weight", f"{EMBEDDING}.weight"}
    pool = pool_of(model)
    assert pool.load("same", tmp_path, strict=strict) == ()
    with torch.no_grad():
        theirs.get_output_embeddings().weight[3] *= 2
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(ValueError, match=rf"{HEAD}\.weight: expected the values of the base"):
        pool.load("trained", tmp_path, strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_resized_vocabulary_is_refused_until_the_model_is_resized_too(strict, tmp_path):
    model = small()
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(70)
    theirs = trained(larger, ["q_proj"])
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(
        ValueError,
        match=rf"({HEAD}|{EMBEDDING})\.weight: shape: expected \(64, 32\) .*\(70, 32\)",
    ):
        pool_of(model).load("larger", tmp_path, strict=strict)
    model.resize_token_embeddings(70)  # the new rows differ from the trained ones
    with pytest.raises(ValueError, match=r"the base model.s weight, found different values"):
        pool_of(model).load("larger", tmp_path, strict=strict)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(tensors[f"{EMBEDDING}.weight"])
        model.get_output_embeddings().weight.copy_(tensors[f"{HEAD}.weight"])
    assert pool_of(model).load("larger", tmp_path, strict=strict) == ()


@pytest.mark.parametrize(
    ("file", "model_dtype", "fits"),
    [
        (torch.bfloat16, torch.float32, False),  # the file is rounded, the model is not
        (torch.float32, torch.bfloat16, True),  # rounding the file gives the model's weights
        (torch.float32, torch.float64, True),
    ],
)
def test_file_of_another_dtype_is_compared_in_the_dtype_of_the_model(
    file, model_dtype, fits, tmp_path
):
    model = small()
    theirs = trained(model, ["lm_head"])
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = f"{HEAD}.base_layer.weight"
    save_file({**tensors, key: tensors[key].to(file)}, path)
    pool = pool_of(model.to(model_dtype))
    if fits:
        pool.load("a", tmp_path)
    else:
        with pytest.raises(ValueError, match="values of the base model"):
            pool.load("a", tmp_path)


def test_pool_does_not_keep_the_model_alive(tmp_path):
    model = small()
    trained(model, ["lm_head"]).save_pretrained(tmp_path)
    pool = pool_of(model)
    del model
    gc.collect()
    for strict in (True, False):
        with pytest.raises(ValueError, match=rf"{HEAD}\.base_layer.* found a deleted model"):
            pool.load("a", tmp_path, strict=strict)


@pytest.mark.parametrize("offload", ["memory", "disk", "nowhere"])
def test_offloaded_weight_is_loaded_for_the_comparison(offload, tmp_path):
    model = small()
    trained(model, ["lm_head"]).save_pretrained(tmp_path)
    settings = {}
    if offload == "memory":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    elif offload == "disk":
        accelerate.disk_offload(model, tmp_path / "offloaded", torch.device("cpu"))
    else:
        model, settings = model.to("meta"), {"device": "cpu"}
    assert model.lm_head.weight.is_meta
    pool = pool_of(model, **settings)
    if offload == "nowhere":
        with pytest.raises(ValueError, match=r"lm_head.base_layer.weight: .* found none"):
            pool.load("a", tmp_path)
        return
    pool.load("a", tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"{HEAD}.base_layer.weight"][0, 0] += 1
    save_file(tensors, path)
    with pytest.raises(ValueError, match="values of the base model"):
        pool.load("b", tmp_path)


def test_every_base_weight_is_compared_by_shape_dtype_and_value(tmp_path):
    model = nn.ModuleDict({"up": nn.Linear(12, 20), "norm": nn.BatchNorm1d(12)})
    pool = pool_of(model)
    lora = {"up.lora_A.weight": torch.ones(4, 12), "up.lora_B.weight": torch.ones(20, 4)}
    raw = {"peft_type": "LORA", "r": 4, "target_modules": ["up"]}
    own = {"up.base_layer.bias": model["up"].bias, "norm.running_mean": torch.zeros(12)}
    assert pool.load("a", (raw, {**lora, **own})) == ()
    for key, value, message in (
        ("up.base_layer.bias", torch.ones(21), r"shape: expected \(20,\) .*found \(21,\)"),
        ("up.bias", torch.ones(20), ".*values of the base model"),
        ("norm.running_mean", torch.ones(12), ".*values of the base model"),
        ("norm.running_mean", torch.zeros(12, dtype=torch.int64), "dtype: expected torch.float32"),
    ):
        with pytest.raises(ValueError, match=rf"{key}: {message}"):
            pool.load("b", (raw, {**lora, key: value}), strict=False)
    skipped = pool.load("b", (raw, {**lora, "elsewhere.weight": torch.ones(1)}), strict=False)
    assert skipped == ("elsewhere.weight",)
