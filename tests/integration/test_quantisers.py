"""The quantisers of docs/works_with.md as base layers of pools, of from_peft and of wrap."""

import contextlib
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.import_utils import is_eetq_available
from peft.tuners.lora import LoraLayer as PeftLayer
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from quantisers import NOT_IN_PEFT, TARGETS, ZOO, Codes, codes, plain
from tiny import VOCAB, attach_saved, only
from torch import Tensor, nn

import lora_ext
from lora_ext.interop.peft import report
from lora_ext.layers import LoraLinear
from lora_ext.rows import PoolLayer

RANKS = {"one": 4, "two": 3}
JITTER, DRAWS = 3e-7, 8
in_peft = pytest.mark.parametrize("base", [base for base in ZOO if base not in NOT_IN_PEFT])
in_all = pytest.mark.parametrize("base", ZOO)


def made(base: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ZOO[base]().eval()


def with_peft(base: str) -> Any:
    model, settings = made(base), {"target_modules": TARGETS, "init_lora_weights": False}
    if base.endswith(", compressed"):
        model(ids_of())  # PEFT bypasses the hook that turns the integers into float weights
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao warns about merging, which is not used here
        configs = {n: peft.LoraConfig(r=r, lora_alpha=8, **settings) for n, r in RANKS.items()}
        theirs = peft.get_peft_model(model, configs["one"], adapter_name="one")
        theirs.add_adapter("two", configs["two"])
    return theirs.eval()


def saved(folder: Path) -> Path:
    """Save adapters that PEFT creates for the unquantised model, and return their folder."""
    ZOO["plain"] = plain
    try:
        with_peft("plain").save_pretrained(folder)
    finally:
        del ZOO["plain"]
    return folder


def ids_of(rows: int = 3) -> Tensor:
    return torch.randint(1, VOCAB, (rows, 6), generator=torch.Generator().manual_seed(3))


def factors_of(layer: Any, name: str) -> tuple[Tensor, Tensor, float]:
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


def assert_formula(y: Tensor, base: Tensor, x: Tensor, factors: Any) -> None:
    """Check one adapter's rows: base product plus update, within the error of float32 sums."""
    a, b, scale = factors
    a, b, x, base = a.double(), b.double(), x.double(), base.double()
    exact = base + scale * (x @ a.T @ b.T)
    terms = x.shape[-1] + a.shape[0] + 2
    most = scale * (x.abs() @ a.abs().T @ b.abs().T) * terms + 2 * base.abs()
    error = (y.double() - exact).abs()
    assert bool((error <= torch.finfo(torch.float32).eps * most).all()), error.max().item()


@contextlib.contextmanager
def jitter(model: nn.Module, seed: int) -> Iterator[None]:
    """Multiply the input of each adapted layer by 1 + 3e-7 times a normal number."""
    draw = torch.Generator().manual_seed(seed)

    def moved(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        noise = torch.randn(args[0].shape, generator=draw, dtype=args[0].dtype)
        return args[0] * (1 + JITTER * noise), *args[1:]

    layers = [m for m in model.modules() if isinstance(m, PeftLayer)]
    hooks = [layer.register_forward_pre_hook(moved) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def moves(theirs: Any, run: Any, expected: Tensor) -> float:
    """Return twice the largest change of PEFT's result by the jitter, in a few draws."""
    found = 0.0
    for seed in range(DRAWS):
        with jitter(theirs, seed):
            found = max(found, (run(theirs) - expected).abs().max().item())
    return 2 * found  # A few draws do not find the largest possible change.


@in_all
def test_pool_adds_the_formula_to_each_layer(base: str, tmp_path: Path) -> None:
    folder, model = saved(tmp_path), made(base)
    theirs = peft.PeftModel.from_pretrained(plain(), folder / "one", "one")
    theirs.load_adapter(folder / "two", "two")
    adapters = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules()}
    attach_saved(model, folder, RANKS)
    names = ["two", None, "one"]
    with torch.no_grad():
        model(ids_of(), adapter_names=names)  # compressed-tensors decompresses its weights
        layers = [
            m for m in model.modules() if isinstance(m, PoolLayer) and m.slab.a_pages is not None
        ]
        assert len(layers) == 2 * len(TARGETS)
        for layer in layers:
            x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
            with lora_ext.adapters(names, pool=layer.pool):
                y, plain_y = layer(x), layer.base(x)
            assert torch.equal(y[1], plain_y[1])
            for row, name in ((0, "two"), (2, "one")):
                assert_formula(y[row], plain_y[row], x[row], factors_of(adapters[layer.name], name))


@in_peft
def test_pool_equals_peft(base: str, tmp_path: Path) -> None:
    theirs = with_peft(base)
    theirs.save_pretrained(tmp_path)
    attach_saved(model := made(base), tmp_path, RANKS)
    with torch.no_grad():
        y = model(ids_of(), adapter_names=["two", None, "one"]).logits
        for row, name in enumerate(["two", None, "one"]):
            with only(theirs, name):
                expected = theirs(ids_of()).logits[row]
                bound = moves(theirs, lambda m, row=row: m(ids_of()).logits[row], expected)
                assert (y[row] - expected).abs().max() <= bound


def gradients(model: Any, **how: Any) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    x = model.get_input_embeddings()(ids_of()).detach().requires_grad_()
    y = model(inputs_embeds=x, **how).logits
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    (y * weights).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": y.detach(), "inputs": x.grad, **found}


@in_peft
def test_from_peft_equals_peft_in_training(base: str) -> None:
    theirs, ours = with_peft(base), lora_ext.from_peft(with_peft(base))
    assert len(report(ours).taken) == 2 * len(TARGETS) and not report(ours).left
    expected, found = gradients(theirs.train()), gradients(ours.train())
    # A base layer that rounds its input may pass no gradient to the layers below.
    layers = 1 if "dynamic" in base or "fp8" in base else 2 * len(TARGETS)
    assert found.keys() == expected.keys() and sum("lora_" in n for n in found) >= 2 * layers
    bounds = dict.fromkeys(expected, 0.0)
    for seed in range(DRAWS):
        with jitter(theirs, seed):
            for name, value in gradients(theirs).items():
                moved = (value - expected[name]).abs().max().item()
                bounds[name] = max(bounds[name], moved)
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 2 * bounds[name], name


@in_peft
def test_names_in_training_give_the_formula_in_each_layer(base: str) -> None:
    ours = lora_ext.from_peft(with_peft(base)).train()
    ours.set_requires_grad(["one", "two"])
    names = ["two", "__base__", "one"]
    grads = gradients(ours, adapter_names=names)
    for name in RANKS:
        assert any(f".{name}." in key and bool(g.any()) for key, g in grads.items())
    for layer in (m for m in ours.modules() if isinstance(m, PeftLayer)):
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
        y, plain_y = layer(x, adapter_names=names), layer.base_layer(x)
        assert torch.equal(y[1], plain_y[1])
        for row in (0, 2):
            assert_formula(y[row], plain_y[row], x[row], factors_of(layer, names[row]))


@in_all
def test_wrap_adds_the_formula_to_each_layer(base: str) -> None:
    model = made(base)
    with torch.no_grad():
        model(ids_of())
    config = lora_ext.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    lora_ext.nn.wrap(model, config, "one")
    layers = [m for m in model.modules() if isinstance(m, LoraLinear)]
    assert len(layers) == 2 * len(TARGETS)
    assert all(layer.lora_A["one"].weight.dtype == torch.float32 for layer in layers)
    model.train()
    model(ids_of()).logits.sum().backward()
    assert any(layer.lora_A["one"].weight.grad is not None for layer in layers)
    for layer in layers:
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
        factors = factors_of(layer, "one")
        assert_formula(layer(x), layer.base_layer(x), x, factors)


# Layers of PEFT that take no adapter_names; the packages of some have no version for CPUs


def eetq_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return PEFT's class for EETQ, which exists only if a package of this name is found."""
    fake: Any = types.ModuleType("eetq")
    fake.EetqLinear, fake.__spec__ = Codes, importlib.machinery.ModuleSpec("eetq", None)
    monkeypatch.setitem(sys.modules, "eetq", fake)
    is_eetq_available.cache_clear()
    name = "peft.tuners.lora.eetq"
    spec: Any = importlib.util.find_spec(name)
    monkeypatch.setitem(sys.modules, name, module := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    is_eetq_available.cache_clear()
    return module.EetqLoraLinear


@pytest.mark.parametrize("kind", [GPTQLoraLinear, AwqLoraLinear, AqlmLoraLinear, eetq_class])
def test_layers_without_names_in_peft_get_them(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = kind(monkeypatch) if kind is eetq_class else kind
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 8, "config": peft.LoraConfig(init_lora_weights=False)}
    layer: Any = kind(Codes(nn.Linear(24, 12, bias=False)), "one", **config)
    layer.update_layer("two", 3, lora_alpha=8, config=config["config"])
    layer.set_adapter(["one", "two"])
    model = lora_ext.from_peft(nn.ModuleDict({"layer": layer}))
    assert report(model).taken == ("layer",) and type(layer).__name__ == kind.__name__
    x = torch.randn(3, 24)
    y = layer(x, adapter_names=["two", "__base__", "one"])
    plain_y = layer.base_layer(x)
    assert torch.equal(y[1], plain_y[1])
    assert_formula(y[0], plain_y[0], x[0], factors_of(layer, "two"))
    assert_formula(y[2], plain_y[2], x[2], factors_of(layer, "one"))
    with pytest.raises(
        ValueError, match=rf"adapter_names: .*'one'.*{kind.__name__} takes no names"
    ):
        layer(x, adapter_names=["one"])
    layer.enable_adapters(False)
    assert torch.equal(layer(x, adapter_names=["one"] * 3), plain_y)


# -------------------------------------------------------------------------------------------------
# Refusals, dtypes, and the order of quantising and attaching


def test_pages_have_the_dtype_of_the_activations() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        model = codes()
        model.model.embed_tokens.to(dtype)
        pool = lora_ext.AdapterPool(model, max_slots=2, max_rank=8, targets=["q_proj"])
        assert {spec.dtype for spec in pool.index.specs.values()} == {dtype}


def test_module_that_is_no_base_layer_is_refused_with_its_class(tmp_path: Path) -> None:
    class QuantLinear(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = plain()
    model.model.layers[0].self_attn.q_proj = QuantLinear()
    pool = lora_ext.AdapterPool(model, max_slots=2, max_rank=8)
    expected = r"in_features and out_features, found .*layers.0.self_attn.q_proj, a QuantLinear"
    with pytest.raises(NotImplementedError, match=expected):
        pool.load("one", saved(tmp_path) / "one")
    config = lora_ext.LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj: .*found a QuantLinear"):
        lora_ext.nn.wrap(model, config)


@pytest.mark.parametrize(
    "base", ["bitsandbytes nf4", "bitsandbytes int8", "torchao int8", "quanto int8", "HQQ int4",
             "gptqmodel GPTQ int4"],
)  # fmt: skip
def test_dora_reads_the_weight_of_a_quantised_layer_once(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = lora_ext.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    trained = lora_ext.nn.wrap(made(base), config, "one")
    draw = torch.Generator().manual_seed(2)
    state: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, p in trained.named_parameters():
            if ".one." in name:
                p.mul_(1 + 0.1 * torch.rand(p.shape, generator=draw))
                p.add_(0.01 * torch.randn(p.shape, generator=draw))
                state[name] = p.detach().clone()
        expected = trained(ids_of()).logits
    layer = next(m for m in trained.modules() if isinstance(m, LoraLinear))
    x = torch.randn(5, layer.in_features, generator=draw)
    a, b, scale = factors_of(layer, "one")
    eye = torch.eye(layer.in_features)
    with torch.no_grad():
        weight = layer.base_layer(eye).T.double() + scale * (b @ a).double()
        magnitude = layer.lora_magnitude_vector["one"].weight.double()
        formula = (
            magnitude
            / weight.norm(dim=1)
            * (layer.base_layer(x).double() + scale * (x.double() @ a.double().T @ b.double().T))
        )
        most = formula.abs().max().item()
        assert (layer(x).double() - formula).abs().max() <= 1e-4 * most
    model = made(base)
    pool = lora_ext.AdapterPool(model, max_slots=2, max_rank=8)
    pool.load("one", (lora_ext.LoraConfig(**vars(config)), state))
    lora_ext.attach(model, pool, "one")
    with torch.no_grad():
        first = model(ids_of()).logits
        monkeypatch.setattr(lora_ext.layers.base._dense, "_dequantised", None)
        assert torch.equal(model(ids_of()).logits, first)
    assert (first - expected).abs().max() <= 2e-3 * expected.abs().max()
    with pytest.raises(ValueError, match=r"^merge: base_layer: expected a plain weight, found a"):
        layer.merge()


def test_dora_without_a_weight_is_refused_by_layer() -> None:
    config = lora_ext.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(
        ValueError, match=r"layers.0.self_attn.q_proj: .*found Codes with no weight"
    ):
        lora_ext.nn.wrap(codes(), config)


@pytest.mark.parametrize("base", ["bitsandbytes nf4", "integers without a weight"])
def test_packing_over_a_quantised_base_warns_of_the_layers_left(base: str) -> None:
    model = made(base)
    kind = type(model.model.layers[0].mlp.up_proj).__name__
    left = rf"14 quantised layers such as 'model.layers.0.self_attn.q_proj', a {kind}"
    assert not (found := lora_ext.nn.packing(model)).fits and left.partition(" such")[0] in str(
        found
    )
    pool = lora_ext.AdapterPool(model, max_slots=2, max_rank=8)
    with pytest.warns(UserWarning, match=rf"{left}, which are not packed; packed: 1.*'lm_head'"):
        lora_ext.attach(model, pool, pack_base=True)
    lora_ext.detach(model)
    del model.lm_head
    with pytest.raises(ValueError, match=f"plain linear layers, found only {left}"):
        lora_ext.nn.pack_linears(model)


@pytest.mark.parametrize("base", ["torchao int8", "compressed-tensors int8"])
def test_packing_refuses_plain_layers_of_a_quantiser_by_name(base: str) -> None:
    with pytest.raises(
        ValueError, match=r"^pack_linears: model: 'model.layers.0.self_attn.q_proj'"
    ):
        lora_ext.nn.pack_linears(made(base))


def test_quantising_after_attach_works_with_torchao_and_warns_with_torch_ao(tmp_path: Path) -> None:
    folder, model = saved(tmp_path), plain()
    attach_saved(model, folder, RANKS)
    with pytest.warns(UserWarning, match=r"^attach: model: .*quantised before attach"):
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    quantised = made("torchao int8")  # skips without torchao
    attach_saved(quantised, folder, RANKS)
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def attached(module: nn.Module, _: str) -> bool:
        return isinstance(module, lora_ext.nn.MultiLoraLinear)

    quantize_(model.model.layers, Int8WeightOnlyConfig(), filter_fn=attached)
    names = ["two", None, "one"]
    with torch.no_grad():
        y = model(ids_of(), adapter_names=names).logits
        assert torch.equal(y, quantised(ids_of(), adapter_names=names).logits)
    lora_ext.detach(model)
    assert model.state_dict().keys() == plain().state_dict().keys()
