"""Encoding of the HashHop and HashChain tasks with one id per hash, and a small model that learns
these tasks on a CPU in a minute."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ext._checks import require
from lora_ext.layers import IGNORE

from .tasks import HashInstance


def encode_symbols(instance: HashInstance, vocab: int) -> dict[str, Any]:
    """Encode an instance: each hash becomes a distinct random id in ``0 .. vocab - 1``.

    The ids depend only on the instance's prompt, so equal instances have equal encodings.

    Args:
        instance: instance of HashHop or HashChain, with E edges.
        vocab: number of ids to choose from.

    Returns:
        Dictionary of ``keys`` and ``values``, tensors ``(E,)`` int64 in the order of the edges, and
        the ints ``start``, ``target`` and ``aux``. ``aux`` is the number of hops (0 for HashChain).

    Raises:
        ValueError: If the instance has more than ``vocab`` hashes.
    """
    hashes = list(dict.fromkeys(name for edge in instance.edges for name in edge))
    expected = f"at least {len(hashes)}, the number of hashes of the instance"
    require(len(hashes) <= vocab, "encode_symbols", "vocab", expected, vocab)
    drawn = random.Random(instance.prompt).sample(range(vocab), len(hashes))
    ids = dict(zip(hashes, drawn, strict=True))
    return {
        "keys": torch.tensor([ids[key] for key, _ in instance.edges]),
        "values": torch.tensor([ids[value] for _, value in instance.edges]),
        "start": ids[instance.start],
        "aux": instance.hops or 0,
        "target": ids[instance.target],
    }


def collate_symbols(instances: Sequence[HashInstance], vocab: int) -> dict[str, Tensor]:
    """Encode a batch for :class:`SymbolModel`.

    Args:
        instances: B instances of one task, with at most E edges.
        vocab: number of ids to choose from.

    Returns:
        Dictionary of int64 tensors: ``keys`` and ``values`` ``(B, E)``, padded with ``IGNORE``;
        ``start``, ``aux`` and ``target`` ``(B,)``.
    """
    rows = [encode_symbols(instance, vocab) for instance in instances]
    batch = {
        name: nn.utils.rnn.pad_sequence([row[name] for row in rows], True, IGNORE)
        for name in ("keys", "values")
    }
    numbers = {n: torch.tensor([row[n] for row in rows]) for n in ("start", "aux", "target")}
    return batch | numbers


class SymbolModel(nn.Module):
    """Small transformer that answers encoded instances, with one position per edge.

    The embedding of an edge is the sum of the embeddings of its key and its value. The last
    position contains the question: the sum of the embeddings of the start (as a key), of "no
    value", and of the number of hops (``aux``). The logits are computed from this position. All
    positions attend to each other. There are no position embeddings, since the order of the edges
    has no meaning. Shapes: B instances, E edges.

    Args:
        vocab: number of hash ids.
        max_aux: largest value of ``aux``.
        width: number of features of the hidden state; the MLPs are four times as wide.
        layers: number of blocks.
        heads: number of attention heads per block.
    """

    def __init__(
        self, vocab: int = 32, max_aux: int = 15, width: int = 64, layers: int = 4, heads: int = 4
    ):
        super().__init__()
        self.vocab = vocab
        self.keys = nn.Embedding(vocab, width)
        self.values = nn.Embedding(vocab + 1, width)  # The last embedding is "no value".
        self.aux = nn.Embedding(max_aux + 1, width)
        self.h = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(
        self, keys: Tensor, values: Tensor, start: Tensor, aux: Tensor, target: Tensor | None = None
    ) -> Tensor:
        """Compute the logits of the answers to a batch of :func:`collate_symbols`.

        Args:
            keys, values: edges, ``(B, E)`` int64.
            start, aux: start and number of hops of each question, ``(B,)`` int64.
            target: not used; it is accepted so that a batch can be passed unchanged.

        Returns:
            Logits ``(B, vocab)``.
        """
        real = F.pad(keys != IGNORE, (0, 1), value=True)  # (B, E + 1)
        edges = self.keys(keys.clamp(min=0)) + self.values(values.clamp(min=0))  # (B, E, D)
        question = self.keys(start) + self.values.weight[-1] + self.aux(aux)  # (B, D)
        x = torch.cat([edges, question[:, None]], dim=1)  # (B, E + 1, D)
        for block in self.h:
            x = block(x, real[:, None, None])
        return self.head(self.ln_f(x[:, -1]))


class _Block(nn.Module):
    """Pre-norm transformer block, with the module names of GPT-2."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = _Attention(width, heads)
        c_fc, c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=c_fc, gelu=nn.GELU(), c_proj=c_proj))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.c_attn(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)  # (B, heads, E + 1, D / heads)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.c_proj(mixed.transpose(1, 2).reshape(batch, length, width))
