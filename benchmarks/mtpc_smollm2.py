"""A circuit head on SmolLM2-135M: `python benchmarks/mtpc_smollm2.py`.

The model answers questions; a head with adapters on its unembedding (49152 tokens, or the most
frequent of the answers) learns those answers from the hidden states, which are computed once; then
it drafts for questions it has not seen. Prints tokens per second against one token at a time with
a cache, checked to be the same tokens in greedy mode.
"""

from __future__ import annotations

import argparse
import resource
import time
from typing import Any

import torch
from common import interleaved
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from lora_ext.interop import smollm2
from lora_ext.methods import mtpc
from lora_ext.methods.mtpc.trunk import cache_argument

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


@torch.no_grad()
def plain(model: Any, ids: Tensor, new_tokens: int) -> Tensor:
    """Greedy, one token at a time with a cache, without `generate` around it."""
    cache = {cache_argument(model): DynamicCache()}
    token, out = ids, ids
    for _ in range(new_tokens):
        logits = model(token, use_cache=True, logits_to_keep=1, **cache).logits[:, -1]
        token = logits.argmax(-1, keepdim=True)
        out = torch.cat([out, token], 1)
    return out


def main() -> None:
    """Answer, learn, draft."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=90, help="of training")
    parser.add_argument("--kind", default="hmm")
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--n-token", type=int, default=4)
    parser.add_argument("--shortlist", type=int, default=4096, help="tokens; 0: the vocabulary")
    parser.add_argument("--new-tokens", type=int, default=128)
    args = parser.parse_args()
    torch.manual_seed(0)
    model, tokenizer = smollm2.load_smollm2()
    eos: set[int] = {model.generation_config.eos_token_id}
    batch = prompts(tokenizer, THINGS[4:], VERBS)
    start = time.perf_counter()
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": args.new_tokens}
    length = batch["input_ids"].shape[1]
    parts = []
    for i in range(0, len(batch["input_ids"]), 96):
        part = model.generate(**{k: v[i : i + 96] for k, v in batch.items()}, **settings)
        missing = length + args.new_tokens - part.shape[1]
        parts.append(F.pad(part, (0, missing), value=model.generation_config.eos_token_id))
    answers = torch.cat(parts)
    print(f"{len(answers)} answers in {time.perf_counter() - start:.0f} s")

    config = mtpc.MtpcConfig(
        args.n_token, args.rank, args.kind, emission="adapter", adapter_rank=64
    )
    shortlist = None
    if args.shortlist:
        shortlist = mtpc.frequent_tokens(answers[:, length:], args.shortlist)
    draft = mtpc.retrofit(model, config, shortlist)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(answers[:, length:])], 1)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    hidden, windows = [], []
    for i in range(0, len(answers), 16):
        part = slice(i, i + 16)
        labels = answers[part].masked_fill(mask[part] == 0, -100)
        found = draft.hidden_states(
            input_ids=answers[part], attention_mask=mask[part], position_ids=position[part]
        )
        window = mtpc.unfold_windows(mtpc.shift_labels(labels), args.n_token)
        hidden.append(found[:, length - 1 : -args.n_token].flatten(0, 1))
        windows.append(window[:, length - 1 : -args.n_token].flatten(0, 1))
    states, targets = torch.cat(hidden), torch.cat(windows)
    keep = ~torch.isin(targets, torch.tensor([*eos])).any(1)
    states, targets = states[keep], targets[keep]
    print(f"{len(states)} windows, {draft.head.num_leaves} tokens to draft")
    optimizer = torch.optim.AdamW(draft.parameters(), lr=3e-3, weight_decay=0.0)
    start, step, each = time.perf_counter(), 0, torch.zeros(args.n_token)
    while time.perf_counter() - start < args.seconds:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - (time.perf_counter() - start) / args.seconds)
        index = torch.randint(len(states), (96,))
        loss, by_position = draft.head.loss(states[index], targets[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        each = 0.95 * each + 0.05 * by_position.detach()
        step += 1
        if step % 100 == 0:
            print(f"step {step}: {(each / (1 - 0.95**step)).tolist()}", flush=True)

    questions = [prompts(tokenizer, [thing], VERBS[:1])["input_ids"] for thing in THINGS[:4]]
    decoder = draft.decoder(mode="greedy")
    emitted = []
    for ids in questions:
        expected = plain(model, ids, args.new_tokens)
        got = decoder.generate(ids, max_new_tokens=args.new_tokens, eos_token_id=[])
        assert torch.equal(got.sequences, expected), "greedy tokens differ"
        emitted.append(got.emitted_per_call)
    print(f"emitted per call: {sum(emitted) / len(emitted):.2f}")
    times = interleaved(
        {
            "plain": lambda: [plain(model, ids, args.new_tokens) for ids in questions],
            "circuit": lambda: [
                decoder.generate(ids, max_new_tokens=args.new_tokens, eos_token_id=[])
                for ids in questions
            ],
        },
        3,
        warm_up=0,
    )
    count = len(questions) * args.new_tokens
    for name, t in times.items():
        print(f"{name}: {count / t.median:.1f} tokens/s, {times['plain'].over(t):.2f} x plain")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
