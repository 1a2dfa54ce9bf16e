"""Exact models: bitwise equality of decoding, prefill and batches, and detected changes of a
model."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_ext

pytestmark = pytest.mark.hosts

transformers = pytest.importorskip("transformers", reason="exact models are transformers' models")

VOCAB = 97
DTYPES = [torch.float32, torch.bfloat16]
# Heads with 10 features: rotary embeddings do not fill whole vector registers.
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 40,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "eos_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 2},
    "Qwen2": {"num_key_value_heads": 2},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 10},
    "Gemma": {"num_key_value_heads": 2, "head_dim": 10},
    "GPTNeoX": {"hidden_act": "gelu"},
    "Phi": {"hidden_act": "gelu_new", "hidden_size": 48},
    "StableLm": {"hidden_act": "quick_gelu", "num_key_value_heads": 4},
    "OPT": {"ffn_dim": 172},
}


def build(family: str = "Llama", **changes: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **FAMILIES[family], **changes})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_law(model: Any, length: int, batch: Tensor) -> None:
    """Check that logits of each row, decoded alone token by token, are bitwise equal to those of
    the batch."""
    ids = batch[:1]
    with torch.no_grad():
        together = model(batch).logits
        assert together.isfinite().all()
        for n, row in enumerate(batch):
            assert torch.equal(model(row[None]).logits[0], together[n])
        known = model(ids[:, :length], use_cache=True)
        cache, found = known.past_key_values, [known.logits[0]]
        for n in range(length, ids.shape[1]):
            step = model(ids[:, n : n + 1], past_key_values=cache, use_cache=True)
            found.append(step.logits[0])
    assert torch.equal(torch.cat(found), together[0])
    trained = model(batch).logits.detach()
    assert torch.equal(trained, together)


# --- the law --------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [33, 172, 1000, 8192])
def test_decode_prefill_and_batch_are_bitwise_equal(
    width: int, dtype: torch.dtype, threads: None
) -> None:
    model = lora_ext.exact(build(intermediate_size=width).to(dtype))
    found = []
    for count in (1, 3, 6):
        torch.set_num_threads(count)
        assert_law(model, 20, tokens(3, 26))
        with torch.no_grad():
            found.append(model(tokens(3, 26)).logits)
    assert all(torch.equal(found[0], each) for each in found[1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_and_batch_are_bitwise_equal_in_every_family(family: str, threads: None) -> None:
    for dtype in DTYPES:
        plain = build(family).to(dtype)
        with torch.no_grad():
            before = plain(tokens(3, 26)).logits
        model = lora_ext.exact(plain)
        for count in (1, 3):
            torch.set_num_threads(count)
            assert_law(model, 20, tokens(3, 26))
        with torch.no_grad():
            gap = (model(tokens(3, 26)).logits - before).abs().max()
        assert gap <= 64 * torch.finfo(dtype).eps * before.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [33, 172, 1000, 8192])
def test_torch_ops_in_exact_models_are_independent_of_the_batch(
    hidden: int, dtype: torch.dtype, threads: None
) -> None:
    """Check the norms, softmax and sums of torch, which exact models use unchanged."""
    x = 3 * torch.randn(64, hidden, generator=torch.Generator().manual_seed(1)).to(dtype)
    norms: list[Any] = [nn.RMSNorm(hidden), nn.LayerNorm(hidden)]
    norms.append(transformers.models.llama.modeling_llama.LlamaRMSNorm(hidden))
    for each in norms:
        each.to(dtype)
    functions: list[Any] = [
        *norms, lambda t: t.float().log_softmax(-1), torch.relu, lambda t: t.pow(3),
        lambda t: t.float().abs().rsqrt(), lambda t: t / 3 + t * t, lambda t: t.float().to(dtype),
    ]  # fmt: skip
    with torch.no_grad():
        for function in functions:
            torch.set_num_threads(1)
            alone = torch.cat([function(x[n : n + 1]) for n in range(64)])
            for count in (1, 3, 6):
                torch.set_num_threads(count)
                assert torch.equal(function(x), alone)
                assert torch.equal(function(x[:7]), alone[:7])


def test_gradients_equal_those_of_the_plain_model() -> None:
    wide, plain = build("Phi").double(), build("Phi")
    models = {"wide": wide, "plain": plain, "exact": lora_ext.exact(copy.deepcopy(plain))}
    found: dict[str, list[Tensor]] = {}
    for kind, model in models.items():
        model(tokens(2, 30), labels=tokens(2, 30)).loss.backward()
        found[kind] = [p.grad.double() for p in model.parameters()]
    for expected, peer, ours in zip(*found.values(), strict=True):
        error = (ours - expected).norm()
        assert error <= 2 * (peer - expected).norm() + 1e-7 * expected.norm()


def test_copy_is_exact_and_undoing_it_keeps_the_original() -> None:
    model = lora_ext.exact(build())
    twin = copy.deepcopy(model)
    lora_ext.exact(twin, enabled=False)
    assert_law(model, 20, tokens(3, 26))
    other = copy.deepcopy(model)
    lora_ext.exact(model, enabled=False)
    assert_law(other, 20, tokens(3, 26))
    for each in (model, twin):
        assert not [m for m in each.modules() if "forward" in m.__dict__ or m._forward_pre_hooks]
        assert {type(m) for m in each.modules() if isinstance(m, nn.Linear)} == {nn.Linear}


# --- errors ---------------------------------------------------------------------------------------
class Odd(nn.Module):
    """Activation module with an op that ``ops.pointwise`` cannot replace."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.erf(x)


