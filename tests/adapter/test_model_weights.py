"""`ModelWeights`: weights of a model by name, read on demand from files that are not trusted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapted_models import adapted, llama
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_ext.adapter import LoraAdapter
from lora_ext.adapter.model_weights import ModelWeights

Q = "model.layers.0.self_attn.q_proj"


def weights(source, *modules: str) -> list[Tensor]:
    with ModelWeights(source, "test: base") as found:
        return [found.read(key) for key in found.keys(modules).values()]


def sharded(folder: Path, index: bool = True, shards: int = 3) -> dict[str, Tensor]:
    """Save a model's weights in several files, as transformers does, and return them."""
    tensors = {k: v.clone() for k, v in llama().state_dict().items()}
    placed = {
        k: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, k in enumerate(tensors)
    }
    for name in set(placed.values()):
        save_file({k: v for k, v in tensors.items() if placed[k] == name}, folder / name)
    if index:
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": placed})
        (folder / "model.safetensors.index.json").write_text(text)
    return tensors


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_read_with_and_without_an_index(tmp_path: Path, index: bool):
    tensors = sharded(tmp_path, index)
    modules = [k.removesuffix(".weight") for k in tensors if k.endswith(".weight")]
    for module, weight in zip(modules, weights(tmp_path, *modules), strict=True):
        assert torch.equal(weight, tensors[f"{module}.weight"])


def test_single_file_is_read_by_its_folder_and_by_its_name(tmp_path: Path):
    model = llama()
    model.save_pretrained(tmp_path)
    expected = model.get_submodule(Q).weight
    for source in (tmp_path, str(tmp_path), tmp_path / "model.safetensors"):
        (weight,) = weights(source, Q)
        assert torch.equal(weight, expected)


def test_live_model_and_its_state_dict_are_not_copied():
    model = llama()
    for source in (model, model.state_dict()):
        (weight,) = weights(source, Q)
        assert weight.data_ptr() == model.get_submodule(Q).weight.data_ptr()
        assert not weight.requires_grad


@pytest.mark.parametrize("kind", ["ours", "peft", "fused"])
def test_adapted_models_give_their_base_weights(kind: str):
    (weight,) = weights(adapted(kind), Q)
    assert torch.equal(weight, llama().get_submodule(Q).weight)


@pytest.mark.parametrize("kind", ["ours", "peft"])
def test_weight_with_a_merged_adapter_is_refused(kind: str):
    model = adapted(kind)
    next(m for n, m in model.named_modules() if n.endswith(Q)).merge()
    with pytest.raises(ValueError, match=r"test: base: .*q_proj.*\['default'\] merged.*unmerge"):
        weights(model, Q)


@pytest.mark.parametrize(
    "prefix", ["base_model.model.", "module.", "_orig_mod.", "module.base_model.model."]
)
def test_prefixes_of_wrappers_are_ignored(prefix: str):
    named = {f"{prefix}{k}": v for k, v in llama().state_dict().items()}
    (weight,) = weights(named, Q)
    assert weight is not None and torch.equal(weight, llama().get_submodule(Q).weight)


def test_model_without_its_head_is_paired_with_one_that_has_it():
    whole, bare = llama(), llama().model
    assert torch.equal(weights(bare, Q)[0], weights(whole, Q)[0])
    assert torch.equal(weights(whole, Q.removeprefix("model."))[0], weights(bare, Q)[0])


def test_exact_name_is_preferred_and_two_other_matches_are_ambiguous():
    one, two = torch.ones(2, 2), torch.zeros(2, 2)
    assert weights({"model.up.weight": one, "up.weight": two}, "up")[0].sum() == 0
    with pytest.raises(
        ValueError,
        match=r"test: base: transformer.up: expected a single .*found model.up.weight, up.weight",
    ):
        weights({"model.up.weight": one, "up.weight": two}, "transformer.up")


def test_order_of_tensors_is_ignored():
    tensors = llama().state_dict()
    turned = dict(reversed(tensors.items()))
    assert torch.equal(weights(turned, Q)[0], weights(tensors, Q)[0])


def test_absent_modules_raise_a_key_error_that_lists_five(tmp_path: Path):
    llama().save_pretrained(tmp_path)
    absent = [f"model.layers.{i}.q" for i in range(7, 14)]
    with pytest.raises(KeyError) as error:
        weights(tmp_path, Q, *absent)
    text = str(error.value)
    assert "test: base" in text and str(tmp_path) in text and "and 2 more" in text
    assert all(name in text for name in absent[:5]) and absent[5] not in text


