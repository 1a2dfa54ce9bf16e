"""A federation on a pretrained model: MiniLM with a head classifies packages by Debian section.

The base model is frozen. Clients train LoRA on the queries and values of all six blocks, and the
head, which starts at zero and is averaged like the adapter. A text is the line that describes a
package, truncated to 12 tokens. Each of 20 sections has 150 texts, 15 of them for testing.

`shares_without` divides the texts such that some clients have no text of some sections.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from federated_digits import Sizes, World
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from lora_ext.federated import partition_pathological

from . import material

CLASSES, EACH, TESTING, LENGTH = 20, 150, 15, 12
SIZES = Sizes(
    blocks=6,
    width=384,
    clients=12,
    per_round=6,
    rounds=10,
    batch=8,
    steps=3,
    testing=CLASSES * TESTING,
    least=1,
    rank=8,
    scaling=2,
)
QUICK = dataclasses.replace(SIZES, rounds=2, testing=4 * CLASSES)
EXAMPLE = dataclasses.replace(SIZES, lr=1e-2)  # learning rate of an earlier protocol


class Classifier(nn.Module):
    """Classifier of token ids ``(n, T)``, padded with 0, with logits ``(n, classes)``."""

    def __init__(self, encoder: BertModel, classes: int):
        super().__init__()
        self.embed = encoder.embeddings
        self.layers = encoder.encoder.layer
        self.head = nn.Linear(encoder.config.hidden_size, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits from the mean hidden state over the tokens of a text."""
        there = ids != 0
        mask = there[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
        h = self.embed(ids)  # (n, T, width)
        for layer in self.layers:
            h = layer(h, mask)
        weights = there.to(h.dtype)
        mean = torch.einsum("nt,ntd->nd", weights, h) / weights.sum(-1, keepdim=True)
        return self.head(mean)


@dataclass(frozen=True)
class Material:
    """Token ids ``(n, 12)``, labels ``(n,)``, base model and hash, shared by all seeds."""

    ids: Tensor
    labels: Tensor
    base: Classifier
    hash: str


@functools.cache
def load(quick: bool) -> Material:
    """Load the pretrained encoder and Debian's texts; with ``quick``, a tiny encoder and random
    tokens."""
    if quick:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = BertConfig(
                vocab_size=50,
                hidden_size=16,
                num_hidden_layers=6,
                num_attention_heads=2,
                intermediate_size=32,
            )
            encoder = BertModel(config, add_pooling_layer=False)
            labels = torch.arange(CLASSES * 60) % CLASSES
            ids = torch.randint(20, 50, (len(labels), 4))
            ids[:, 0] = labels % 20 + 20
        return _frozen(ids, labels, encoder, "quick")
    encoder, tokenizer = material.minilm()
    texts, _, found = material.sections(CLASSES, EACH)
    encoded = tokenizer(
        [text for text, _ in texts],
        padding="max_length",
        truncation=True,
        max_length=LENGTH,
        return_tensors="pt",
    )
    return _frozen(encoded["input_ids"], torch.tensor([c for _, c in texts]), encoder, found)


def _frozen(ids: Tensor, labels: Tensor, encoder: BertModel, found: str) -> Material:
    base = Classifier(encoder, CLASSES).eval().requires_grad_(False)
    return Material(ids, labels, base, found)


def make_world(seed: int, sizes: Sizes, quick: bool = False) -> World:
    """Split the texts at random, with the same number of test texts for every section."""
    own = load(quick)
    order = torch.randperm(len(own.labels), generator=torch.Generator().manual_seed(seed))
    ids, labels = own.ids[order], own.labels[order]
    test = torch.zeros(len(labels), dtype=torch.bool)
    for c in range(CLASSES):
        test[(labels == c).nonzero()[: sizes.testing // CLASSES]] = True
    # Sort test texts by length, so that batches have little padding.
    by_length = (ids[test] != 0).sum(-1).argsort(stable=True)
    testing = ids[test][by_length], labels[test][by_length]
    return World(
        seed,
        sizes,
        (ids[~test], labels[~test]),
        testing,
        own.base,
        targets=("query", "value"),
        shared=r"^head\.",
    )


def shares_without(world: World, clients: Sequence[int], absent: int, each: int) -> list[Any]:
    """Return the indices of each client's texts, of which some clients lack some sections.

    The sections are drawn by the world's seed. All clients have about equally many texts; the
    clients that are not in ``clients`` keep at least 15 % of the texts of the sections that all
    clients have.

    Args:
        clients: Clients without the absent sections.
        absent: Number of sections that these clients lack.
        each: Number of sections of every client.
    """
    labels, g = world.training[1].numpy(), np.random.default_rng([world.seed, 1])
    shared = ~np.isin(labels, g.permutation(CLASSES)[:absent])
    part = len(clients) / world.sizes.clients / (1 - absent / CLASSES)
    theirs = shared & (g.random(len(labels)) < min(part, 0.85))
    found: list[Any] = [None] * world.sizes.clients
    rest = [client for client in range(world.sizes.clients) if client not in set(clients)]
    for group, own in ((clients, theirs), (rest, ~theirs)):
        places = np.flatnonzero(own)
        parts = partition_pathological(labels[places], len(group), each, seed=world.seed)
        for client, share in zip(group, parts, strict=True):
            found[client] = places[share]
    return found
