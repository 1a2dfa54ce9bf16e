"""A small model over the base layers of each quantiser that runs on the CPU."""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import MARKS, TEXT, maker
from torch import Tensor, nn

WIDTH = 128  # groups of 32, 64 and 128 inputs fit
SMALL = maker("Llama", **{**TEXT, **MARKS, "hidden_size": WIDTH, "intermediate_size": 256})
TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]


def need(package: str) -> None:
    """Skip the test if a package is missing; fail instead if tools/lowest_check.py runs it."""
    try:
        found = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        assert "LORA_EXT_QUANTISERS" not in os.environ, f"{package} is not installed"
        pytest.skip(f"{package} is not installed")


def plain() -> Any:
    """Return the model before it is quantised, with the same weights at every call."""
    torch.manual_seed(0)
    model = SMALL().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(10 if "embed" in name else 3)
    return model


def linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    return [
        (parent, name, child)
        for path, parent in model.named_modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and "layers." in path
    ]


def replaced(new: Callable[[nn.Linear], nn.Module]) -> Any:
    model = plain()
    for parent, name, linear in linears(model):
        setattr(parent, name, new(linear))
    return model


class Codes(nn.Module):
    """Quantised layer without a ``weight``: integers and one scale per output."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.codes.to(x.dtype) * self.scale.to(x.dtype)).T


def codes() -> nn.Module:
    return replaced(Codes)


def bitsandbytes(kind: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        need("bitsandbytes")
        import bitsandbytes as bnb

        def new(linear: nn.Linear) -> nn.Module:
            sizes = linear.in_features, linear.out_features
            layer = getattr(bnb.nn, kind)(*sizes, bias=linear.bias is not None, **settings)
            layer.load_state_dict(linear.state_dict())
            return layer.to("cpu")

        model = replaced(new)
        model.is_loaded_in_4bit = kind == "Linear4bit"
        model.is_loaded_in_8bit = kind == "Linear8bitLt"
        return model

    return make


def torchao(kind: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        need("torchao")
        from torchao import quantization

        model = plain()
        quantization.quantize_(model.model.layers, getattr(quantization, kind)(**settings))
        return model

    return make


def quanto(weights: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        need("optimum.quanto")
        from optimum import quanto

        model = plain()
        quanto.quantize(model.model.layers, weights=getattr(quanto, weights))
        quanto.freeze(model)
        return model

    return make


def hqq() -> nn.Module:
    need("hqq")
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64)
    given = {"compute_dtype": torch.float32, "device": "cpu"}
    return replaced(lambda linear: HQQLinear(linear, dict(config), **given))


def gptqmodel(method: str) -> Callable[[], nn.Module]:
    """Return a function that creates a model with gptqmodel's layers. Their codes are random, since
    real quantisation needs calibration data."""

    def make() -> nn.Module:
        need("gptqmodel")
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear
        from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

        def new(linear: nn.Linear) -> nn.Module:
            kind = TorchLinear if method == "gptq" else AwqTorchLinear
            layer: Any = kind(
                bits=4, group_size=32, sym=True, desc_act=False, bias=False, register_buffers=True,
                in_features=linear.in_features, out_features=linear.out_features,
            )  # fmt: skip
            draw = torch.Generator().manual_seed(linear.weight.numel())
            for name, buffer in layer.named_buffers():
                if name == "scales":
                    buffer.copy_(torch.rand(buffer.shape, generator=draw) * 0.02 + 0.01)
                elif name == "qweight":
                    buffer.copy_(torch.randint(0, 2**31, buffer.shape, generator=draw))
                elif name == "qzeros":
                    buffer.fill_(0x77777777)
            layer.optimized = True  # otherwise post_init calls torch.compile
            layer.post_init()
            return layer.eval()

        return replaced(new)

    return make


def compressed(scheme: str, packed: bool) -> Callable[[], nn.Module]:
    """Return a function that creates a model of compressed-tensors: if ``packed``, with integers
    that the first forward converts to float weights, else with float weights that each forward
    rounds."""

    def make() -> nn.Module:
        need("compressed_tensors")
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import (
            QuantizationConfig,
            QuantizationStatus,
            apply_quantization_config,
        )

        model = plain()
        config = QuantizationConfig(config_groups={scheme: ["Linear"]}, ignore=["lm_head"])
        apply_quantization_config(model, config)
        largest = 7 if "W4" in scheme else 448 if "FP8" in scheme else 127
        for _, _, layer in linears(model):
            weight, scale = layer.weight.detach(), layer.weight_scale
            groups = scale.shape[1] if scale.dim() > 1 else 1
            most = weight.unflatten(1, (groups, -1)).abs().amax(2)
            scale.data.copy_((most / largest).reshape(scale.shape))
            layer.quantization_status = QuantizationStatus.FROZEN
        if packed:
            ModelCompressor.from_pretrained_model(model).compress_model(model)
        return model

    return make


def dynamic() -> nn.Module:
    model = plain()
    torch.ao.quantization.quantize_dynamic(model.model.layers, {nn.Linear}, inplace=True)
    return model


BNB8 = {"kind": "Linear8bitLt", "has_fp16_weights": False}
INTX = {"kind": "IntxWeightOnlyConfig"}
ZOO: dict[str, Callable[[], nn.Module]] = {
    "bitsandbytes int8": bitsandbytes(**BNB8),
    "bitsandbytes int8 with outliers": bitsandbytes(**BNB8, threshold=6.0),
    "bitsandbytes nf4": bitsandbytes("Linear4bit", quant_type="nf4", compute_dtype=torch.float32),
    "bitsandbytes fp4": bitsandbytes("Linear4bit", compute_dtype=torch.float32),
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao int8 dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao intx int4": torchao(**INTX, weight_dtype=torch.int4),
    "torchao intx int8 dynamic": torchao("Int8DynamicActivationIntxWeightConfig"),
    "torchao float8": torchao("Float8WeightOnlyConfig"),
    "quanto int8": quanto("qint8"),
    "quanto int4": quanto("qint4"),
    "quanto float8": quanto("qfloat8"),
    "gptqmodel GPTQ int4": gptqmodel("gptq"),
    "gptqmodel AWQ int4": gptqmodel("awq"),
    "HQQ int4": hqq,
    "compressed-tensors int8": compressed("W8A16", False),
    "compressed-tensors int8, compressed": compressed("W8A16", True),
    "compressed-tensors int8 dynamic": compressed("W8A8", False),
    "compressed-tensors int4": compressed("W4A16", False),
    "compressed-tensors int4, compressed": compressed("W4A16", True),
    "compressed-tensors fp8": compressed("FP8_DYNAMIC", False),
    "compressed-tensors fp8, compressed": compressed("FP8_DYNAMIC", True),
    "torch.ao dynamic": dynamic,
    "integers without a weight": codes,
}
#: PEFT refuses these layers, so the formula is the only comparison.
NOT_IN_PEFT = ("torch.ao dynamic", "integers without a weight")
