"""Does a circuit head pay on SmolLM2-135M: `python benchmarks/mtpc_smollm2.py --head DIR --check`.

Prints what a pass costs by its rows, what a call of the decoder costs and by which part, and then
tokens per second of the decoder against one token a pass, greedy and sampling, at batch 1. Both
sides make the passes of `lean.py` with packed weights; plain decoding is also timed without them.
Greedy tokens are checked to be the model's own. --check asks for 1.3 x in float32.

--train MINUTES makes the head first: the model answers questions (`mtpc_samples.py`), the head
learns from these answers for so many minutes of processor time, and is raced on other questions.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import mtpc_samples
import torch
from common import ROOT, copy_call, interleaved
from lean import LeanLlama, token_by_token
from mtpc_samples import THINGS, UNSEEN, VERBS
from torch import Tensor

from lora_ext.interop import smollm2
from lora_ext.methods import mtpc
from lora_ext.methods.mtpc.cache import roomy_cache
from lora_ext.nn import pack_linears

TARGET = 1.3
CONFIG = mtpc.MtpcConfig(
    n_token=1, rank=1, kind="ff", emission="adapter", adapter_rank=32, bridge=768, chain=3
)


def trained(args: argparse.Namespace) -> None:
    """Make the answers, and write a head that has learned from them."""
    model, tokenizer = smollm2.load_smollm2()
    file = args.head / "answers.pt"
    data = mtpc_samples.answers(model.bfloat16(), tokenizer, args.answer_tokens, args.draws, file)
    model, _ = smollm2.load_smollm2()
    listed = mtpc.frequent_tokens(data.tokens, args.shortlist)
    draft = mtpc.retrofit(model, CONFIG, listed)
    mtpc_samples.learn(draft, mtpc_samples.batches(data, CONFIG.chain, 256), args.train)
    draft.save(args.head)


@torch.no_grad()
def passes(lean: dict[str, LeanLlama]) -> None:
    """What a pass over 1 to 8 new tokens costs behind 64, and its floor by bytes."""
    context = torch.randint(1000, (1, 64))
    calls: dict[str, Any] = {}
    for (name, model), rows in itertools.product(lean.items(), (1, 2, 3, 4, 6, 8)):
        cache = roomy_cache(128)
        model(context, cache=cache, logits_to_keep=1)

        def call(model: LeanLlama = model, cache: Any = cache, rows: int = rows) -> None:
            model(context[:, :rows], cache=cache)
            cache.crop(-rows)

        calls[f"{name}, rows {rows}"] = call
    copy, moved = copy_call()
    times = interleaved(calls | {"copy": copy}, rounds=7)
    for name in calls:
        ratio = times[name].over(times["plain, rows 1"])
        print(f"pass, {name}: {1e3 * times[name].median:.1f} ms, {ratio:.2f} of one plain row")
    weights = sum(p.nbytes for p in lean["plain"].products.parameters())
    weights += lean["plain"].lm_head.weight.nbytes
    rate = moved / times["copy"].median
    floor = 1e3 * weights / rate
    print(f"floor: {weights / 1e6:.0f} MB of weights at {rate / 1e9:.0f} GB/s: {floor:.1f} ms")


def parts(decoder: mtpc.SpeculativeDecoder, questions: list[Tensor], settings: Any) -> None:
    """Milliseconds that a call spends in pass, draft and test, and beside them."""
    spent: Counter[str] = Counter()

    def timed(owner: Any, attribute: str) -> Any:
        call = getattr(owner, attribute)

        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            spent[attribute] += time.perf_counter() - start
            return result

        return mock.patch.object(owner, attribute, run)

    def whole(**changed: int) -> tuple[float, int]:
        start = time.perf_counter()
        found = [decoder.generate(ids, **settings | changed) for ids in questions]
        return time.perf_counter() - start, sum(sum(got.calls) for got in found)

    with (
        timed(decoder.model, "forward"),
        timed(decoder, "draft"),
        timed(decoder, "verify"),
    ):
        prompts, _ = whole(max_new_tokens=1)
        spent.clear()
        seconds, calls = whole()
    spent["forward"] -= prompts  # nearly all of which is the pass over the prompt
    spent["beside"] = seconds - prompts - sum(spent.values())
    text = ", ".join(f"{name} {1e3 * t / calls:.2f}" for name, t in spent.items())
    print(f"{decoder.mode}: a call takes {1e3 * (seconds - prompts) / calls:.1f} ms: {text}")


def race(
    args: argparse.Namespace, lean: dict[str, LeanLlama], draft: mtpc.Draft, ids: list[Tensor]
) -> list[float]:
    """Greedy and sampling against one token a pass; the gains over packed passes."""
    settings: dict[str, Any] = {"max_new_tokens": args.new_tokens, "eos_token_id": [], "seed": 0}
    gains = []
    for mode in ("greedy", "sample"):
        options: dict[str, Any] = {"mode": mode, "bridge": draft.bridge, "chain": args.chain}
        sides: dict[str, Any] = {}
        emitted: list[float] = []
        for name, model in lean.items():
            decoder = mtpc.SpeculativeDecoder(model, draft.head, **options)
            seeds = itertools.count()

            def plain(model: LeanLlama = model, sample: bool = mode == "sample") -> list[Tensor]:
                return [token_by_token(model, each, args.new_tokens, sample) for each in ids]

            def circuit(
                decoder: mtpc.SpeculativeDecoder = decoder,
                seeds: Any = seeds,
                emitted: list[float] = emitted,
            ) -> list[Tensor]:
                own = settings | {"seed": next(seeds)}
                found = [decoder.generate(each, **own) for each in ids]
                emitted.extend(got.emitted_per_call for got in found)
                return [got.sequences for got in found]

            sides |= {f"plain, {name}": plain, f"circuit, {name}": circuit}
            if name == "packed":
                parts(decoder, ids, settings)
        if mode == "greedy":
            pairs = zip(sides["plain, packed"](), sides["circuit, packed"](), strict=True)
            same = [torch.equal(expected, got) for expected, got in pairs]
            exact = lean["packed"].lm_head.weight.dtype == torch.float32
            print(f"greedy: {sum(same)} of {len(same)} answers are plain decoding's", flush=True)
            assert all(same) or not exact, "greedy tokens differ"
        times = interleaved(sides, args.rounds, warm_up=0)
        count = len(ids) * args.new_tokens
        for name in sides:
            ratios = [times[f"plain, {other}"].over(times[name]) for other in lean]
            text = ", ".join(f"{r:.2f} x plain {o}" for r, o in zip(ratios, lean, strict=True))
            print(f"{mode}, {name}: {count / times[name].median:.1f} tokens/s, {text}")
        print(f"{mode}: emitted a call {sum(emitted) / len(emitted):.2f}", flush=True)
        gains.append(times["plain, packed"].over(times["circuit, packed"]))
    return gains


def main() -> None:
    """Train if asked to, then race."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    folder = ROOT / "out" / "bench" / "mtpc_smollm2"
    parser.add_argument("--head", type=Path, default=folder, help="folder of the trained head")
    parser.add_argument("--train", type=float, default=0, help="minutes of processor time")
    parser.add_argument("--check", action="store_true", help=f"ask for {TARGET} x in float32")
    parser.add_argument("--draws", type=int, default=1, help="sampled answers a question, to learn")
    parser.add_argument("--answer-tokens", type=int, default=128, help="of an answer, to learn")
    parser.add_argument("--shortlist", type=int, default=4096, help="tokens that are drafted")
    parser.add_argument("--chain", type=int, default=3, help="windows that a call drafts")
    parser.add_argument("--new-tokens", type=int, default=64, help="of a timed answer")
    parser.add_argument("--questions", type=int, default=4, help="that are timed, up to 32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.train:
        trained(args)
    gains: dict[str, list[float]] = {}
    for name in args.dtypes:
        model, tokenizer = smollm2.load_smollm2()
        model = model.to(getattr(torch, name))
        draft = mtpc.Draft.load(model, args.head).eval()
        draft.bfloat16()
        pack_linears(draft)
        lean = {"plain": LeanLlama(model).eval(), "packed": pack_linears(LeanLlama(model).eval())}
        asked = itertools.product(VERBS, THINGS[:UNSEEN])
        ids = [
            mtpc_samples.question(tokenizer, *words)[None]
            for words in itertools.islice(asked, args.questions)
        ]
        print(f"{name}, {torch.get_num_threads()} threads", flush=True)
        passes(lean)
        gains[name] = race(args, lean, draft, ids)
    if args.check:
        missed = [gain for gain in gains["float32"] if gain < TARGET]
        raise SystemExit(f"below {TARGET} x: {missed}" if missed else 0)


if __name__ == "__main__":
    main()
