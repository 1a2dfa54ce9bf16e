"""``attach`` and ``detach``: names in calls, default adapters, restored models, and errors."""

import copy
import inspect
import warnings
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from safetensors.torch import load_file
from tiny import CONFIGS, make_model, make_pair, make_peft, tokens
from torch import Tensor, nn
from torch.nn.utils import parametrize
from two_layers import inputs, make

import lora_ext
from lora_ext.nn import (
    MultiLoraEmbedding,
    MultiLoraLinear,
    UnknownAdapterError,
    packed_bytes,
    unpack_linears,
)


def snapshot(model: nn.Module) -> dict[str, tuple[int, list[str]]]:
    return {n: (id(m), sorted(m.__dict__)) for n, m in model.named_modules(remove_duplicate=False)}


@pytest.mark.parametrize("family", CONFIGS)
def test_detach_restores_the_same_model(family: str) -> None:
    model = make_model(family)
    objects, state = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    parameters = {name: id(p) for name, p in model.named_parameters()}
    pool = lora_ext.AdapterPool(model, max_slots=2, max_rank=8)
    assert lora_ext.attach(model, pool) is model
    for name in pool.modules:
        kind = MultiLoraEmbedding if name in pool.index.embedding else MultiLoraLinear
        assert type(model.get_submodule(name)) is kind
    assert list(model.state_dict()) == list(state)
    with torch.no_grad(), lora_ext.adapters(None):
        model(tokens(2, 4))
    assert lora_ext.detach(model) is model
    assert snapshot(model) == objects
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    lora_ext.detach(lora_ext.attach(model, pool))
    assert snapshot(model) == objects


def test_packed_bases_are_used_by_every_layer_and_removed(tmp_path: Path) -> None:
    model, _, pool = make_pair("llama", tmp_path)
    names, ids = [*CONFIGS["llama"]][:2], tokens(3, 5)
    with torch.no_grad():
        with lora_ext.adapters([*names, None]):
            expected = model(ids).logits
        objects = snapshot(lora_ext.detach(model))
        lora_ext.attach(model, pool, pack_base=True)
        linears = [m for m in objects if isinstance(model.get_submodule(m), nn.Linear)]
        assert packed_bytes(model) >= sum(model.get_submodule(m).weight.nbytes for m in linears)
        twin = copy.deepcopy(model)
        for each in (model, twin, twin):
            with lora_ext.adapters([*names, None]):
                torch.testing.assert_close(each(ids).logits, expected)
    assert packed_bytes(twin) == packed_bytes(model)
    for each in (model, twin):
        lora_ext.detach(each)
        assert packed_bytes(each) == 0
    assert snapshot(model) == objects
    assert type(model.get_submodule("lm_head")) is type(twin.get_submodule("lm_head")) is nn.Linear


