"""Saving of lora_ext's own initialisation schemes, in files that PEFT can load."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from torch import nn

from lora_ext import LoraConfig
from lora_ext.adapter import LoraAdapter, save_adapter
from lora_ext.nn import LoraEmbedding, LoraLinear, wrap


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))


def raw_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("scheme", ["init_a", "init_b", "INIT_B_NORMAL", "init_ab"])
def test_init_scheme_that_peft_lacks_is_saved_in_a_separate_field(scheme, tmp_path):
    ours = wrap(model(), LoraConfig(r=2, init_lora_weights=scheme))
    adapter = LoraAdapter.from_model(ours)
    adapter.save(tmp_path)
    raw = raw_of(tmp_path)
    assert raw["init_lora_weights"] is True and raw["lora_ext_init"] == scheme.lower()
    with pytest.warns(UserWarning, match=r"\['lora_ext_init'\] .*these are ignored"):
        theirs = PeftModel.from_pretrained(model(), tmp_path)
    x = torch.randn(5, 12)
    torch.testing.assert_close(theirs(x), ours(x))
    assert LoraAdapter.load(tmp_path) == adapter
    LoraAdapter.load(tmp_path).save(tmp_path / "again")
    assert raw_of(tmp_path / "again") == raw


@pytest.mark.parametrize("scheme", [True, False, "gaussian", "orthogonal"])
def test_init_scheme_of_peft_needs_no_separate_field(scheme, tmp_path):
    LoraAdapter.from_model(wrap(model(), LoraConfig(r=2, init_lora_weights=scheme))).save(tmp_path)
    raw = raw_of(tmp_path)
    assert raw["init_lora_weights"] is (scheme is not False) and "lora_ext_init" not in raw


def test_layers_with_different_init_schemes_are_saved_with_the_default_of_peft(tmp_path):
    ours = model()
    ours[0] = LoraLinear(ours[0], r=2, init_lora_weights="init_b")
    ours[2] = LoraLinear(ours[2], r=2, init_lora_weights="init_a")
    LoraAdapter.from_model(ours).save(tmp_path / "first")
    assert raw_of(tmp_path / "first")["init_lora_weights"] is True
    assert "lora_ext_init" not in raw_of(tmp_path / "first")
    ours[2].reset_lora_parameters("default", "init_b")
    LoraAdapter.from_model(ours).save(tmp_path / "second")
    assert raw_of(tmp_path / "second")["lora_ext_init"] == "init_b"


def test_saved_lora_config_of_lora_ext_is_loadable_by_peft(tmp_path):
    config = LoraConfig(r=2, init_lora_weights="init_b", target_modules=["0"])
    ours = wrap(model(), config)
    save_adapter(tmp_path, config.to_dict(), LoraAdapter.from_model(ours).state_dict())
    assert raw_of(tmp_path)["init_lora_weights"] is True
    assert raw_of(tmp_path)["lora_ext_init"] == "init_b"


def test_adapter_that_changed_the_base_weight_is_refused_until_restored():
    base = model()
    ours = wrap(copy.deepcopy(base), LoraConfig(r=2, init_lora_weights="pissa"))
    with pytest.raises(NotImplementedError, match=r"from_model: model: 0: .*'pissa' changed"):
        LoraAdapter.from_model(ours)
    for layer in (ours[0], ours[2]):
        layer.restore_base_weight()
    assert LoraAdapter.from_model(ours).modules.keys() == {"0", "2"}


def test_init_scheme_of_a_deleted_adapter_is_forgotten():
    layer = LoraEmbedding(nn.Embedding(7, 4), r=2)
    layer.add_adapter("b", r=2, init_lora_weights="init_b")
    assert layer.init_lora_weights == {"default": True, "b": "init_b"}
    layer.delete_adapter("b")
    assert layer.init_lora_weights == {"default": True}
