"""Estimate the tokens per call of a draft for SmolLM2-135M on answers outside its training data.

`python benchmarks/mtpc_heldout.py --head DIR` uses a head of `mtpc_smollm2.py --train`. Tokens per
call are estimated on the model's answers to questions about unseen things. For sampled text, the
estimate is ``1 + E[sum_k prod_{j <= k} min(1, q_j / p_j)]``, the mean number that the verifier of a
sampling decoder keeps. For greedy text, it counts drafted tokens that the model finds most likely.

Then the decoder runs with a long chain of windows. Its calls show how many tokens would have been
kept with shorter chains, or with a rule that continues drafting while the product of the draft's
confidences is high. The best choice depends on the cost of a drafted token. With --compare STEPS,
other drafts are trained on the same answers instead, for STEPS steps each, and the tokens per call
of these drafts are estimated. Rows are appended to OUT/mtpc_smollm2.csv.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import mtpc_samples
import torch
from common import ROOT, append_rows, machine_columns
from lean import LeanLlama
from mtpc_samples import THINGS, UNSEEN, VERBS, Answers, Batch
from torch import Tensor

from lora_ext.interop import smollm2
from lora_ext.methods import mtpc
from lora_ext.nn import pack_linears

FOLDER = ROOT / "out" / "bench"
CHAIN = mtpc.MtpcConfig(
    n_token=1, rank=1, kind="ff", emission="adapter", adapter_rank=32, bridge=768, chain=3
)
WINDOW: dict[str, Any] = {"n_token": 3, "emission": "adapter", "adapter_rank": 32, "bridge": 1024}
# Compared drafts: configuration, and whether they are distilled from the model's states.
DRAFTS = {
    "one window of 3, ff, cross entropy": (mtpc.MtpcConfig(**WINDOW, kind="ff", rank=1), False),
    "one window of 3, hmm of 4, cross entropy": (
        mtpc.MtpcConfig(**WINDOW, kind="hmm", rank=4),
        False,
    ),
    "chain of 3, cross entropy": (CHAIN, False),
    "chain of 3, chunked KL, then overlap": (CHAIN, True),
}


def row(part: str, mode: str, case: str, value: float, unit: str, **more: object) -> dict[str, Any]:
    """Return one line of the csv file."""
    empty = dict.fromkeys(("dtype", "p20", "p80", "time_of_one", "over_plain", "over_packed"), "")
    named = {"part": part, "mode": mode, "case": case, "value": value, "unit": unit}
    values = {**machine_columns(), **named, **empty, **more}
    return {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items()}


def unseen_answers(folder: Path, new_tokens: int = 128) -> dict[str, Answers]:
    """Return greedy and sampled answers about unseen things, cached beside the head."""
    model, tokenizer = smollm2.load_smollm2()
    rounds = {"greedy": (False,), "sample": (True, True)}
    return {
        mode: mtpc_samples.answers(
            model.bfloat16(),
            tokenizer,
            THINGS[:UNSEEN],
            new_tokens,
            sampled,
            folder / f"unseen_{mode}.pt",
        )
        for mode, sampled in rounds.items()
    }


def unseen_questions(tokenizer: Any, count: int) -> list[Tensor]:
    """Return prompts ``(1, S)`` about unseen things."""
    asked = itertools.product(VERBS, THINGS[:UNSEEN])
    return [
        mtpc_samples.question(tokenizer, *words)[None] for words in itertools.islice(asked, count)
    ]


@torch.no_grad()
def kept(draft: mtpc.Draft, batch: Batch, mode: str) -> Tensor:
    """Return the probability that each token of the text is accepted, ``(N, K)``.

    The probability is conditional on the acceptance of the call's earlier tokens.
    """
    n, parts = draft.config.n_token, list[Tensor]()
    for k, state in enumerate(mtpc_samples.window_states(draft, batch)):
        at = slice(k * n, (k + 1) * n)
        text = batch.tokens[:, 1:][:, at]
        if mode == "greedy":
            laws = (draft.head.full_conditional(state, text, j) for j in range(n))
            likeliest = torch.stack([law.argmax(-1) for law in laws], 1)
            parts.append((likeliest == text).float())
        else:
            unembed = draft.model.get_output_embeddings().weight[text].float()
            p = (batch.teacher[:, at] * unembed).sum(-1) - batch.normaliser[:, at]
            ratio = (draft.head.conditionals(state, text) - p).nan_to_num(nan=-torch.inf)
            parts.append(ratio.clamp(max=0).exp())
    return torch.cat(parts, 1)


def tokens_a_call(kept: Tensor) -> float:
    """Return the mean number of tokens per call: the verifier's token and the accepted drafted
    tokens."""
    return 1 + kept.cumprod(1).sum(1).mean().item()


def estimate(draft: mtpc.Draft, texts: dict[str, Answers], case: str) -> list[dict[str, Any]]:
    """Print and return the tokens per call, and the share of tokens accepted at each position of
    the chain."""
    rows, k = [], draft.config.n_token * draft.config.chain
    for mode, data in texts.items():
        batches = (
            mtpc_samples.windows(data, at, k) for at in mtpc_samples.places(data, k).split(256)
        )
        found = torch.cat([kept(draft, batch, mode) for batch in batches])
        each = found.mean(0).tolist()
        rows.append(row("held out", mode, case, tokens_a_call(found), "tokens a call"))
        rows += [
            row("held out", mode, f"{case}: token {i + 1}", share, "kept")
            for i, share in enumerate(each)
        ]
        text = ", ".join(f"{share:.2f}" for share in each)
        print(f"held out, {case}, {mode}: {tokens_a_call(found):.2f} tokens per call, kept: {text}")
    return rows


def recorded(
    draft: mtpc.Draft, model: Any, ids: list[Tensor], mode: str, chain: int, new_tokens: int
) -> tuple[Tensor, Tensor]:
    """Run the decoder with a chain and record its calls.

    Returns:
        The draft's confidence in each token ``(C, chain)``, and the accepted counts ``(C,)``.
    """
    bridge = draft.bridge
    assert bridge is not None
    options: dict[str, Any] = {"mode": mode, "bridge": bridge, "chain": chain}
    decoder = mtpc.SpeculativeDecoder(model, draft.head, **options)
    sure, accepted, embed = list[Tensor](), list[Tensor](), model.get_input_embeddings()
    own_draft, own_verify = decoder.draft, decoder.verify

    def drafted(hidden: Tensor, pending: Tensor, uniforms: Tensor) -> Any:
        window = own_draft(hidden, pending, uniforms)
        state, each = hidden, list[Tensor]()
        for token in (pending, *window.tokens[:, :-1].unbind(1)):
            state = bridge(state, embed(token))
            leaf = draft.head.narrow_circuit(state).leaf.float()
            each.append(leaf.softmax(-1).amax((1, 2, 3)))
        sure.append(torch.stack(each, 1))
        return window

    def verified(*args: Any) -> tuple[Tensor, Tensor]:
        count, token = own_verify(*args)
        accepted.append(count)
        return count, token

    with mock.patch.multiple(decoder, draft=drafted, verify=verified):
        for seed, prompt in enumerate(ids):
            decoder.generate(prompt, max_new_tokens=new_tokens, eos_token_id=[], seed=seed)
    return torch.cat(sure), torch.cat(accepted)


def lengths(sure: Tensor, accepted: Tensor, cost: float) -> Iterator[tuple[str, float, float]]:
    """Yield the name, the tokens per call and the tokens per unit of cost of every fixed chain and
    of the best rule.

    The rule continues drafting while the product of the confidences is at least a threshold. The
    cost of a call without a draft is 1.

    Args:
        sure: Confidences ``(C, K)``.
        accepted: Number of accepted tokens ``(C,)`` of each call, at most K.
        cost: Cost of a drafted token.
    """

    def of(drafted: Tensor) -> tuple[float, float]:
        emitted = 1 + torch.minimum(accepted, drafted).float().mean().item()
        return emitted, emitted / (1 + cost * drafted.float().mean().item())

    for k in range(1, sure.shape[1] + 1):
        yield f"chain {k}", *of(torch.full_like(accepted, k))
    products = sure.cumprod(1)[:, :-1]
    thresholds = products.flatten().quantile(torch.linspace(0, 1, 101))
    rules = [of(1 + (products >= threshold).sum(1)) for threshold in thresholds]
    yield "rule", *max(rules, key=lambda found: found[1])


def choose_lengths(draft: mtpc.Draft, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print and return the tokens per call of chains of each length, and of the rule."""
    _, tokenizer = smollm2.load_smollm2()
    ids, rows = unseen_questions(tokenizer, args.questions), []
    model = pack_linears(LeanLlama(draft.model).eval())
    for mode in ("greedy", "sample"):
        calls = recorded(draft, model, ids, mode, args.longest, args.new_tokens)
        print(f"{mode}: {len(calls[1])} calls, a drafted token costs {args.cost} of a call")
        for case, emitted, gain in lengths(*calls, args.cost):
            rows.append(row("length", mode, case, emitted, "tokens a call"))
            rows.append(row("length", mode, case, gain, f"tokens, cost {args.cost}"))
            print(f"{mode}, {case}: {emitted:.2f} tokens per call, {gain:.3f} per unit of cost")
    return rows


