"""from_peft on quantised base layers, from real quantisers or an imitation of one."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from quantisers import linears, need
from tiny import VOCAB, attach_saved, make_model, only
from torch import Tensor, nn

import lora_ext
from lora_ext import ops
from lora_ext.interop.peft import report, to_peft
from lora_ext.interop.peft._layers import Fused

CONFIG = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"],
    "init_lora_weights": False,
}
LAYERS = 8  # four modules in each of two blocks


def bitsandbytes(kind: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        need("bitsandbytes")
        import bitsandbytes as bnb

        model: Any = make_model("llama")
        for parent, name, linear in linears(model):
            layer = getattr(bnb.nn, kind)(
                linear.in_features, linear.out_features, bias=linear.bias is not None, **settings
            )
            layer.load_state_dict(linear.state_dict())
            setattr(parent, name, layer.to("cpu"))
        model.is_loaded_in_4bit = kind == "Linear4bit"
        model.is_loaded_in_8bit = kind == "Linear8bitLt"
        return model

    return make


def torchao() -> nn.Module:
    need("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = make_model("llama")
    quantize_(model.model.layers, Int8WeightOnlyConfig())
    return model


def quanto() -> nn.Module:
    need("optimum.quanto")
    from optimum import quanto

    model = make_model("llama")
    quanto.quantize(model.model.layers, weights=quanto.qint8)
    quanto.freeze(model)
    return model


class Rounded(nn.Linear):
    """Layer that imitates a quantiser: integers, a scale, and a custom autograd function."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(weight)
            return (x.detach() @ weight.T).view(x.shape[:-1] + weight.shape[:1])

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
            return dy @ ctx.saved_tensors[0], None

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = linear.weight.detach().abs().max() / 127
        codes = (linear.weight / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return Rounded.Product.apply(x, self.weight.to(x.dtype) * self.scale)


def rounded() -> nn.Module:
    model = make_model("llama")
    for parent, name, linear in linears(model):
        setattr(parent, name, Rounded(linear))
    return model


BASES = {
    "bitsandbytes 8 bit": bitsandbytes("Linear8bitLt", has_fp16_weights=False),
    "bitsandbytes 8 bit with outliers": bitsandbytes(
        "Linear8bitLt", has_fp16_weights=False, threshold=6.0
    ),
    "bitsandbytes nf4": bitsandbytes("Linear4bit", quant_type="nf4", compute_dtype=torch.float32),
    "bitsandbytes fp4": bitsandbytes("Linear4bit", compute_dtype=torch.float32),
    "torchao int8": torchao,
    "quanto int8": quanto,
    "one that looks like them": rounded,
}


def pair(base: str, **fields: Any) -> tuple[Any, Any]:
    made = []
    for _ in range(2):  # Two models are made, since quanto's weights cannot be copied.
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchao warns about merging, which is not used here.
            model = peft.get_peft_model(BASES[base](), peft.LoraConfig(**CONFIG, **fields))
            model.add_adapter("other", peft.LoraConfig(**{**CONFIG, "r": 2}))
        made.append(model)
    theirs, ours = made
    return theirs, lora_ext.from_peft(ours)


def embedded(model: Any, rows: int = 4) -> Tensor:
    """Return inputs of the first layer, whose gradient uses the backward of every base layer."""
    ids = torch.randint(1, VOCAB, (rows, 6), generator=torch.Generator().manual_seed(3))
    return model.get_input_embeddings()(ids).detach().requires_grad_()


def step(model: Any, **kwargs: Any) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    x = embedded(model)
    y = model(inputs_embeds=x, **kwargs).logits
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=y.dtype)
    (y * weights).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": y.detach(), "inputs": x.grad, **grads}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check that values are equal up to rounding, since float32 sums have another order.

    An 8-bit base layer quantises its input, so two inputs that are rounded differently are 1/127
    apart.
    """
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        worst = (found[name] - value).abs().max().item()
        assert worst <= 2e-4 * max(1.0, value.abs().max().item()), f"{name}: {worst}"


@pytest.mark.parametrize("base", BASES)
def test_training_equals_peft_calls_the_base_and_uses_one_op_for_the_update(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = pair(base)
    found = report(ours)
    assert len(found.taken) == LAYERS and not found.left
    bases: list[nn.Module] = []
    updates: list[int] = []
    update = ops.lora_linear_apart

    def counted(x: Tensor, weight: Any, *rest: Any, **how: Any) -> Tensor:
        assert weight is None, "the base must compute its product"
        updates.append(1)
        return update(x, weight, *rest, **how)

    monkeypatch.setattr(ops, "lora_linear_apart", counted)
    for layer in ours.modules():
        if isinstance(layer, Fused):
            layer.base_layer.register_forward_hook(lambda module, *_: bases.append(module))
    expected = step(theirs)
    assert not updates and expected["inputs"].abs().max() > 1e-3
    assert sum("lora_" in name for name in expected) == 2 * LAYERS
    assert_close(step(ours), expected)
    assert len(updates) == len(bases) == len(set(bases)) == LAYERS


@pytest.mark.parametrize("base", BASES)
def test_names_in_training_give_the_gradients_of_separate_runs(base: str) -> None:
    _, ours = pair(base)
    ours.set_requires_grad(["default", "other"])
    names = ["other", "default", "__base__", "other"]
    together = step(ours, adapter_names=names)
    rows = {n: [i for i, each in enumerate(names) if each == n] for n in set(names)}
    for name, own in rows.items():
        alone = step(ours, adapter_names=[name] * 4)
        assert_close({name: together["logits"][own]}, {name: alone["logits"][own]})
    for name in ("default", "other"):
        assert any(f".{name}." in key and g.abs().max() > 0 for key, g in together.items())


@pytest.mark.parametrize("base", BASES)
def test_restored_copied_and_pickled_layers_have_the_right_types(base: str) -> None:
    theirs, ours = pair(base)
    names = [type(m).__qualname__ for m in theirs.modules()]
    assert [type(m).__name__ for m in ours.modules()] == [n.rpartition(".")[2] for n in names]
    fused = next(m for m in ours.modules() if isinstance(m, Fused))
    assert pickle.loads(pickle.dumps(type(fused))) is type(fused)
    if base != "quanto int8":  # Weights of quanto cannot be copied.
        assert type(copy.deepcopy(fused)) is type(fused)
    assert lora_ext.from_peft(ours) is ours and len(report(ours).taken) == LAYERS
    to_peft(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("base", BASES)
def test_pool_serves_the_same_bases(base: str, tmp_path: Path) -> None:
    theirs, _ = pair(base)
    theirs.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = BASES[base]()
    attach_saved(model, tmp_path, (".", "other"))  # The folder itself contains "default".
    with torch.no_grad():
        x = embedded(model)
        y = model(inputs_embeds=x, adapter_names=["other", ".", None, "other"]).logits
        for row, name in enumerate(["other", "default", None]):
            with only(theirs, name):
                expected = theirs(inputs_embeds=x).logits
            assert_close({str(name): y[row]}, {str(name): expected[row]})


@pytest.mark.parametrize("base", ["bitsandbytes nf4", "bitsandbytes 8 bit"])
def test_dora_over_a_quantised_base_stays_with_peft(base: str) -> None:
    theirs, ours = pair(base, use_dora=True)
    left = report(ours).left
    assert len(left) == LAYERS and all("uses DoRA on a Linear" in why for why in left.values())
    expected = step(theirs)
    found = step(ours)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_output_for_bfloat16_inputs_and_float32_adapters_is_rounded_once() -> None:
    theirs, ours = pair("one that looks like them")
    with torch.no_grad():
        for layer in (*theirs.modules(), *ours.modules()):
            if isinstance(layer, PeftLinear):
                x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
                y = layer(x.bfloat16())
                exact = layer.base_layer(x.bfloat16()).float() + (
                    layer.lora_B["default"](layer.lora_A["default"](x.bfloat16().float())) * 2
                )
                assert y.dtype == torch.bfloat16
                assert (y.float() - exact).abs().max() <= 2**-7 * exact.abs().max()


def test_model_without_a_supported_layer_raises_with_a_list() -> None:
    class Foreign(PeftLinear):
        """Layer of an unknown quantiser."""

    model = peft.get_peft_model(make_model("llama"), peft.LoraConfig(**CONFIG))
    for module in model.modules():
        if type(module) is PeftLinear:
            module.__class__ = Foreign
    with pytest.warns(
        UserWarning, match=r"8 of them \(lora_ext runs only peft.*Linear4bit.*q_proj, .*down_proj\)"
    ):
        lora_ext.from_peft(model)
