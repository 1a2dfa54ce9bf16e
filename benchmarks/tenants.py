"""Time eight tenants in one service, one tenant alone, and eight PEFT adapters in turn.

`python benchmarks/tenants.py [--tiny] [--check]`: SmolLM2 (or a tiny Llama), float32, one thread.
All three make the same steps of forward, backward and AdamW on the same data, interleaved. The
result is the median of the ratios within a round, since a busy machine affects both sides of such a
ratio alike.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor

from lora_ext.interop.smollm2 import load_smollm2
from lora_ext.tenants import Datum, Service

RANKS = (4, 8, 16, 32, 4, 8, 16, 32)
#: By tokens per tenant: upper bound of the time of eight tenants over one, and lower bound of the
#: time of PEFT in turn over eight tenants.
TARGETS = {16: (8.0, 2.5), 128: (8.0, 1.4)}


def tiny() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=97, num_attention_heads=4, num_key_value_heads=2, **sizes)
    return LlamaForCausalLM(config).eval()


def made(small: bool) -> Any:
    return tiny() if small else load_smollm2()[0]


def data(tokens: int, vocabulary: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, (tokens + 1,), generator=draw) for _ in RANKS]


def service_step(service: Service, tenants: list[Any], each: list[Tensor]) -> float:
    begin = time.perf_counter()
    calls = []
    for tenant, x in zip(tenants, each, strict=False):
        calls.append(tenant.forward_backward([Datum(x[:-1], {"target_tokens": x[1:]})]))
    steps = [tenant.optim_step(1e-4) for tenant in tenants]
    for future in (*calls, *steps):
        future.result()
    return time.perf_counter() - begin


def peft_step(model: Any, optimizers: list[Any], each: list[Tensor]) -> float:
    begin = time.perf_counter()
    for i, (optimizer, x) in enumerate(zip(optimizers, each, strict=True)):
        model.set_adapter(f"a{i}")
        logprobs = model(input_ids=x[None, :-1], use_cache=False).logits[0].log_softmax(-1)
        (-logprobs.gather(1, x[1:, None]).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - begin


def settled(way: Callable[[], float]) -> Callable[[], float]:
    """Return a call that runs ``way`` three times and returns the seconds of the last run.

    The first two runs do not count, since a step waits for the tenants of the two steps before it.
    """
    return lambda: [way() for _ in range(3)][-1]


def peft_model(small: bool) -> tuple[Any, list[Any]]:
    model: Any = None
    for i, rank in enumerate(RANKS):
        config = peft.LoraConfig(r=rank, lora_alpha=32, target_modules="all-linear")
        if model is None:
            model = peft.get_peft_model(made(small), config, adapter_name="a0")
        else:
            model.add_adapter(f"a{i}", config)
    own = [[p for n, p in model.named_parameters() if f".a{i}." in n] for i in range(len(RANKS))]
    return model.eval(), [torch.optim.AdamW(each, lr=1e-4) for each in own]


def measure(small: bool, tokens: int, turns: int) -> dict[str, float]:
    """Return the seconds of a step for each way to train, and the two ratios of :data:`TARGETS`."""
    theirs, optimizers = peft_model(small)
    with Service(made(small)) as service:
        tenants = [service.create(rank, seed=i) for i, rank in enumerate(RANKS)]
        each = data(tokens, service.model.config.vocab_size)
        ways: dict[str, Callable[[], float]] = {
            "one": settled(lambda: service_step(service, tenants[:1], each)),
            "eight": settled(lambda: service_step(service, tenants, each)),
            "peft": lambda: peft_step(theirs, optimizers, each),
        }
        ways["peft"]()
        taken = [{name: way() for name, way in ways.items()} for _ in range(turns)]
    found = {name: statistics.median(turn[name] for turn in taken) for name in ways}
    found["eight / one"] = statistics.median(turn["eight"] / turn["one"] for turn in taken)
    found["peft / eight"] = statistics.median(turn["peft"] / turn["eight"] for turn in taken)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="check the code with a tiny Llama")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="*", default=list(TARGETS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    missed = 0
    for tokens in args.tokens:
        found = measure(args.tiny, tokens, args.turns)
        most, least = TARGETS.get(tokens, (8.0, 1.0))
        good = found["eight / one"] <= most and found["peft / eight"] >= least
        missed += not good
        times = ", ".join(f"{name} {found[name]:.3f} s" for name in ("one", "eight", "peft"))
        print(
            f"{tokens} tokens: {times}; eight / one {found['eight / one']:.2f} (at most {most}), "
            f"peft / eight {found['peft / eight']:.2f} (at least {least}): "
            f"{'met' if good else 'missed'}",
            flush=True,
        )
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
