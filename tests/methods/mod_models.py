"""Tiny random language models of several families, for MoD."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lora_ext.nn import decoder_layers

_SHAPE = {
    "vocab_size": 19,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_GPT2 = {"vocab_size": 19, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 64}
_OPT = {"ffn_dim": 24, "word_embed_proj_dim": 16}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _SHAPE),
    "mistral": ("Mistral", _SHAPE),
    "qwen2": ("Qwen2", _SHAPE),
    "qwen3": ("Qwen3", _SHAPE),
    "gemma2": ("Gemma2", _SHAPE | {"final_logit_softcapping": 3.0}),
    "gpt2": ("GPT2", _GPT2),
    "opt": ("OPT", _SHAPE | _OPT),
    "gpt_neox": ("GPTNeoX", _SHAPE),
    "cohere": ("Cohere", _SHAPE | {"logit_scale": 0.25}),
    "lfm2": ("Lfm2", _SHAPE | {"layer_types": ["conv", "full_attention"] * 2}),
    "granite": ("Granite", _SHAPE | {"logits_scaling": 4.0}),
}
FAMILIES = tuple(CONFIGS)
IDS = torch.randint(3, 19, (2, 7), generator=torch.Generator().manual_seed(1))


def make(family: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Return a model with the same weights at every call.

    The weights are large enough that the outputs of different layers and tokens differ.
    """
    name, shape = CONFIGS[family]
    names = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{name}Config")(**(shape | names | settings))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise)
    return model.to(dtype).eval()


def shake(model: nn.Module, amount: float = 0.3) -> None:
    """Add noise to the parameters of MoD."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mod." in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(amount * noise.to(parameter.dtype))


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def logits(model: Any, **inputs: Any) -> Tensor:
    """Return the logits of :data:`IDS`."""
    with torch.no_grad():
        return model(input_ids=IDS, **inputs).logits


def hiddens_of(model: Any, k: int) -> list[Tensor]:
    """Return the outputs of the last k blocks, recorded by separate hooks."""
    found: list[Tensor] = []
    hooks = [
        block.register_forward_hook(
            lambda _, __, out: found.append(out[0] if isinstance(out, tuple) else out)
        )
        for block in list(decoder_layers(model))[-k:]
    ]
    logits(model)
    for hook in hooks:
        hook.remove()
    return found


def explicit(model: Any, mix: str = "logit") -> Tensor:
    """Return the mixture of the last k blocks' logits, computed with the model's norms and head."""
    mixer = model.mod
    norms = [*mixer.norms, mixer.final_norm]
    normed = [n(h) for n, h in zip(norms, hiddens_of(model, mixer.config.k), strict=True)]
    cap = getattr(model.config, "final_logit_softcapping", None)
    scale = {"cohere": 0.25, "granite": 0.25}.get(model.config.model_type, 1.0)
    each = [softcapped(scale * model.get_output_embeddings()(n), cap) for n in normed]
    weights = mixer.bias.expand(*normed[0].shape[:-1], -1)
    if mixer.router is not None:
        weights = weights + normed[-1].to(mixer.router.dtype) @ mixer.router.T
    weights = weights.softmax(-1)
    if mix == "prob":
        each = [z.log_softmax(-1) + weights[..., e, None].log() for e, z in enumerate(each)]
        return torch.stack(each).logsumexp(0)
    return torch.stack([weights[..., e, None] * z for e, z in enumerate(each)]).sum(0)


def traces(model: nn.Module) -> list[Any]:
    """Return names, identities, flags, values, hooks and ``__dict__`` keys of a model's modules."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return [
        [(name, id(module), sorted(module.__dict__)) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p.tolist()) for name, p in model.named_parameters()],
        [list(getattr(m, hook)) for m in model.modules() for hook in hooks],
        [list(m._modules) for m in model.modules()],
        model.config.to_dict(),
    ]
