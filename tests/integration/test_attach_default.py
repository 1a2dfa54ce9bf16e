"""``attach(default=...)``: who serves a call that names nobody."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_pair, tokens
from two_layers import inputs, make

import lora_ext


def attached(directory: Path, default: str | None) -> tuple[Any, lora_ext.AdapterPool]:
    model, _, pool = make_pair("llama", directory)
    lora_ext.detach(model)
    return lora_ext.attach(model, pool, default=default), pool


def test_a_name_serves_calls_outside_every_block(tmp_path: Path) -> None:
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


def test_error_refuses_calls_outside_every_block(tmp_path: Path) -> None:
    model, _ = attached(tmp_path, "error")
    ids = tokens(2, 5)
    layer = model.model.layers[0].self_attn.q_proj
    for call in (model, model.model, model.generate, lambda _: layer(torch.ones(2, 32))):
        with pytest.raises(RuntimeError, match=r"default='error': expected a block around every"):
            call(ids)
    with torch.no_grad():
        model(ids, adapter_names=["red", None])
        with lora_ext.adapters(None):
            base = model(ids).logits
        assert torch.equal(base, lora_ext.detach(model)(ids).logits)


def test_models_of_other_libraries_and_their_parts_have_defaults_too() -> None:
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
def test_a_compiled_model_asks_for_a_block(default: str) -> None:
    torch._dynamo.reset()
    model, x = make(), inputs(2, 3)
    pool = model.up.pool
    lora_ext.attach(lora_ext.detach(model), pool, default=default)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        with lora_ext.adapters("blue"):
            torch.testing.assert_close(compiled(x), model(x))
        with pytest.raises(RuntimeError, match=f"default='{default}': expected a block around a c"):
            compiled(x)


def test_a_default_that_is_not_loaded_is_refused(tmp_path: Path) -> None:
    model, _, pool = make_pair("llama", tmp_path)
    lora_ext.detach(model)
    with pytest.raises(KeyError, match=r"default: expected None, 'error' or one of .*found 'rde'"):
        lora_ext.attach(model, pool, default="rde")
    lora_ext.attach(model, pool, default="red")
    pool.unload("red")
    with pytest.raises(KeyError, match="'red' is not loaded"):
        model(tokens(2, 5))