def test_failed_packing_or_unpacking_changes_nothing() -> None:
    model = make_model("llama").train()
    pool = lora_ext.AdapterPool(model, max_slots=2, max_rank=8)
    plain = snapshot(model)
    with pytest.raises(ValueError, match=r"evaluation mode, found training"):
        lora_ext.attach(model, pool, pack_base=True)
    assert snapshot(model) == plain
    lora_ext.attach(model.eval(), pool, pack_base=True)
    base = model.get_submodule("lm_head").base
    parametrize.register_parametrization(base, "weight", nn.Identity())
    objects = snapshot(model)
    message = r"detach: model: 'lm_head': .* without parametrizations"
    with pytest.raises(RuntimeError, match=message):
        lora_ext.detach(model)
    assert snapshot(model) == objects
    parametrize.remove_parametrizations(base, "weight")
    lora_ext.detach(model)
    assert snapshot(model) == plain
    # A model whose layers were unpacked can be detached.
    unpack_linears(lora_ext.attach(model, pool, pack_base=True))
    assert snapshot(lora_ext.detach(model)) == plain


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpoints_of_an_attached_model_equal_the_bases(family: str, tmp_path: Path) -> None:
    plain, model = make_model(family), make_model(family)
    lora_ext.attach(model, lora_ext.AdapterPool(model, max_slots=2, max_rank=8))
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "attached")
    files = [load_file(tmp_path / d / "model.safetensors") for d in ("plain", "attached")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    again = type(plain).from_pretrained(tmp_path / "attached").eval()
    ids = tokens(2, 4)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_copy_generates_independently(tmp_path: Path) -> None:
    model, _, _ = make_pair("llama", tmp_path)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.neg_()
    how: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "adapter_names": ["green"] * 2}
    ids = tokens(2, 4)
    assert not torch.equal(
        twin.generate(input_ids=ids, **how), model.generate(input_ids=ids, **how)
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_call_accepts_names_like_peft(family: str, tmp_path: Path) -> None:
    model, reference, pool = make_pair(family, tmp_path)
    ids, names = tokens(3, 5), ["green", "__base__", "red"]
    signature = inspect.signature(type(model).forward)
    assert list(inspect.signature(model.forward).parameters) == list(signature.parameters)[1:]
    with torch.no_grad():
        got = model(ids, adapter_names=names).logits
        # The bound covers float32 roundings in two layers; logits are near 1.
        torch.testing.assert_close(
            got, reference(input_ids=ids, adapter_names=names).logits, rtol=0, atol=1e-4
        )
        with lora_ext.adapters(["green", None, "red"]):
            assert torch.equal(got, model(ids).logits)
            assert torch.equal(got, model(ids, adapter_names=names).logits)
        body = model.base_model  # The model without its head accepts names too.
        with lora_ext.adapters(names):
            expected = body(ids).last_hidden_state
        assert torch.equal(body(ids, adapter_names=names).last_hidden_state, expected)
        with pytest.raises(UnknownAdapterError, match=r"'gren' is not loaded.*green"):
            model(ids, adapter_names="gren")
        for few in (names[:1], names[:2]):
            with pytest.raises(ValueError, match="adapters: names: expected a batch of") as caught:
                model(ids, adapter_names=few)
            words = str(caught.value)
            assert "give one name for each sequence of the batch" in words and "it has 3" in words
            assert "targets=" not in words
        assert torch.equal(model(ids).logits, lora_ext.detach(model)(ids).logits)
    assert pool.stats()["pins"] == 0


@pytest.mark.slow
def test_attached_model_compiles_into_one_graph(tmp_path: Path) -> None:
    model, ids = make_pair("llama", tmp_path)[0], tokens(2, 4)
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), lora_ext.adapters(["red", None]):
        torch.testing.assert_close(whole(ids).logits, model(ids).logits)


def test_forward_of_the_instance_accepts_names_and_is_restored(tmp_path: Path) -> None:
    model = make_pair("llama", tmp_path)[0]
    pool = next(m.pool for m in model.modules() if isinstance(m, MultiLoraLinear))
    lora_ext.detach(model)
    add_hook_to_module(model, ModelHook())
    own, ids = model.__dict__["forward"], tokens(2, 4)
    lora_ext.attach(model, pool)
    for attached in (model, copy.deepcopy(model)):
        with torch.no_grad(), lora_ext.adapters(["red", None]):
            expected = attached(ids).logits
        with torch.no_grad():
            assert torch.equal(attached(ids, adapter_names=["red", None]).logits, expected)
            assert not torch.equal(attached(ids).logits, expected)
    assert lora_ext.detach(model).__dict__["forward"] is own


