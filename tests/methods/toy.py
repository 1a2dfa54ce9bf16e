"""Tiny random language models in float64, and drafts for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from lora_ext.methods import mtpc

FAMILIES = ("llama", "gpt2")


def make_model(family: str, vocab: int = 5, layers: int = 2, width: int = 16) -> Any:
    """Return a model with the same weights at every call, large enough that greedy tokens vary."""
    torch.manual_seed(0)
    if family == "llama":
        config = transformers.LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=vocab,
            n_embd=width,
            n_layer=layers,
            n_head=4,
            n_positions=64,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = transformers.GPT2LMHeadModel(config)
    sizes = {"embed_tokens": 60, "lm_head": 30, "wte": 20, "wpe": 200}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(sizes.get(name.split(".")[-2], 30))
    model.generation_config.pad_token_id = 0
    return model.double().eval()


def make_draft(model: Any, kind: str = "btree", noise: float = 0.3, **fields: Any) -> mtpc.Draft:
    """Return an untrained draft; ``noise`` makes its components differ."""
    fields = {"n_token": 4, "rank": 1 if kind == "ff" else 3, **fields}
    shortlist = fields.pop("shortlist", None)
    draft = mtpc.retrofit(model, mtpc.MtpcConfig(kind=kind, **fields), shortlist)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in draft.parameters():
            p += noise * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return draft


def train(draft: mtpc.Draft, ids: Tensor, steps: int, lr: float = 0.03) -> float:
    """Train the draft; return the last loss."""
    optimizer = torch.optim.Adam([p for p in draft.parameters() if p.requires_grad], lr=lr)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss, _ = draft.loss(ids)
        loss.backward()
        optimizer.step()
    return loss.item()


def prompts(batch: int, length: int = 6, vocab: int = 5) -> tuple[Tensor, Tensor]:
    """Return prompts of different lengths, padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, vocab, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 1 + (2 * row) % (length - 1)] = 0
    return ids * mask, mask
