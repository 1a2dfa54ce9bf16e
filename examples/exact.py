"""Compare the log-probabilities of sampler and trainer on SmolLM2, plain and exact.

Two tenants sample in one batch. Each trainer then computes the log-probabilities of its own tokens
in a separate forward. Reinforcement learning divides the two probabilities, so a difference changes
its ratios. After `lora_ext.exact(model)` the difference is zero. The example takes a minute on two
cores, without GPU or network: `python examples/exact.py` if `.[demo,tenants]` is installed.
`--bfloat16` shows the larger difference of 16 bits; it takes minutes on a processor without 16-bit
products.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from training import read_examples

import lora_ext
from lora_ext.interop.smollm2 import load_smollm2
from lora_ext.tenants import Datum, Service, Tenant

TENANTS = ("pirate", "telegram")
QUESTION = "Tell me about a small town by the sea."


def learn(tenant: Tenant, examples: list[tuple[list[int], int]]) -> None:
    """Train the tenant's adapter for one step on a few dialogues, so that it changes the model's
    outputs."""
    data: list[Datum] = []
    for tokens, prompt in examples[:4]:
        weights = [float(n >= prompt) for n in range(1, len(tokens))]
        data.append(Datum(tokens[:-1], {"target_tokens": tokens[1:], "weights": weights}))
    tenant.forward_backward(data)
    tenant.optim_step(lr=5e-3).result()


def gaps(service: Service, tokenizer: Any, length: int, rows: int) -> list[float]:
    """Return by how many nats sampler and trainer differ in the log-probability of each token."""
    messages = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    prompt = list(ids)
    tenants = [service.create(rank=8 * (n + 1), seed=n) for n in range(len(TENANTS))]
    for tenant, name in zip(tenants, TENANTS, strict=True):
        learn(tenant, read_examples(tokenizer, name))
    waiting = [tenant.sampler().begin(prompt, length, rows, seed=1) for tenant in tenants]
    found: list[float] = []
    for tenant, futures in zip(tenants, waiting, strict=True):
        samples = [future.result() for future in futures]
        texts = [prompt + sample.tokens for sample in samples]
        data = [Datum(text[:-1], {"target_tokens": text[1:]}) for text in texts]
        trained = tenant.forward(data).result().logprobs
        for sample, logprobs in zip(samples, trained, strict=True):
            own = logprobs[len(prompt) - 1 :]
            found += (own - torch.tensor(sample.logprobs)).abs().tolist()
    return found


def main(
    length: int = 32,
    rows: int = 4,
    layers: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Return the largest difference in nats, for the plain and for the exact model."""
    largest: dict[str, float] = {}
    for way in ("plain", "exact"):
        model, tokenizer = load_smollm2()
        if layers is not None:
            del model.model.layers[layers:]
        model = model.to(dtype)
        if way == "exact":
            lora_ext.exact(model)
        with Service(model) as service:
            found = gaps(service, tokenizer, length, rows)
        largest[way] = max(found)
        print(f"{way}: {len(found)} sampled tokens, at most {max(found):.2g} nats apart")
    return largest


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two layers and a few tokens")
    parser.add_argument("--bfloat16", action="store_true", help="use the model in bfloat16")
    args = parser.parse_args()
    sizes: dict[str, Any] = {"length": 4, "rows": 2, "layers": 2} if args.quick else {}
    main(**sizes, dtype=torch.bfloat16 if args.bfloat16 else torch.float32)
