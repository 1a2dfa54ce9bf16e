"""Properties of PEFT's LoRA layers after ``from_peft``, for each model family.

The tests follow PEFT's own tests of its LoRA layers. Results that may differ by a few roundings are
compared with PEFT's results in float64. Results that PEFT preserves bit for bit are compared bit
for bit.
"""

import copy
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="compares with PEFT")

from peft.helpers import rescale_adapter_scale  # noqa: E402  # only if peft is installed
from peft.utils.hotswap import hotswap_adapter  # noqa: E402
from tiny import MARKS, T5, TEXT, VOCAB, make_model, maker  # noqa: E402

import lora_ext  # noqa: E402
from lora_ext.interop.peft import report  # noqa: E402
from lora_ext.interop.peft._layers import FusedLinear  # noqa: E402

pytestmark = pytest.mark.hosts

CLOSE = 1e-11  # several hundred float64 roundings, relative to the largest entry
IDS = torch.randint(2, VOCAB, (4, 6), generator=torch.Generator().manual_seed(5))
NAMES = ["red", "__base__", "green", "red"]


_OPT = {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32}
MAKERS: dict[str, Callable[[], nn.Module]] = {
    **{family: functools.partial(make_model, family) for family in ("llama", "gpt2", "bert")},
    "opt": maker("OPT", **_OPT),
    "t5": maker("T5", "ForConditionalGeneration", **T5, **MARKS, decoder_start_token_id=0),
}
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "bert": ["query", "dense"],
    "opt": ["q_proj", "out_proj"],  # The input of fc1 has no batch dimension.
    "t5": ["q", "v", "wo"],
}
BY_NAME = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "adapter_names": NAMES}
WRITERS = ["llama", "gpt2", "opt", "t5"]  # models that can generate text
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"0": 3}, "alpha_pattern": {"1": 20}},
}

every_family = pytest.mark.parametrize("family", list(MAKERS))
every_kind = pytest.mark.parametrize("kind", list(KINDS))


def base_model(family: str) -> Any:
    torch.manual_seed(11)
    return MAKERS[family]().double().eval()


def config_of(family: str, rank: int = 4, **fields: Any) -> Any:
    settings = {"r": rank, "target_modules": TARGETS[family], "init_lora_weights": False, **fields}
    for pattern in ("rank_pattern", "alpha_pattern"):  # Keys of a pattern are indices of targets.
        found = settings.get(pattern, {})
        settings[pattern] = {TARGETS[family][int(i)]: value for i, value in found.items()}
    return peft.LoraConfig(**settings)


