"""A byte-level tokenizer, and a small GPT-2 with its vocabulary."""

from __future__ import annotations

from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, pre_tokenizers


def byte_tokenizer(pad: bool = True) -> Any:
    """Return a byte-level tokenizer with ``<end>`` and, if ``pad`` is true, a ``<pad>`` token."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    names = {"eos_token": "<end>"} | ({"pad_token": "<pad>"} if pad else {})
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def byte_gpt2(context: int = 256, layers: int = 2, width: int = 64) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=258,
        n_embd=width,
        n_layer=layers,
        n_head=4,
        n_positions=context,
        bos_token_id=256,
        eos_token_id=256,
    )
    return transformers.GPT2LMHeadModel(config).eval()