def test_model_offloaded_after_attach_is_detached_without_hooks(tmp_path: Path) -> None:
    model, ids = make_pair("llama", tmp_path)[0], tokens(2, 4)
    with torch.no_grad(), lora_ext.adapters(["red", None]):
        expected = model(ids).logits
        base = model(ids, adapter_names=None)
        accelerate.cpu_offload(model, execution_device="cpu")
        assert torch.equal(model(ids).logits, expected)
        with pytest.raises(RuntimeError, match="remove_hook_from_submodules"):
            lora_ext.detach(model)
        assert torch.equal(model(ids).logits, expected)
    remove_hook_from_submodules(model)
    with torch.no_grad():
        assert torch.equal(lora_ext.detach(model)(ids).logits[1], base.logits[1])


def test_exported_model_follows_the_blocks_and_a_recorded_one_raises(
    tmp_path: Path,
) -> None:
    model, _, _ = make_pair("llama", tmp_path)
    model.requires_grad_(False)
    ids = tokens(2, 4)
    with lora_ext.adapters(["red", None]):
        whole = torch.export.export(model, (ids,), {"use_cache": False}, strict=False).module()
    for names in (["red", None], ["blue", "green"], None):
        with lora_ext.adapters(names):
            expected = model(ids, use_cache=False).logits
            torch.testing.assert_close(whole(ids, use_cache=False).logits, expected)
    with pytest.raises(NotImplementedError, match=r"recorded by torch\.jit\.trace"):
        torch.jit.trace(lambda ids: model(ids, use_cache=False).logits, (ids,))


def test_embeddings_of_an_attached_model_are_resized_after_detach(tmp_path: Path) -> None:
    model, _, _ = make_pair("llama", tmp_path)
    with pytest.raises(RuntimeError, match=r"resize_token_embeddings: .* detach the model, resize"):
        model.resize_token_embeddings(101)
    lora_ext.detach(model)
    pool = lora_ext.AdapterPool(model, max_slots=2, max_rank=8, targets=["q_proj"])
    lora_ext.attach(model, pool)
    model.resize_token_embeddings(101)
    assert lora_ext.detach(model).get_input_embeddings().num_embeddings == 101


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_shared_module_is_adapted_where_peft_adapts_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(3, 8)
    shared = model.first
    reference: Any = make_peft(model, {"red": {"r": 4, "target_modules": ["first", "second"]}})
    reference.save_pretrained(tmp_path)
    pool = lora_ext.AdapterPool(model, max_slots=2, max_rank=8)
    pool.load("red", tmp_path / "red")
    lora_ext.attach(model, pool)
    with torch.no_grad(), lora_ext.adapters("red"):
        # Two float32 sums of 8 and 4 terms per layer; outputs are near 1.
        torch.testing.assert_close(model(x), reference(x), rtol=0, atol=1e-5)
        assert not torch.allclose(model(x), Shared.forward(lora_ext.detach(model), x))
    assert model.first is shared and model.second is shared


def test_failed_attach_changes_nothing() -> None:
    model = make_model("llama")
    pool = lora_ext.AdapterPool(model, max_slots=2, max_rank=8)
    with pytest.raises(RuntimeError, match=r"expected an attached model, found a .* not attached$"):
        lora_ext.detach(model)
    other = make_model("gpt2")
    before = snapshot(other)
    with pytest.raises(
        ValueError, match=r"attach: pool: .* unknown module 'model.layers.0.self_attn.q_proj'"
    ):
        lora_ext.attach(other, pool)
    small = make_model("llama")
    small.model.layers[1].mlp.down_proj = nn.Linear(48, 33)
    before_small = snapshot(small)
    message = r"layers.1.mlp.down_proj: expected in and out features \(48, 32\).*found \(48, 33\)"
    with pytest.raises(ValueError, match=message):
        lora_ext.attach(small, pool)
    assert snapshot(other) == before and snapshot(small) == before_small
    divided = make_model("llama")
    divided._tp_size = 2  # transformers sets this for tensor parallelism (tp_plan=).
    with pytest.raises(NotImplementedError, match="tp_plan has sharded across 2 processes"):
        lora_ext.attach(divided, pool)
    wrapped = peft.get_peft_model(make_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(RuntimeError, match="expected a model without adapter layers, found PeftM"):
        lora_ext.attach(wrapped, pool)
    bare = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="expected names of submodules of the model, found ''"):
        lora_ext.attach(bare, lora_ext.AdapterPool(bare))
    lora_ext.attach(model, pool)
    with pytest.raises(RuntimeError, match="expected a model that is not attached, found an att"):
        lora_ext.attach(model, pool)
    with pytest.raises(
        RuntimeError, match=r"without adapter layers, found MultiLoraEmbedding at '0\.m"
    ):
        lora_ext.attach(nn.Sequential(model), pool)


