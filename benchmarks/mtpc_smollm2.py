"""A circuit head on SmolLM2-135M: `python benchmarks/mtpc_smollm2.py`.

The model answers questions; a head with adapters on its unembedding (49152 tokens, or the most
frequent of the answers) learns those answers from the hidden states, which are computed once; then
it drafts for questions it has not seen. Prints tokens per second against one token at a time: both
sides make the passes of `lean.py`, with a cache that has room. Greedy tokens are checked to be the
same. A trained head is kept in --draft, and a second run, which finds it, takes a minute.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, interleaved
from lean import LeanLlama, token_by_token
from torch import Tensor
from torch.nn import functional as F

from lora_ext.interop import smollm2
from lora_ext.methods import mtpc

VERBS = (
    "Explain",
    "Describe",
    "Tell me about",
    "Write a short text about",
    "Give me facts about",
    "What is interesting about",
    "Write three sentences about",
    "Why do people like",
)
THINGS = """the sea;bread;the moon;a market;trees;a lighthouse;rain;music;the winter;horses;glass;
a library;bees;rivers;the desert;a bicycle;coffee;mountains;clocks;the internet;gold;ships;sleep;
the heart;paper;volcanoes;a garden;trains;salt;the wind;chess;wolves;light;bridges;tea;robots;
rice;dreams;iron;the future;the forest;the city;books;a river;snow;the sun;cats;dogs;birds;fish;
apples;cheese;wine;wool;silk;paint;poems;maps;letters;money;school;a hospital;football;swimming;
dance;theatre;film;radio;television;telephones;cars;airplanes;rockets;satellites;stars;planets;
fire;stone;sand;soil""".replace("\n", "").split(";")


def prompts(tokenizer: Any, things: list[str], verbs: tuple[str, ...]) -> dict[str, Tensor]:
    """Questions as the chat template puts them, padded on the left."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{verb} {thing}."}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for thing in things
        for verb in verbs
    ]
    return dict(tokenizer(texts, return_tensors="pt", padding=True, padding_side="left"))


def answer(model: Any, batch: dict[str, Tensor], new_tokens: int) -> Tensor:
    """Questions and greedy answers, padded with the end to ``(rows, S + new_tokens)``."""
    eos: int = model.generation_config.eos_token_id
    parts = []
    for i in range(0, len(batch["input_ids"]), 96):
        part = {name: t[i : i + 96] for name, t in batch.items()}
        ids = model.generate(**part, do_sample=False, max_new_tokens=new_tokens)
        missing = part["input_ids"].shape[1] + new_tokens - ids.shape[1]
        parts.append(F.pad(ids, (0, missing), value=eos))
    return torch.cat(parts)


def windows(draft: mtpc.Draft, ids: Tensor, mask: Tensor, eos: int) -> tuple[Tensor, Tensor]:
    """Hidden states ``(N, D)`` inside the answers and the windows ``(N, K)`` after them."""
    n, length = draft.head.n_token, mask.shape[1]
    mask = F.pad(mask, (0, ids.shape[1] - length), value=1)
    states, targets = [], []
    for part, seen in zip(ids.split(16), mask.split(16), strict=True):
        position = (seen.cumsum(1) - 1).clamp(min=0)
        hidden = draft.hidden_states(input_ids=part, attention_mask=seen, position_ids=position)
        window = mtpc.unfold_windows(mtpc.shift_labels(part), n)
        states.append(hidden[:, length - 1 : -n].flatten(0, 1))
        targets.append(window[:, length - 1 : -n].flatten(0, 1))
    states, targets = torch.cat(states), torch.cat(targets)
    keep = ~(targets == eos).any(1)
    return states[keep], targets[keep]