class Mixing(nn.Module):
    """Activation module that contains a matrix product of torch."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.eye(x.shape[-1], dtype=x.dtype)


class Writing(nn.Module):
    """Activation module that calls a function with the argument ``out``."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x, out=torch.empty_like(x))


@pytest.mark.parametrize(
    ("activation", "op"),
    [(Odd(), "aten.erf.default"), (Mixing(), "aten.mm.default"), (Writing(), "sigmoid with out=")],
)
def test_op_that_depends_on_the_batch_raises_and_names_its_module(
    activation: nn.Module, op: str
) -> None:
    model = build()
    model.model.layers[1].mlp.act_fn = activation
    with pytest.raises(ValueError, match=rf"'model\.layers\.1\.mlp\.act_fn': expected .* {op}"):
        lora_ext.exact(model)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert not [m for m in model.modules() if "forward" in m.__dict__ or m._forward_pre_hooks]


def test_conv1d_of_gpt2_raises_and_leaves_the_model_unchanged() -> None:
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=40, n_layer=1, n_head=4)
    model = transformers.GPT2LMHeadModel(config).eval()
    found = r"h\.0\.attn\.c_attn': expected .* weights only in nn\.Linear and .* found a Conv1D"
    with pytest.raises(ValueError, match=found):
        lora_ext.exact(model)
    assert not [m for m in model.modules() if "forward" in m.__dict__ or m._forward_pre_hooks]


def test_model_inside_another_module_is_checked_too() -> None:
    model = build()
    model.model.layers[0].mlp.act_fn = Odd()
    outer = nn.Module()
    outer.config, outer.inner, outer.forward = model.config, model, model.forward
    with pytest.raises(ValueError, match=r"'inner\.model\.layers\.0\.mlp\.act_fn'"):
        lora_ext.exact(outer)


def test_peft_layers_raise_and_from_peft_makes_them_exact() -> None:
    peft = pytest.importorskip("peft", reason="tests layers of PEFT")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build(), config).eval()
    with pytest.raises(ValueError, match=r"q_proj': .*PEFT's Linear; call lora_ext\.from_peft"):
        lora_ext.exact(model)
    assert_law(lora_ext.exact(lora_ext.from_peft(model)), 20, tokens(3, 26))

    later = peft.get_peft_model(lora_ext.exact(build()), config).eval()
    with pytest.raises(ValueError, match=r"q_proj': .*PEFT's Linear; call lora_ext\.from_peft"):
        later(tokens(1, 3))
    assert_law(lora_ext.from_peft(later), 20, tokens(3, 26))
    for layer in later.modules():
        if hasattr(layer, "lora_dropout"):
            layer.lora_dropout["default"] = nn.Dropout(1.0)  # PEFT computes layers with p = 1.
    with pytest.raises(ValueError, match=r"expected adapters that lora_ext computes, found .* 1"):
        later(tokens(1, 3))


@pytest.mark.parametrize("dora", [False, True])
def test_wrapped_model_is_exact_in_either_order(dora: bool) -> None:
    config = lora_ext.LoraConfig(r=4, use_dora=dora)
    models = [
        lora_ext.exact(lora_ext.nn.wrap(build(), config).eval()),
        lora_ext.nn.wrap(lora_ext.exact(build()), config).eval(),
    ]
    for model in models:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
        assert_law(model, 20, tokens(3, 26))


def test_attached_model_becomes_exact_and_is_restored() -> None:
    model = build()
    with torch.no_grad():
        before = model(tokens(3, 26)).logits
    for default in (None, "error"):
        lora_ext.attach(model, lora_ext.AdapterPool(model), default=default)
        lora_ext.exact(model)
        with lora_ext.adapters(None):
            assert_law(model, 20, tokens(3, 26))
            lora_ext.exact(model, enabled=False)
            with torch.no_grad():
                assert torch.equal(model(tokens(3, 26)).logits, before)
        lora_ext.detach(model)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}


def test_exact_model_can_be_attached_and_undone_while_attached() -> None:
    model = lora_ext.exact(build())
    lora_ext.attach(model, lora_ext.AdapterPool(model))
    assert_law(model, 20, tokens(3, 26))
    lora_ext.exact(model, enabled=False)
    lora_ext.detach(model)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}


def test_model_with_another_attention_implementation_raises() -> None:
    model = lora_ext.exact(build())
    model.set_attn_implementation("eager")
    for call in (model, model.model):
        with pytest.raises(ValueError, match=r"'eager'; call model\.set_attn_implementation\('s"):
            call(tokens(1, 3))
    model.set_attn_implementation("sdpa")
    assert_law(model, 20, tokens(3, 26))