def compare(texts: dict[str, Answers], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train every draft in DRAFTS for some steps; print and return the tokens per call of each
    draft."""
    model, _ = smollm2.load_smollm2()
    data, rows = Answers(*torch.load(args.head / "answers.pt")), []
    for name, (config, distil) in DRAFTS.items():
        torch.manual_seed(0)
        draft = mtpc.retrofit(model, config, mtpc.frequent_tokens(data.tokens, args.shortlist))
        batches = mtpc_samples.batches(data, config.n_token * config.chain, 256)
        print(name, flush=True)
        mtpc_samples.learn(draft, batches, args.compare, distil=distil)
        rows += estimate(draft.eval(), texts, f"{name}, {args.compare} steps")
        draft.remove()
    return rows


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with a message if an argument is invalid, before work that takes minutes begins."""
    needed = "answers.pt" if args.compare else "mtpc_config.json"
    least = {"compare": 0, "cost": 0, "shortlist": 1, "longest": 1, "questions": 1, "new_tokens": 1}
    for name, number in least.items():
        found = getattr(args, name)
        if not found >= number:  # also rejects NaN
            option = name.replace("_", "-")
            parser.error(f"--{option}: expected at least {number}, found {found}")
    if not (args.head / needed).is_file():
        parser.error(f"--head: expected a folder with {needed}, found {args.head}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--head", type=Path, default=FOLDER / "mtpc_smollm2", help="head's folder")
    parser.add_argument("--compare", type=int, default=0, help="steps to train other drafts")
    parser.add_argument("--shortlist", type=int, default=4096, help="tokens that can be drafted")
    parser.add_argument("--longest", type=int, default=6, help="length of the recorded chain")
    parser.add_argument(
        "--cost", type=float, default=0.04, help="cost of a drafted token; a call without draft: 1"
    )
    parser.add_argument("--questions", type=int, default=32, help="number of questions")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the csv file")
    args = parser.parse_args()
    check(parser, args)
    texts = unseen_answers(args.head)
    if args.compare:
        rows = compare(texts, args)
    else:
        model, _ = smollm2.load_smollm2()
        draft = mtpc.Draft.load(model, args.head).eval()
        rows = estimate(draft, texts, "trained head") + choose_lengths(draft, args)
    append_rows(args.out / "mtpc_smollm2.csv", rows)


if __name__ == "__main__":
    main()