def theirs_of(family: str, **fields: Any) -> Any:
    """Return a model with two adapters in PEFT's layers, with random values from PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about the transposed weights of Conv1D.
        model = peft.get_peft_model(base_model(family), config_of(family, **fields), "red")
        model.add_adapter("green", config_of(family, rank=6))
    return model.double().eval()


def pair(family: str, **fields: Any) -> tuple[Any, Any]:
    theirs = theirs_of(family, **fields)
    ours = lora_ext.from_peft(copy.deepcopy(theirs))
    assert report(ours).taken and not report(ours).left
    return theirs, ours


def run(model: Any, **options: Any) -> Tensor:
    kind = getattr(model, "config", None)
    if getattr(kind, "is_encoder_decoder", False):
        options["decoder_input_ids"] = IDS.flip(1)
    return model(input_ids=IDS, **options).logits


def assert_close(found: Tensor, expected: Tensor, what: str = "") -> None:
    worst = (found - expected).abs().max().item()
    assert worst <= CLOSE * max(1.0, expected.abs().max().item()), f"{what}: {worst}"


def gradients_of(model: Any, **options: Any) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    run(model, **options).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: Any, theirs: Any, **options: Any) -> None:
    found, expected = gradients_of(ours, **options), gradients_of(theirs, **options)
    assert found.keys() == expected.keys()
    assert any(gradient.any() for gradient in expected.values())
    for name, gradient in expected.items():
        assert_close(found[name], gradient, name)


@every_kind
@every_family
def test_output_and_gradients_of_one_and_both_adapters_equal_peft(family: str, kind: str) -> None:
    theirs, ours = pair(family, **KINDS[kind])
    for names in (["red"], ["green"], ["red", "green"]):
        for model in (theirs, ours):
            model.base_model.set_adapter(names)
        assert_close(run(ours), run(theirs))
        assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@every_family
def test_new_adapter_is_bitwise_equal_to_that_of_peft(family: str, dora: bool) -> None:
    config = config_of(family, use_dora=dora, init_lora_weights=True)
    theirs = peft.get_peft_model(base_model(family), config).eval()
    expected = run(theirs)
    with theirs.disable_adapter():
        assert_close(run(theirs), expected)
    assert torch.equal(run(lora_ext.from_peft(theirs)), expected)


@every_family
def test_disabled_rescaled_and_named_adapters_equal_peft(family: str) -> None:
    theirs, ours = pair(family)
    before = run(ours)
    with theirs.disable_adapter():
        expected = run(theirs)
    with ours.disable_adapter():
        with ours.disable_adapter():
            assert torch.equal(run(ours), expected)
        assert torch.equal(run(ours), expected)
    assert torch.equal(run(ours), before)
    assert not torch.equal(before, expected)
    before = run(ours)
    with rescale_adapter_scale(ours, 0.25), rescale_adapter_scale(theirs, 0.25):
        assert_close(run(ours), run(theirs))
        assert not torch.equal(run(ours), before)
    assert torch.equal(run(ours), before)
    found = run(ours, adapter_names=NAMES)
    assert_close(found, run(theirs, adapter_names=NAMES))
    for name in ("red", "green"):
        ours.set_adapter(name)
        rows = [i for i, n in enumerate(NAMES) if n == name]
        assert_close(found[rows], run(ours)[rows])


@every_family
def test_bfloat16_autocast_is_as_exact_as_peft(family: str) -> None:
    theirs, ours = pair(family)
    exact = run(theirs)
    for model in (theirs, ours):
        model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = run(ours), run(theirs)
    assert found.dtype == expected.dtype
    off, peft_off = ((y.double() - exact).norm() / exact.norm() for y in (found, expected))
    assert off <= peft_off + 2.0**-8  # 2^-8: one more rounding of every logit


@every_kind
@every_family
def test_merging_keeps_the_output_and_unmerging_restores_it(family: str, kind: str) -> None:
    theirs, ours = pair(family, **KINDS[kind])
    apart = run(ours)
    for model in (theirs, ours):
        model.merge_adapter()
    assert torch.equal(run(ours), run(theirs))  # Both run PEFT's code on equal weights.
    assert_close(run(ours), apart)
    for model in (theirs, ours):
        model.unmerge_adapter()
    assert_close(run(ours), apart)
    merged = ours.merge_and_unload(safe_merge=True)
    assert not any(isinstance(m, FusedLinear) for m in merged.modules())
    assert_close(run(merged), apart)


@every_kind
@every_family
def test_loaded_adapters_are_bitwise_equal(family: str, kind: str, tmp_path: Path) -> None:
    _, ours = pair(family, **KINDS[kind])
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base_model(family), tmp_path / "red", "red")
    loaded.load_adapter(tmp_path / "green", "green")
    lora_ext.from_peft(loaded.double())
    for name in ("red", "green"):
        for model in (ours, loaded):
            model.set_adapter(name)
        assert torch.equal(run(loaded.eval()), run(ours))


@every_family
def test_adapters_are_added_and_deleted_as_in_peft(family: str) -> None:
    theirs, ours = pair(family)
    for model in (theirs, ours):
        torch.manual_seed(3)
        model.add_adapter("blue", config_of(family, rank=2))
        model.double().set_adapter("blue")
    assert_close(run(ours), run(theirs))
    assert_same_gradients(ours, theirs)
    for model in (theirs, ours):
        model.delete_adapter("blue")
        model.set_adapter("green")
    assert_close(run(ours), run(theirs))
    for model in (theirs, ours):
        model.add_weighted_adapter(["red", "green"], [0.3, 0.7], "both", combination_type="cat")
        model.set_adapter("both")
    assert_close(run(ours), run(theirs))
    assert_close(run(ours.unload()), run(base_model(family)))


@every_family
def test_swapped_adapter_equals_its_replacement(family: str, tmp_path: Path) -> None:
    _, ours = pair(family)
    torch.manual_seed(7)
    other = peft.get_peft_model(base_model(family), config_of(family)).double().eval()
    other.save_pretrained(tmp_path)
    hotswap_adapter(ours, tmp_path, adapter_name="red")
    ours.set_adapter("red")
    assert_close(run(ours), run(other))


def test_excluded_and_other_layers_are_not_replaced() -> None:
    config = config_of("llama", exclude_modules=r".*v_proj", layers_to_transform=[1])
    ours = lora_ext.from_peft(peft.get_peft_model(base_model("llama"), config))
    prefix = "base_model.model.model.layers.1"
    assert set(report(ours).taken) == {f"{prefix}.self_attn.q_proj", f"{prefix}.mlp.down_proj"}


def test_replicated_and_injected_layers_have_separate_adapters() -> None:
    config = config_of("llama", layer_replication=[[0, 2], [1, 2]])
    theirs = peft.get_peft_model(base_model("llama"), config).double().eval()
    ours = lora_ext.from_peft(copy.deepcopy(theirs))
    assert len(report(ours).taken) == 3 * len(TARGETS["llama"])
    for model in (ours, theirs):
        model.config.use_cache = False
    assert_close(run(ours), run(theirs))
    assert_same_gradients(ours, theirs)
    torch.manual_seed(0)
    theirs = peft.inject_adapter_in_model(config_of("llama"), base_model("llama")).double()
    ours = lora_ext.from_peft(copy.deepcopy(theirs))
    assert report(ours).taken
    assert_close(run(ours), run(theirs))
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("reentrant", [False, True], ids=["new", "reentrant"])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_gradient_checkpointing_gives_the_same_gradients(family: str, reentrant: bool) -> None:
    theirs, ours = pair(family)
    for model in (theirs, ours):
        for layer in model.modules():  # Checkpointing needs training mode, so set dropout to 0.
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
            for name in ("dropout_prob", "dropout"):
                if isinstance(getattr(layer, name, None), float):
                    setattr(layer, name, 0.0)
        model.train()
    ours.enable_input_require_grads()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", WRITERS)
def test_generation_by_name_equals_peft(family: str, beams: int) -> None:
    theirs, ours = pair(family)
    options = {**BY_NAME, "max_new_tokens": 5, "num_beams": beams, "do_sample": False}
    found = ours.generate(**options)
    assert torch.equal(found, theirs.generate(**options))
    if beams > 1:
        several = {**options, "num_return_sequences": 2}
        found = ours.generate(**several)
        assert found.shape[0] == 2 * len(NAMES)
        assert torch.equal(found, theirs.generate(**several))


@pytest.mark.parametrize("family", WRITERS)
def test_several_samples_per_prompt_with_adapter_names_raise_as_in_peft(family: str) -> None:
    theirs, ours = pair(family)
    messages = []
    for model in (theirs, ours):
        with pytest.raises(ValueError) as refused:
            model.generate(**BY_NAME, max_new_tokens=3, do_sample=True, num_return_sequences=2)
        messages.append(str(refused.value))
    assert messages[0] == messages[1]