def test_model_with_more_layers_than_the_pool_or_replaced_layers_raises() -> None:
    pool = lora_ext.AdapterPool(make_model("llama"), max_slots=2, max_rank=8)
    larger = make_model("llama")
    larger.model.layers.append(copy.deepcopy(larger.model.layers[0]))
    before = snapshot(larger)
    message = (
        r"attach: pool: .* 7 modules of the model, for example 'model.layers.2.self_attn.q_proj'"
    )
    with pytest.raises(ValueError, match=message):
        lora_ext.attach(larger, pool)
    assert snapshot(larger) == before
    some = lora_ext.AdapterPool(make_model("llama"), targets=r".*layers\.[01]\..*_proj")
    lora_ext.attach(larger, some)  # A pool for selected layers is accepted.
    model = make_model("llama")
    lora_ext.attach(model, lora_ext.AdapterPool(model, max_slots=2, max_rank=8))
    layer = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = nn.Linear(32, 48)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"mlp.up_proj: expected the layer .*, found Linear"):
        lora_ext.detach(model)
    assert snapshot(model) == before
    model.model.layers[0].mlp.up_proj = layer
    lora_ext.detach(model)


def test_model_changed_after_attach_uses_its_current_weights(tmp_path: Path) -> None:
    model, reference, _ = make_pair("llama", tmp_path)
    other = make_model("llama").state_dict()
    other = {k: v + 0.01 if "down_proj" in k else v for k, v in other.items()}
    model.load_state_dict(other)
    base = reference.get_base_model()
    with torch.no_grad():
        for layer in base.model.layers:
            layer.mlp.down_proj.base_layer.weight.add_(0.01)
        names, ids = ["red", "green", "blue", "__base__"], tokens(4, 5)
        expected = reference(input_ids=ids, adapter_names=names).logits
        with lora_ext.adapters(names):
            # The bound of the mixed batch test: 100 ulp of logits near 10.
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-4)
            model.bfloat16()
            half = model(ids).logits
    assert half.dtype == torch.bfloat16 and torch.isfinite(half).all()
    # bfloat16 has 8 significant bits; a logit has 20 roundings, relative to the largest logit.
    assert (half - expected).abs().max() < 20 * 2**-9 * expected.abs().max()


@pytest.mark.parametrize("model, pool", [(None, None), (nn.Linear(2, 2), None)])
def test_attach_error_names_the_argument_of_the_wrong_type(model: Any, pool: Any) -> None:
    with pytest.raises(
        TypeError,
        match=r"attach: (model: expected a torch.nn.Module|pool: expected an AdapterPool)",
    ):
        lora_ext.attach(model, pool)
    with pytest.raises((TypeError, RuntimeError), match="detach: "):
        lora_ext.detach(model)


def test_backward_that_trains_the_base_model_warns_once(tmp_path: Path) -> None:
    model, _, _ = make_pair("llama", tmp_path)
    ids, names = tokens(2, 4), ["red", "green"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, labels=ids).loss.backward()  # allowed without adapters
        model(ids, labels=ids, adapter_names=names)  # allowed without a backward
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model.requires_grad_(False)
        model(inputs_embeds=embedded, adapter_names=names).logits.sum().backward()
        model.requires_grad_(True)
    with pytest.warns(UserWarning, match="attach: backward: expected frozen") as caught:
        model(ids, labels=ids, adapter_names=names).loss.backward()
        model(ids, labels=ids, adapter_names=names).loss.backward()
    assert len(caught) == 1


