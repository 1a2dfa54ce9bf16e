"""Time a circuit head on SmolLM2-135M: `python benchmarks/mtpc_smollm2.py --head DIR --check`.

The script prints the time of a forward by its number of tokens, the time of the parts of a decoder
call, and tokens per second of the decoder and of plain decoding, greedy and sampling, at batch 1.
Both use the forwards of `lean.py` with packed weights; plain decoding is also timed without
packing. Greedy tokens are checked against the model's. --check requires 1.3 x in float32.

--train STEPS trains the head first: the model answers questions (`mtpc_samples.py`), and the head
learns from these answers for STEPS steps. Its tokens per call on answers to other questions are
estimated (`mtpc_heldout.py`), and decoding these questions is timed. Rows are appended to
OUT/mtpc_smollm2.csv.
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
from common import append_rows, copy_call, interleaved
from lean import LeanLlama, token_by_token
from mtpc_heldout import CHAIN, FOLDER, estimate, row, unseen_answers, unseen_questions
from mtpc_samples import THINGS, UNSEEN
from torch import Tensor

from lora_ext.interop import smollm2
from lora_ext.methods import mtpc
from lora_ext.methods.mtpc._trunk import roomy_cache
from lora_ext.nn import pack_linears

TARGET = 1.3
Rows = list[dict[str, Any]]


def trained(args: argparse.Namespace) -> None:
    """Generate the answers, and save a head that is trained on them."""
    model, tokenizer = smollm2.load_smollm2()
    sampled = (False, *[True] * args.draws)
    file = args.head / "answers.pt"
    data = mtpc_samples.answers(
        model.bfloat16(), tokenizer, THINGS[UNSEEN:], args.answer_tokens, sampled, file
    )
    model, _ = smollm2.load_smollm2()
    torch.manual_seed(0)  # The head must not depend on whether answers are cached.
    draft = mtpc.retrofit(model, CHAIN, mtpc.frequent_tokens(data.tokens, args.shortlist))
    mtpc_samples.learn(draft, mtpc_samples.batches(data, CHAIN.chain, 256), args.train)
    draft.save(args.head)


@torch.no_grad()
def passes(lean: dict[str, LeanLlama], dtype: str) -> Rows:
    """Time forwards of 1 to 8 tokens after 64 cached tokens, and compute the time to read the
    weights at the machine's memory bandwidth."""
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
    times, found = interleaved(calls | {"copy": copy}, rounds=7), Rows()
    for name in calls:
        took, ratio = times[name], times[name].over(times["plain, rows 1"])
        print(f"pass, {name}: {1e3 * took.median:.1f} ms, {ratio:.2f} of one plain row")
        own = {"dtype": dtype, "p20": 1e3 * took.p20, "p80": 1e3 * took.p80, "time_of_one": ratio}
        found.append(row("pass", "", name, 1e3 * took.median, "ms", **own))
    weights = sum(p.nbytes for p in lean["plain"].products.parameters())
    weights += lean["plain"].lm_head.weight.nbytes
    rate = moved / times["copy"].median
    floor = 1e3 * weights / rate
    print(f"floor: {weights / 1e6:.0f} MB of weights at {rate / 1e9:.0f} GB/s: {floor:.1f} ms")
    return [*found, row("pass", "", "floor: weights read once", floor, "ms", dtype=dtype)]


def parts(
    decoder: mtpc.SpeculativeDecoder, questions: list[Tensor], settings: Any, dtype: str
) -> Rows:
    """Return rows with the milliseconds of a call's forward, draft, verification and remaining
    work."""
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
    spent["forward"] -= prompts  # nearly all of it is the prompts' forwards
    spent["beside"] = seconds - prompts - sum(spent.values())
    each = {name: 1e3 * t / calls for name, t in spent.items()}
    text = ", ".join(f"{name} {t:.2f}" for name, t in each.items())
    print(f"{decoder.mode}: a call takes {sum(each.values()):.1f} ms: {text}")
    return [row("call", decoder.mode, name, t, "ms", dtype=dtype) for name, t in each.items()]


