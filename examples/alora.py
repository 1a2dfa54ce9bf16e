"""Train two activated adapters (aLoRA) and use both on one text, which is computed only once.

`python examples/alora.py` takes seconds on a CPU, with a tiny random model.
"""

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

import lora_ext
from lora_ext.adapter import LoraAdapter
from lora_ext.nn import LoraConfig, layer_names, unwrap, wrap
from lora_ext.serving._continuous import adapter_requests

VOCAB, LENGTH, NEW = 64, 40, 4
ADAPTERS = {"yes": ([1, 2], 5), "no": ([1, 3], 6)}  # invocation tokens, token learned as the answer
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]


def make_model() -> Any:
    """Return a Llama of two layers with the same random weights at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def texts(count: int, tail: list[int]) -> Tensor:
    """Return random token ids ``(count, LENGTH + len(tail))`` that end with ``tail``."""
    ends = torch.tensor([tail] * count, dtype=torch.long)
    return torch.cat([torch.randint(9, VOCAB, (count, LENGTH)), ends], 1)


def train(model: Any, name: str, steps: int) -> LoraAdapter:
    """Train an adapter to answer after its invocation; earlier tokens use the base model."""
    invocation, word = ADAPTERS[name]
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=TARGETS, alora_invocation_tokens=invocation
    )
    wrap(model, config, name)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for step in range(steps):
        ids = texts(8, [*invocation, *[word] * NEW])
        labels = ids.clone()
        labels[:, :-NEW] = -100
        with lora_ext.adapters(name, input_ids=ids, pool=layer_names):
            loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (0, steps - 1):
            print(f"{name:>4}, step {step:>3}: loss {loss.item():.3f}")
    value = LoraAdapter.from_model(model, name)
    unwrap(model)
    return value


def main(steps: int = 60) -> dict[str, list[int]]:
    """Train the adapters, attach them, and generate with each; return the generated tokens by
    name."""
    model = make_model()
    trained = {name: train(model, name, steps) for name in ADAPTERS}
    pool = lora_ext.AdapterPool(model.eval(), max_slots=2, max_rank=8)
    for name, value in trained.items():
        pool.load(name, value)
    manager = lora_ext.attach(model, pool).init_continuous_batching(
        GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1),
        ContinuousBatchingConfig(page_size=8, num_blocks=64, max_batch_tokens=64),
    )
    text, answers = texts(1, [])[0].tolist(), {}
    with torch.inference_mode():
        manager.start()
    for name in (None, *ADAPTERS):
        before = adapter_requests(manager).computed
        prompt = text + (ADAPTERS[name][0] if name else [])
        request = manager.add_request(prompt, adapter_name=name)
        answers[name or "base"] = manager.get_result(request, timeout=600).generated_tokens
        count = adapter_requests(manager).computed - before
        print(f"{name or 'base':>4}: {answers[name or 'base']}, {count} tokens computed")
    manager.stop(block=True)
    return answers


if __name__ == "__main__":
    main()