def test_only_requested_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lora_ext._files import SafetensorsFile

    sharded(tmp_path)
    read: list[str] = []
    original = SafetensorsFile.read
    monkeypatch.setattr(
        SafetensorsFile, "read", lambda f, key: read.append(key) or original(f, key)
    )
    with ModelWeights(tmp_path, "test") as found:
        keys = found.keys([Q])
        assert found.shape(keys[Q]) == (16, 16) and not read
        found.read(keys[Q])
    assert read == [f"{Q}.weight"]


# -------------------------------------------------------------------------------------------------
# Quantised weights


def test_quantised_weights_raise_a_type_error_with_the_remedy(tmp_path: Path):
    packed = {f"{Q}.weight": torch.zeros(4, 1, dtype=torch.uint8)}
    save_file(packed, tmp_path / "model.safetensors")
    for source in (packed, tmp_path):
        with pytest.raises(
            TypeError, match=rf"test: base: {Q}.weight: .*found (torch.uint8|U8); dequantise"
        ):
            weights(source, Q)
    with pytest.raises(TypeError, match=r"found torch.float8_e4m3fn; dequantise"):
        weights({f"{Q}.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, Q)


def test_packed_layer_without_a_weight_is_reported_as_quantised():
    with pytest.raises(TypeError, match=r"found model.up.qweight of a quantised model; dequantise"):
        weights({"model.up.qweight": torch.zeros(2, 2, dtype=torch.int32)}, "model.up")

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))

    with pytest.raises(TypeError, match=r"up.weight: .*found Packed; dequantise"):
        weights(nn.ModuleDict({"up": Packed()}), "up")


def test_weight_on_meta_is_refused():
    with pytest.raises(ValueError, match=r"q_proj.weight: expected values, found a weight on meta"):
        weights(llama().to("meta"), Q)


# -------------------------------------------------------------------------------------------------
# Invalid sources


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (3, TypeError, "test: base: expected a folder .*found int"),
        ("nowhere/model", ValueError, "nowhere/model: cannot be opened: .*nothing is downloaded"),
        ({"a.weight": 3}, ValueError, "test: base: expected a dict of tensors by name"),
    ],
)
def test_invalid_sources_are_refused(source, error: type, message: str):
    with pytest.raises(error, match=message):
        weights(source, Q)


def test_error_for_a_folder_without_safetensors_names_its_content(tmp_path: Path):
    with pytest.raises(ValueError, match="expected a folder of safetensors files, found none"):
        weights(tmp_path, Q)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"found a .bin file; save the model with save_pretrained"):
        weights(tmp_path, Q)
    LoraAdapter.from_model(adapted("ours")).save(tmp_path)
    with pytest.raises(ValueError, match="found an adapter; pass the folder of the model"):
        weights(tmp_path, Q)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "weight_map: expected a dict of filenames"),
        ('{"weight_map": {}}', "weight_map: expected a dict of filenames"),
        ('{"weight_map": {"a": 3}}', "a: expected the name of a safetensors file .*found 3"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "found '../x.safetensors'"),
        ('{"weight_map": {"a": "/etc/x.safetensors"}}', "found '/etc/x.safetensors'"),
        ('{"weight_map": {"a": "x.bin"}}', "found 'x.bin'"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors: cannot be opened"),
        ('{"weight_map": {"a": "there.safetensors"}}', "expected 'a' in there.safetensors"),
        ("{", "expected JSON"),
    ],
)
def test_invalid_index_is_refused(tmp_path: Path, index: str, message: str):
    save_file({"b.weight": torch.ones(2)}, tmp_path / "there.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        weights(tmp_path, "b")


def test_tensor_in_two_files_is_refused(tmp_path: Path):
    for name in ("one", "two"):
        save_file({"b.weight": torch.ones(2, 2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"b.weight: expected it in one file, .*one.* and two"):
        weights(tmp_path, "b")


def test_damaged_shard_is_refused(tmp_path: Path):
    sharded(tmp_path)
    victim = tmp_path / "model-00002-of-00003.safetensors"
    victim.write_bytes(victim.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"model-00002-of-00003.safetensors: expected \d+ bytes"):
        weights(tmp_path, Q)