def race(
    args: argparse.Namespace,
    lean: dict[str, LeanLlama],
    draft: mtpc.Draft,
    ids: list[Tensor],
    dtype: str,
) -> tuple[list[float], Rows]:
    """Compare the head with decoding one token per forward, greedily and by sampling.

    Returns:
        The speedups on the packed model for both modes, and the rows of results.
    """
    found = Rows()
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
                got = [decoder.generate(each, **own) for each in ids]
                emitted.extend(each.emitted_per_call for each in got)
                return [each.sequences for each in got]

            sides |= {f"plain, {name}": plain, f"circuit, {name}": circuit}
            if name == "packed":
                found += parts(decoder, ids, settings, dtype)
        if mode == "greedy":
            pairs = zip(sides["plain, packed"](), sides["circuit, packed"](), strict=True)
            same = [torch.equal(expected, got) for expected, got in pairs]
            print(f"greedy: {sum(same)} of {len(same)} answers equal plain decoding's", flush=True)
            assert all(same) or dtype != "float32", "expected the greedy tokens of plain decoding"
        times = interleaved(sides, args.rounds, warm_up=0)
        count = len(ids) * args.new_tokens
        for name in sides:
            ratios = {f"over_{o}": times[f"plain, {o}"].over(times[name]) for o in lean}
            text = ", ".join(f"{r:.2f} x {o.replace('_', ' ')}" for o, r in ratios.items())
            took = times[name]
            rate = count / took.median
            print(f"{mode}, {name}: {rate:.1f} tokens/s, {text}")
            own = {"dtype": dtype, "p20": count / took.p80, "p80": count / took.p20}
            found.append(row("race", mode, name, rate, "tokens/s", **own, **ratios))
        mean = sum(emitted) / len(emitted)
        print(f"{mode}: {mean:.2f} tokens per call", flush=True)
        found.append(row("race", mode, "emitted", mean, "tokens a call", dtype=dtype))
        gains.append(times["plain, packed"].over(times["circuit, packed"]))
    return gains, found


def main() -> None:
    """Train if requested, then time the head."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--head", type=Path, default=FOLDER / "mtpc_smollm2", help="head's folder")
    parser.add_argument("--train", type=int, default=0, help="training steps; 0: use --head")
    parser.add_argument("--check", action="store_true", help=f"require {TARGET} x in float32")
    parser.add_argument("--draws", type=int, default=1, help="sampled answers per question")
    parser.add_argument("--answer-tokens", type=int, default=128, help="tokens to learn from")
    parser.add_argument("--shortlist", type=int, default=4096, help="tokens that can be drafted")
    parser.add_argument("--chain", type=int, default=3, help="windows drafted per call")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of a timed answer")
    parser.add_argument("--questions", type=int, default=4, help="timed questions, up to 32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the csv file")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.train:
        trained(args)
    texts = unseen_answers(args.head)
    gains: dict[str, list[float]] = {}
    for name in args.dtypes:
        model, tokenizer = smollm2.load_smollm2()
        model = model.to(getattr(torch, name))
        draft = mtpc.Draft.load(model, args.head).eval()
        rows = [] if gains else estimate(draft, texts, "trained head")
        draft.bfloat16()
        pack_linears(draft)
        lean = {"plain": LeanLlama(model).eval(), "packed": pack_linears(LeanLlama(model).eval())}
        ids = unseen_questions(tokenizer, args.questions)
        print(f"{name}, {torch.get_num_threads()} threads", flush=True)
        rows += passes(lean, name)
        gains[name], raced = race(args, lean, draft, ids, name)
        append_rows(args.out / "mtpc_smollm2.csv", rows + raced)
    if args.check:
        missed = [gain for gain in gains["float32"] if gain < TARGET]
        text = f"mtpc_smollm2: expected speedups of at least {TARGET}, found {missed}"
        raise SystemExit(text if missed else 0)


if __name__ == "__main__":
    main()
