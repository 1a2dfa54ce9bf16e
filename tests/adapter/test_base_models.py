"""Warnings about adapters of another base model: one per pair of models, none for equal models."""

import os
import warnings

import peft
import pytest
from made_adapters import adapter, llama

import lora_ext
from lora_ext.adapter import interpolate_adapters, merge_adapters
from lora_ext.adapter._config import BaseModels
from lora_ext.pool import AdapterPool

OTHER = "expected adapters of one base model, found base_model_name_or_path "


def of(name, seed=0):
    return adapter(seed, base_model_name_or_path=name)


def found(call):
    """Return the warnings of a call; check that each one points to the calling file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    ours = [each for each in caught if OTHER in str(each.message)]
    assert all(each.category is UserWarning and each.filename == __file__ for each in ours)
    return [str(each.message) for each in ours]


SAME = [
    (None, "meta-llama/Llama-3-8B"),
    ("", "meta-llama/Llama-3-8B"),
    (".", "./"),
    (["a"], "b"),
    ("meta-llama/Llama-3-8B", "/data/models/llama-3-8b/"),
    ("meta-llama/Llama-3-8B", r"C:\models\Llama-3-8B"),
    ("a/b", "/home/ann/.cache/huggingface/hub/models--a--b/snapshots/0123abc"),
    ("b", "/cache/models--b/snapshots/0123abc/"),
    ("meta-llama/Llama-3-8B", "unsloth/llama-3-8b-unsloth-bnb-4bit"),
    ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B-AWQ"),
]


@pytest.mark.parametrize("names", SAME)
def test_two_names_of_one_base_model_do_not_warn(names):
    bases = BaseModels(names[0])
    assert found(lambda: bases.meet("here", names[1], 1)) == []


@pytest.mark.parametrize(
    "names",
    [("a/llama", "a/mistral"), ("a/b", "/c/models--a--c/snapshots/b"), ("q-4B", "q-4B-Instruct")],
)
def test_adapter_of_another_base_model_warns_once(names):
    bases = BaseModels()
    first, second, third = ([] for _ in range(3))
    first += found(lambda: bases.meet("here", names[0], 1))
    second += found(lambda: bases.meet("here", names[1], 1))
    third += found(lambda: bases.meet("here", names[1], 1))
    assert not first and not third and len(second) == 1
    assert second[0].startswith(f"here: {OTHER}{names[0]!r} and {names[1]!r}: ")


def test_warning_for_a_missing_folder_says_that_it_may_have_moved(tmp_path):
    old, new = str(tmp_path / "trained" / "base"), str(tmp_path / "served" / "model")
    for folder in (old, new):
        os.makedirs(folder)
    (message,) = found(lambda: BaseModels(new).meet("here", old, 1))
    assert "the results are meaningless" in message  # Both folders exist, so neither was moved.
    os.rmdir(old)
    for names in ((new, old), (old, new)):
        (message,) = found(lambda names=names: BaseModels(names[0]).meet("here", names[1], 1))
        assert f"there is no folder {old!r} here; if it was moved" in message
        assert "are meaningless" not in message


@pytest.mark.parametrize("mode", ["delta", "factors", "delta_svd"])
def test_merging_adapters_of_two_models_warns_once_per_pair(mode):
    values = [of("a/llama"), of("a/mistral", 1), of("b/mistral", 2), of(None, 3)]
    messages = found(lambda: merge_adapters(values, [0.25] * 4, mode))
    assert len(messages) == 1 and "adapters[1]: " in messages[0]
    assert "'a/llama' and 'a/mistral'" in messages[0]
    assert found(lambda: merge_adapters([values[0], values[3]], [0.5, 0.5], mode)) == []


def test_interpolating_adapters_of_two_models_warns():
    messages = found(lambda: interpolate_adapters(of("a/llama"), of("a/mistral", 1), 0.5))
    assert len(messages) == 1 and messages[0].startswith("interpolate_adapters: second: ")


def named(name=""):
    model = llama(1)
    model.config.name_or_path = model.name_or_path = name
    return model


def saved(folder, base):
    model = peft.get_peft_model(named(base), peft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(folder, save_embedding_layers=False)  # Otherwise, PEFT queries the Hub.
    return folder


def test_pool_warns_of_adapters_of_another_model_and_serves_them(tmp_path):
    one, other = saved(tmp_path / "one", "a/llama"), saved(tmp_path / "two", "a/mistral")
    model = named("a/llama")
    pool = AdapterPool(model, max_rank=8)
    assert found(lambda: pool.load("one", one)) == []
    messages = found(lambda: pool.load("other", other))
    assert len(messages) == 1 and messages[0].startswith("AdapterPool.load: source: ")
    assert "'a/llama' and 'a/mistral'" in messages[0]
    assert found(lambda: pool.prefetch({"again": other})) == [], "expected one warning per model"
    assert pool.names == ["one", "other", "again"]
    assert found(lambda: lora_ext.attach(model, pool)) == []


def test_pool_of_an_unnamed_model_compares_adapters_with_each_other_and_attached_models(
    tmp_path,
):
    one, other = saved(tmp_path / "one", "a/llama"), saved(tmp_path / "two", "a/mistral")
    pool = AdapterPool(named(), max_rank=8)
    assert found(lambda: pool.load("one", one)) == []
    assert len(found(lambda: pool.load("other", other))) == 1
    pool = AdapterPool(named(), max_rank=8)
    pool.load("one", one)
    messages = found(lambda: lora_ext.attach(named("a/gemma"), pool))
    assert len(messages) == 1 and messages[0].startswith("attach: model: ")


def test_from_peft_warns_of_an_adapter_of_another_model(tmp_path):
    one, other = saved(tmp_path / "one", "a/llama"), saved(tmp_path / "two", "a/mistral")
    model = peft.PeftModel.from_pretrained(named("b/llama"), one, adapter_name="one")
    assert found(lambda: lora_ext.from_peft(model)) == []
    model.load_adapter(other, "other")
    model.load_adapter(other, "third")
    messages = found(lambda: lora_ext.from_peft(model))
    assert len(messages) == 1 and messages[0].startswith("from_peft: adapter 'other': ")
    assert "'b/llama' and 'a/mistral'" in messages[0]


def test_adapters_created_on_the_model_do_not_warn():
    model = peft.get_peft_model(named("a/llama"), peft.LoraConfig(target_modules=["q_proj"]))
    assert found(lambda: lora_ext.from_peft(model)) == []