def test_attention_of_other_models_accepts_dropout_by_position() -> None:
    lora_ext.exact(build())
    module: Any = nn.Module()
    module.num_key_value_groups, module.is_causal = 1, True
    q = torch.randn(1, 2, 4, 8)
    sdpa = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]
    found, _ = sdpa(module, q, q, q, None, 0.0)
    assert torch.equal(found, sdpa(module, q, q, q, None, dropout=0.0)[0])


def test_new_head_of_an_exact_model_raises_until_made_exact() -> None:
    model = lora_ext.exact(build())
    model.resize_token_embeddings(VOCAB + 3)
    with pytest.raises(ValueError, match=r"'lm_head': .*call lora_ext\.exact\(model, enabled=Fals"):
        model(tokens(1, 3))
    lora_ext.exact(model, enabled=False).eval()
    assert_law(lora_ext.exact(model), 20, tokens(3, 26))


def test_replaced_module_of_an_exact_model_raises() -> None:
    found = (
        r"expected a module that exact has checked, found a SiLU .*call lora_ext\.exact\(model, e"
    )
    model = lora_ext.exact(build())
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.SiLU()
    for call in (model, model.model):
        with pytest.raises(ValueError, match=rf"'.*layers\.0\.mlp\.act_fn': {found}"):
            call(tokens(1, 3))
    assert_law(lora_ext.exact(lora_ext.exact(model, enabled=False)), 20, tokens(3, 26))


def test_module_of_a_copy_stays_exact_when_moved_to_the_original() -> None:
    model = lora_ext.exact(build())
    model.model.layers[0] = copy.deepcopy(model).model.layers[0]
    assert_law(model, 20, tokens(3, 26))


def test_model_attached_before_exact_can_be_detached() -> None:
    model = build()
    lora_ext.attach(model, lora_ext.AdapterPool(model))
    lora_ext.exact(model)
    lora_ext.detach(model)
    assert_law(model, 20, tokens(3, 26))
    lora_ext.exact(model, enabled=False)
    assert not [m for m in model.modules() if any("exact" in key for key in m.__dict__)]


@pytest.mark.parametrize("part", [False, True])
def test_loaded_model_does_not_count_as_exact(part: bool) -> None:
    file, model = io.BytesIO(), lora_ext.exact(build())
    torch.save(model.model if part else model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for use in (lambda: loaded(tokens(1, 3)), lambda: lora_ext.exact(loaded)):
        with pytest.raises(ValueError, match=r"_proj': .*call lora_ext\.exact\(model, enabled=F"):
            use()
    lora_ext.exact(loaded, enabled=False)
    assert not [m for m in loaded.modules() if any("exact" in key for key in m.__dict__)]
    lora_ext.exact(loaded)
    with torch.no_grad():
        assert torch.equal(
            loaded(tokens(3, 26))[0], (model.model if part else model)(tokens(3, 26))[0]
        )


def test_undoing_a_part_of_an_exact_model_raises() -> None:
    model = build()
    lora_ext.exact(lora_ext.exact(model).model)
    for _ in range(2):
        lora_ext.exact(model.model, enabled=False)
        for use in (lambda: model(tokens(1, 3)), lambda: lora_ext.exact(model)):
            with pytest.raises(ValueError, match=r"q_proj': .*call lora_ext\.exact\(model, enab"):
                use()
        lora_ext.exact(model.model)
        assert_law(model, 20, tokens(3, 26))
    lora_ext.exact(model, enabled=False)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}


def test_model_with_an_exact_part_becomes_exact() -> None:
    model = build()
    lora_ext.exact(model.model)
    assert_law(lora_ext.exact(model), 20, tokens(3, 26))
    lora_ext.exact(model.model, enabled=False)
    with pytest.raises(ValueError, match=r"q_proj': .*call lora_ext\.exact\(model, enabled=False"):
        model(tokens(1, 3))


def test_exact_model_converted_to_another_dtype_raises() -> None:
    model = lora_ext.exact(build()).double()
    with pytest.raises(RuntimeError, match=r"float32 or bfloat16, found .*float64; call lora_ext"):
        model(tokens(1, 3))
    assert_law(model.float(), 20, tokens(3, 26))


def test_exact_model_under_autocast_raises() -> None:
    model = lora_ext.exact(build())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="autocast"):
        model(tokens(1, 3))


def test_unpacking_an_exact_model_raises() -> None:
    model = lora_ext.exact(build())
    with pytest.raises(RuntimeError, match=r"unpack_linears: model: .*enabled=False\) first"):
        lora_ext.nn.unpack_linears(model)
    assert_law(model, 20, tokens(3, 26))


@pytest.mark.slow
def test_compiled_model_or_layer_raises() -> None:
    model = lora_ext.exact(build())
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"torch\.compile, autocast, or anoth"):
        compiled(tokens(1, 20))
    torch.compiler.reset()
    assert_law(model, 20, tokens(3, 26))
