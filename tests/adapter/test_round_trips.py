"""Loading and saving preserves PEFT's files bit for bit, even tensors that no operation
supports."""

import copy
import json

import peft
import pytest
import torch
from made_adapters import Q, adapter
from safetensors.torch import load_file
from torch import nn

import lora_ext
from lora_ext.adapter import LoraAdapter, merge_adapters, prune_adapter, resize_adapter
from lora_ext.nn import LoraConv
from lora_ext.pool import AdapterPool

pytestmark = pytest.mark.filterwarnings("ignore")


class Mixed(nn.Module):
    """Model with every kind of layer that PEFT adapts, and two modules that are fully trained."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.conv1 = nn.Conv1d(6, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, (2, 3))
        self.conv3 = nn.Conv3d(1, 4, 2)
        self.grouped = nn.Conv2d(4, 8, 1, groups=2)
        self.up = nn.Linear(8, 10)
        self.norm = nn.BatchNorm1d(10)
        self.score = nn.Sequential(nn.Linear(10, 4), nn.PReLU())

    def forward(self, ids):  # (B, 9)
        h = self.conv1(self.embed(ids).transpose(1, 2))  # (B, 8, 9)
        wide = self.grouped(self.conv2(h[:, None]))  # (B, 8, 7, 7)
        deep = self.conv3(wide[:, None]).mean((1, 2, 3, 4))  # (B,)
        return self.score(self.norm(self.up(h.mean(2)) + deep[:, None]))


CASES = {
    "convolutions": {"target_modules": ["conv1", "conv2", "conv3", "up"]},
    "convolutions-dora": {"target_modules": ["conv1", "conv2", "conv3", "up"], "use_dora": True},
    "convolutions-bias": {"target_modules": ["conv1", "conv2"], "lora_bias": True},
    "grouped": {"target_modules": ["grouped", "conv2"]},
    "embedding": {"target_modules": ["embed", "up"]},
    "embedding-dora": {"target_modules": ["embed", "up"], "use_dora": True},
    "whole": {"target_modules": ["up"], "modules_to_save": ["score", "norm"]},
    "biases": {"target_modules": ["up", "conv1"], "bias": "all"},
    "own-biases": {"target_modules": ["up", "conv1"], "bias": "lora_only"},
    "all": {
        "target_modules": ["embed", "conv1", "conv2", "conv3", "up"],
        "modules_to_save": ["score"],
        "rank_pattern": {"up": 3},
    },
}


def mixed():
    torch.manual_seed(0)
    return Mixed().eval()


def peft_model(case):
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **CASES[case])
    model = peft.get_peft_model(mixed(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        for name, buffer in model.named_buffers():
            if ".modules_to_save." in name:
                buffer.add_(3)
    return model.eval()


IDS = torch.arange(18).view(2, 9) % 7


@pytest.mark.parametrize("case", CASES)
def test_load_and_save_keep_every_bit(case, tmp_path):
    model = peft_model(case)
    model.save_pretrained(tmp_path / "peft")
    loaded = LoraAdapter.load(tmp_path / "peft")
    loaded.save(tmp_path / "ours")
    theirs, ours = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "ours")
    )
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and torch.equal(ours[key], value), key
    assert LoraAdapter.load(tmp_path / "ours") == loaded
    assert LoraAdapter.from_model(model) == loaded
    assert LoraAdapter.load((model.peft_config["default"], theirs)) == loaded
    assert copy.deepcopy(loaded) == loaded
    old = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    new = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    for field in ("bias", "lora_bias", "use_dora", "r", "rank_pattern"):
        assert new[field] == old[field]
    assert sorted(new["modules_to_save"] or ()) == sorted(old["modules_to_save"] or ())


@pytest.mark.parametrize("case", CASES)
def test_peft_and_from_peft_load_saved_adapters(case, tmp_path):
    model = peft_model(case)
    LoraAdapter.from_model(model).save(tmp_path)
    theirs = peft.get_peft_model(mixed(), peft.LoraConfig.from_pretrained(tmp_path)).eval()
    found = peft.set_peft_model_state_dict(theirs, peft.load_peft_weights(tmp_path))
    assert found.unexpected_keys == []
    trained = ("lora_", "modules_to_save.default")
    assert [key for key in found.missing_keys if any(part in key for part in trained)] == []
    with torch.no_grad():
        wanted = model(IDS)
        assert torch.equal(theirs(IDS), wanted)
        assert torch.allclose(lora_ext.from_peft(theirs)(IDS), wanted, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_pool_refuses_unsupported_adapters(case, tmp_path):
    LoraAdapter.from_model(peft_model(case)).save(tmp_path)
    pool = AdapterPool(mixed(), max_slots=2, max_rank=8)
    sources = (tmp_path, LoraAdapter.load(tmp_path), peft_model(case))
    for source in sources:
        if case == "embedding":
            pool.load(f"good {len(pool.names)}", source) if len(pool.names) < 2 else None
            continue
        with pytest.raises((ValueError, NotImplementedError)) as caught:
            pool.load("bad", source)
        match = {"whole": ": expected a plain Linear or Embedding", "embedding-dora": "DoRA"}
        match |= {"biases": "bias: expected 'none'", "own-biases": "bias: expected 'none'"}
        assert match.get(case, "Conv") in str(caught.value)
    assert len(pool.names) == (2 if case == "embedding" else 0)


def test_convolutions_with_our_layers_are_saved_for_peft(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2))
    model = copy.deepcopy(base)
    model[0] = LoraConv(model[0], r=3, use_dora=True, init_lora_weights=False)
    value = LoraAdapter.from_model(model)
    assert value.modules["0"].a.shape == (3, 3, 4, 4)
    assert value.modules["0"].b.shape == (8, 3, 1, 1)
    assert value.modules["0"].after.scale.shape == (1, 8, 1, 1)
    value.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(theirs(x), model(x), atol=1e-5)


@pytest.mark.parametrize("case", ["convolutions", "convolutions-bias", "embedding"])
def test_exact_operations_support_convolutions_and_embeddings(case, tmp_path):
    model = peft_model(case)
    value = LoraAdapter.from_model(model)
    with torch.no_grad():
        wanted = model(IDS)
    values = {
        "merged": merge_adapters([value, value], [0.25, 0.75]),
        "summed": merge_adapters([value, value], [0.25, 0.75], "factors"),
        "grown": resize_adapter(value, 6)[0],
        "back": resize_adapter(resize_adapter(value, 6)[0], 4)[0],
    }
    for name, each in values.items():
        each.save(tmp_path / name)
        theirs = peft.PeftModel.from_pretrained(mixed(), tmp_path / name).eval()
        with torch.no_grad():
            assert torch.allclose(theirs(IDS), wanted, atol=1e-5), name


def test_operations_without_an_exact_result_are_refused_by_name():
    grouped = LoraAdapter.from_model(peft_model("grouped"))
    with pytest.raises(
        NotImplementedError, match=r"resize_adapter: grouped: .*grouped convolution"
    ):
        resize_adapter(grouped, 2)
    with pytest.raises(NotImplementedError, match=r"adapters\[0\]: grouped: .*grouped convolution"):
        merge_adapters([grouped, grouped], [0.5, 0.5])
    assert resize_adapter(grouped, {"conv2": 2})[0].modules["grouped"] is grouped.modules["grouped"]
    whole = LoraAdapter.from_model(peft_model("whole"))
    with pytest.raises(NotImplementedError, match=r"adapters\[1\]: .*norm.weight.*modules_to_save"):
        merge_adapters([LoraAdapter.from_model(peft_model("embedding")), whole], [0.5, 0.5])
    biases = LoraAdapter.from_model(peft_model("biases"))
    with pytest.raises(NotImplementedError, match=r"adapters\[0\]: .*bias"):
        merge_adapters([biases, biases], [0.5, 0.5])


def test_resizing_and_pruning_keep_fully_trained_modules(tmp_path):
    whole = LoraAdapter.from_model(peft_model("whole"))
    assert len(whole.replacements) == 3 + 5, "expected 3 tensors of score, 2 and 3 buffers of norm"
    for value in (resize_adapter(whole, 2)[0], prune_adapter(whole, ["up"])):
        assert value.replacements == whole.replacements
        value.save(tmp_path / "out")
        assert LoraAdapter.load(tmp_path / "out") == value
    changed = dict(whole.replacements)
    changed[next(iter(changed))] = torch.zeros(1)
    assert LoraAdapter(whole.config, whole.modules, {}, changed) != whole
    assert LoraAdapter(whole.config, whole.modules) != whole


def test_initialisations_unknown_to_some_peft_versions_are_not_saved(tmp_path):
    for init in ("orthogonal", "eva", "gaussian", False):
        adapter(init_lora_weights=init, eva_config={"rho": 2.0}).save(tmp_path)
        raw = json.loads((tmp_path / "adapter_config.json").read_text())
        assert raw["init_lora_weights"] == (init if init in ("gaussian", False) else True)
        assert ("eva_config" in raw) == (init in ("gaussian", False))
    assert LoraAdapter.load(tmp_path).modules.keys() >= {Q}
