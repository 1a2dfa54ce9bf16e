"""A small language model whose adapters are layers of lora_ext or PEFT, or fused PEFT layers."""

import warnings

import peft
import torch
import transformers
from torch import nn
from torch.profiler import ProfilerActivity, profile

import lora_ext
from lora_ext.nn import LoraLinear, Swap

KINDS = ("ours", "peft", "fused")
TARGETS = ("q_proj", "down_proj")


def llama(layers: int = 3) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def operations(run) -> list[str]:
    """Return the names of all operators and kernels that ``run`` calls, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    return [e.name for e in found.events() if "profiler" not in e.name.lower()]


def adapted(kind: str, *names: str, targets: tuple[str, ...] = TARGETS, **settings) -> nn.Module:
    """Return the model with one random adapter per name, or one named "default". The first adapter
    is active. ``kind`` is one of :data:`KINDS`, and ``settings`` are fields of PEFT's config."""
    model, names = llama(), names or ("default",)
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **settings}
    if kind == "ours":
        model.requires_grad_(False)
        found = [n for n, _ in model.named_modules() if n.endswith(targets)]
        layers = {n: LoraLinear(model.get_submodule(n), names[0], **settings) for n in found}
        for layer in layers.values():
            for name in names[1:]:
                layer.add_adapter(name, **settings)
        Swap(model, dict(layers), "adapted")
        return model
    config = peft.LoraConfig(target_modules=list(targets), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config, names[0])
        for name in names[1:]:
            wrapped.add_adapter(name, config)
    wrapped.eval()
    return lora_ext.from_peft(wrapped) if kind == "fused" else wrapped