def learn(draft: mtpc.Draft, states: Tensor, targets: Tensor, seconds: float) -> None:
    """Train the head for so long, at a rate that falls to 0."""
    optimizer = torch.optim.AdamW(draft.parameters(), lr=3e-3, weight_decay=0.0)
    start, step, mean = time.perf_counter(), 0, torch.zeros(draft.head.n_token)
    while (elapsed := time.perf_counter() - start) < seconds:
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - elapsed / seconds)
        index = torch.randint(len(states), (96,))
        loss, by_position = mtpc.window_loss(draft.head, states[index], targets[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = 0.95 * mean + 0.05 * by_position.detach()
        step += 1
        if step % 100 == 0:
            print(f"step {step}: {(mean / (1 - 0.95**step)).tolist()}", flush=True)


def trained(args: argparse.Namespace, model: Any, tokenizer: Any) -> mtpc.Draft:
    """A head that has learned the model's answers, or the one of an earlier run."""
    if args.draft.exists():
        print(f"the head of {args.draft}")
        return mtpc.Draft.load(model, args.draft)
    batch = prompts(tokenizer, THINGS[4:], VERBS)
    start = time.perf_counter()
    ids = answer(model, batch, args.answer_tokens)
    print(f"{len(ids)} answers in {time.perf_counter() - start:.0f} s", flush=True)

    config = mtpc.MtpcConfig(args.n_token, args.rank, args.kind, "adapter", adapter_rank=64)
    written = ids[:, batch["input_ids"].shape[1] :]
    listed = mtpc.frequent_tokens(written, args.shortlist) if args.shortlist else None
    draft = mtpc.retrofit(model, config, listed)
    eos: int = model.generation_config.eos_token_id
    states, targets = windows(draft, ids, batch["attention_mask"], eos)
    print(f"{len(states)} windows, {draft.head.num_leaves} tokens to draft", flush=True)
    learn(draft, states, targets, args.seconds)
    draft.save(args.draft)
    return draft


def race(args: argparse.Namespace, lean: LeanLlama, head: Any, questions: list[Tensor]) -> None:
    """Greedy and sampling, each against one token a pass."""
    settings: dict[str, Any] = {"max_new_tokens": args.new_tokens, "eos_token_id": [], "seed": 0}
    for mode in ("greedy", "sample"):
        decoder = mtpc.SpeculativeDecoder(lean, head, mode=mode)

        def plain(sample: bool = mode == "sample") -> list[Tensor]:
            return [token_by_token(lean, ids, args.new_tokens, sample) for ids in questions]

        def circuit(decoder: mtpc.SpeculativeDecoder = decoder) -> list[mtpc.Generation]:
            return [decoder.generate(ids, **settings) for ids in questions]

        found = circuit()
        if mode == "greedy":
            for expected, got in zip(plain(), found, strict=True):
                assert torch.equal(got.sequences, expected), "greedy tokens differ"
        emitted = sum(got.emitted_per_call for got in found) / len(found)
        times = interleaved({"plain": plain, "circuit": circuit}, args.rounds, warm_up=0)
        count = len(questions) * args.new_tokens
        ours, theirs = times["circuit"], times["plain"]
        print(
            f"{mode}: {count / ours.median:.1f} tokens/s, plain {count / theirs.median:.1f}: "
            f"{theirs.over(ours):.2f} x; emitted a call {emitted:.2f}, which costs "
            f"{emitted * ours.over(theirs):.2f} plain steps",
            flush=True,
        )


def main() -> None:
    """Answer, learn, draft."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=90, help="of training")
    parser.add_argument("--kind", default="hmm")
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--n-token", type=int, default=4)
    parser.add_argument("--shortlist", type=int, default=4096, help="tokens; 0: the vocabulary")
    parser.add_argument("--answer-tokens", type=int, default=128, help="to learn from, an answer")
    parser.add_argument("--new-tokens", type=int, default=64, help="of a timed answer")
    parser.add_argument("--questions", type=int, default=2, help="that are timed, up to 4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draft", type=Path, default=ROOT / "out" / "bench" / "mtpc_smollm2")
    args = parser.parse_args()
    torch.manual_seed(0)
    model, tokenizer = smollm2.load_smollm2()
    draft = trained(args, model, tokenizer)
    questions = [
        prompts(tokenizer, [thing], VERBS[:1])["input_ids"] for thing in THINGS[: args.questions]
    ]
    race(args, LeanLlama(model), draft.head.eval(), questions)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
