"""Time activated adapters over a text that the base model has read: `python benchmarks/alora.py`.

SmolLM2-135M in float32 reads 1024 tokens as the base model. Each of eight adapters then continues
them with eight more tokens, one after another, by continuous batching. Activated adapters (alora)
reuse the text's cache; ordinary ones (lora) read the whole text again. PEFT (peft) generates with
the activated adapter and keeps no cache between adapters. "median" is the time to the first token
in ms, "tokens" the number of tokens that were computed before that token was known. Every first
token is compared with PEFT's before a number is written. Rows are appended to OUT/alora_cpu.csv.

`--check` runs a tiny random model, checks tokens and counts, and writes no times.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch
from common import ROOT, append_rows, machine_columns
from peft import LoraConfig, get_peft_model
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import lora_ext
from lora_ext.serving._continuous import adapter_requests

INVOCATION = [1, 5, 2]


@dataclass(frozen=True)
class Case:
    """Sizes: numbers of adapters, of tokens in the shared text, and of later tokens per adapter."""

    adapters: int
    read: int
    asked: int
    page: int
    rank: int
    size: float  # standard deviation of the random factors

    @property
    def shared(self) -> int:
        """Number of tokens in the full pages of the text."""
        return self.read // self.page * self.page


FULL = Case(adapters=8, read=1024, asked=8, page=64, rank=16, size=0.02)
TINY = Case(adapters=3, read=64, asked=6, page=16, rank=4, size=0.3)


def tiny_model() -> Any:
    """Return a random Llama of two layers with large weights, so that adapters change its
    tokens."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, **heads)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() == 2 else 1)
    return model


def save_adapters(model: Any, case: Case, folder: str) -> Any:
    """Return PEFT's model with adapters of both kinds, and save them in the folder."""
    wrapped: Any = None
    torch.manual_seed(1)
    for kind, invocation in (("alora", INVOCATION), ("plain", None)):
        for i in range(case.adapters):
            config = LoraConfig(
                r=case.rank,
                lora_alpha=2 * case.rank,
                target_modules=["q_proj", "k_proj", "v_proj"],
                alora_invocation_tokens=invocation,
                task_type="CAUSAL_LM",
            )
            name = f"{kind}{i}"
            if wrapped is None:
                wrapped = get_peft_model(model, config, adapter_name=name)
            else:
                wrapped.add_adapter(name, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=case.size)
    wrapped.eval().save_pretrained(folder)
    return wrapped


def prompts(case: Case, vocab: int) -> tuple[list[int], list[int]]:
    """Return the text, and the tokens that follow it for every adapter."""
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(6, vocab, (case.read + case.asked,), generator=generator).tolist()
    return words[: case.read], [*INVOCATION, *words[case.read + len(INVOCATION) :]]


def of_peft(wrapped: Any, prompt: list[int], names: list[str]) -> list[tuple[int, float, int]]:
    """Return, for each adapter, PEFT's first token, the seconds until this token, and the number of
    tokens computed for it."""
    found = []
    for name in names:
        wrapped.set_adapter(name)
        begin = time.perf_counter()
        ids = torch.tensor([prompt])
        out = wrapped.generate(input_ids=ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
        found.append((int(out[0, -1]), time.perf_counter() - begin, len(prompt)))
    return found


def of_manager(
    model: Any, case: Case, text: list[int], ask: list[int], names: list[str]
) -> list[tuple[int, float, int]]:
    """Return the values of ``of_peft`` for continuous batching, after the base model has read the
    text."""
    manager = model.init_continuous_batching(
        GenerationConfig(max_new_tokens=1, do_sample=False, eos_token_id=-1),
        ContinuousBatchingConfig(
            page_size=case.page, num_blocks=256, max_batch_tokens=max(64, case.read // 2)
        ),
    )
    with torch.inference_mode():
        manager.start()
    found, requests = [], adapter_requests(manager)
    for name, prompt in [(None, text), *((name, text + ask) for name in names)]:
        before, begin = requests.computed, time.perf_counter()
        result = manager.get_result(manager.add_request(prompt, adapter_name=name), timeout=600)
        spent = time.perf_counter() - begin
        found.append((result.generated_tokens[0], spent, requests.computed - before))
    manager.stop(block=True)
    return found[1:]


@torch.no_grad()
def measure(model: Any, case: Case) -> list[dict[str, Any]]:
    """Return one row per provider, after its tokens and counts have been checked.

    Raises:
        SystemExit: If tokens or counts are wrong.
    """
    text, ask = prompts(case, model.config.vocab_size)
    names = {k: [f"{k}{i}" for i in range(case.adapters)] for k in ("alora", "plain")}
    with tempfile.TemporaryDirectory() as folder:
        wrapped = save_adapters(model, case, folder)
        judge = {kind: of_peft(wrapped, text + ask, names[kind]) for kind in names}
        base = wrapped.unload()
        pool = lora_ext.AdapterPool(base, max_slots=2 * case.adapters, max_rank=case.rank)
        for name in (*names["alora"], *names["plain"]):
            pool.load(name, Path(folder, name))
    lora_ext.attach(base, pool)
    ours = {kind: of_manager(base, case, text, ask, names[kind]) for kind in names}
    lora_ext.detach(base)
    expected = {"alora": len(text + ask) - case.shared, "plain": len(text + ask)}
    for kind, found in ours.items():
        tokens, wanted = [token for token, *_ in found], [token for token, *_ in judge[kind]]
        if tokens != wanted:
            raise SystemExit(f"{kind}: expected PEFT's first tokens {wanted}, found {tokens}")
        counts = [count for *_, count in found]
        if counts != [expected[kind]] * case.adapters:
            raise SystemExit(f"{kind}: expected {expected[kind]} computed tokens, found {counts}")
    providers = {"peft": judge["alora"], "lora": ours["plain"], "alora": ours["alora"]}
    return [
        {
            "case": f"{case.adapters} adapters, {case.read} + {case.asked}",
            "provider": provider,
            "unit": "ms",
            "median": 1e3 * statistics.median(seconds for _, seconds, _ in found),
            "worst": 1e3 * max(seconds for _, seconds, _ in found),
            "tokens": found[0][2],
        }
        for provider, found in providers.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="use a tiny model and write no times")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "benchmarks")
    args = parser.parse_args()
    if args.check:
        rows = measure(tiny_model(), TINY)
        print("; ".join(f"{row['provider']}: {row['tokens']} tokens" for row in rows), "- as PEFT")
        return
    from lora_ext.interop.smollm2 import load_smollm2

    rows = measure(load_smollm2()[0], FULL)
    for row in rows:
        print(f"{row['provider']:>6} {row['median']:9.1f} ms, {row['tokens']} tokens")
    append_rows(args.out / "alora_cpu.csv", [{**row, **machine_columns()} for row in rows])


if __name__ == "__main__":
    main()
