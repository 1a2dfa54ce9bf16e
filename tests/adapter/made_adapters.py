"""Functions that make adapters with random factors, and compute their weight updates."""

import torch
import transformers

from lora_ext.adapter import LoraAdapter
from lora_ext.adapter._config import AdapterConfig

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
SHAPES = {Q: (24, 20), V: (12, 20)}  # (O, I)


def llama(layers=2, **fields):
    """Return a small transformers Llama model."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, **{"vocab_size": 64, **fields},
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def adapter(seed=0, ranks=4, shapes=SHAPES, dtype=torch.float32, scale=2.0, **fields):
    """Return an adapter with random factors. ``ranks`` is the rank of all modules, or a dict with a
    rank per module."""
    g = torch.Generator().manual_seed(seed)
    ranks = ranks if isinstance(ranks, dict) else dict.fromkeys(shapes, ranks)

    def draw(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

    common = max(ranks.values())
    raw = {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": scale * common,
        "rank_pattern": {n: r for n, r in ranks.items() if r != common},
        "alpha_pattern": {n: scale * r for n, r in ranks.items() if r != common},
        "target_modules": sorted(shapes),
        **fields,
    }
    state = {}
    for name, (out, inputs) in shapes.items():
        state[f"{name}.lora_A.weight"] = draw(ranks[name], inputs)
        state[f"{name}.lora_B.weight"] = draw(out, ranks[name])
        if fields.get("lora_bias"):
            state[f"{name}.lora_B.bias"] = draw(out)
        if fields.get("use_dora"):
            state[f"{name}.lora_magnitude_vector"] = draw(out).abs()
    return LoraAdapter.load((raw, state))


def rescaled(value, scaling):
    """Return a copy of an adapter with the same factors and the scale ``scaling``."""
    modules = {n: f._replace(scaling=scaling) for n, f in value.modules.items()}
    return value.with_modules(modules)


def delta(value, name):
    """Return ``scaling * b @ a`` in float64, or 0 if the adapter lacks the module."""
    factors = value.modules.get(name)
    if factors is None:
        return 0.0
    return factors.scaling * (factors.b.double().flatten(1) @ factors.a.double().flatten(1))


def parse(**fields):
    """Return the parsed PEFT configuration with these fields."""
    return AdapterConfig.parse({"peft_type": "LORA", **fields}, "config")