def attached(directory: Path, default: str | None) -> tuple[Any, lora_ext.AdapterPool]:
    model, _, pool = make_pair("llama", directory)
    lora_ext.detach(model)
    return lora_ext.attach(model, pool, default=default), pool


def test_default_name_applies_outside_every_block(tmp_path: Path) -> None:
    model, pool = attached(tmp_path, "green")
    ids = tokens(2, 5)
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        logits, answers = model(ids).logits, model.generate(ids, **how)
        inner = model.model(ids).last_hidden_state
        layer = model.model.layers[0].self_attn.q_proj
        part = layer(torch.ones(2, 32))
        with lora_ext.adapters("green"):
            assert torch.equal(logits, model(ids).logits)
            assert torch.equal(answers, model.generate(ids, **how))
            assert torch.equal(inner, model.model(ids).last_hidden_state)
            assert torch.equal(part, layer(torch.ones(2, 32)))
        for names in (None, "__base__", ["red", None]):
            with lora_ext.adapters(names):
                assert not torch.equal(logits, model(ids).logits)
        assert not torch.equal(logits, model(ids, adapter_names=["red", "red"]).logits)
        assert not torch.equal(logits, lora_ext.detach(model)(ids).logits)
    assert pool.stats()["pins"] == 0


def test_default_error_raises_outside_every_block(tmp_path: Path) -> None:
    model, _ = attached(tmp_path, "error")
    ids = tokens(2, 5)
    layer = model.model.layers[0].self_attn.q_proj
    for call in (model, model.model, model.generate, lambda _: layer(torch.ones(2, 32))):
        with pytest.raises(RuntimeError, match=r"default='error': expected an adapters block"):
            call(ids)
    with torch.no_grad():
        model(ids, adapter_names=["red", None])
        with lora_ext.adapters(None):
            base = model(ids).logits
        assert torch.equal(base, lora_ext.detach(model)(ids).logits)


def test_models_of_other_libraries_and_their_parts_have_defaults() -> None:
    model, x = make(), inputs(2, 3)
    pool = model.up.pool
    lora_ext.detach(model)
    own = model.forward
    with torch.no_grad():
        lora_ext.attach(model, pool, default="red")
        whole, part = model(x), model.up(x)
        with lora_ext.adapters("red"):
            assert torch.equal(whole, model(x))
            assert torch.equal(part, model.up(x))
        lora_ext.attach(lora_ext.detach(model), pool, default="error")
        for call in (model, model.up):
            with pytest.raises(RuntimeError, match="default='error'"):
                call(x)
    assert lora_ext.detach(model).forward == own


@pytest.mark.parametrize("default", ["red", "error"])
def test_compiled_model_requires_a_block(default: str) -> None:
    torch._dynamo.reset()
    model, x = make(), inputs(2, 3)
    pool = model.up.pool
    lora_ext.attach(lora_ext.detach(model), pool, default=default)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        with lora_ext.adapters("blue"):
            torch.testing.assert_close(compiled(x), model(x))
        with pytest.raises(RuntimeError, match=f"default='{default}': expected a compiled forward"):
            compiled(x)


def test_default_that_is_not_loaded_raises(tmp_path: Path) -> None:
    model, _, pool = make_pair("llama", tmp_path)
    lora_ext.detach(model)
    with pytest.raises(KeyError, match=r"default: expected None, 'error' or one of .*found 'rde'"):
        lora_ext.attach(model, pool, default="rde")
    lora_ext.attach(model, pool, default="red")
    pool.unload("red")
    with pytest.raises(KeyError, match="'red' is not loaded"):
        model(tokens(2, 5))
