"""Measure constraints on SmolLM2: satisfaction, look-ahead and cost.

`python benchmarks/control.py` checks many sampled answers with code independent of the constraints.
Texts of 32 tokens that must contain given words are sampled with the mask alone and with a guide.
The positions of the words and the nats per token of the texts under the model are measured. The
time that 16 constraints add to a step of 16 rows, dense and sparse, is compared with the model's
packed forward. This time is also compared, on the same guide, with that of Ctrl-G's formula (arXiv
2406.13892), which multiplies all states by the vocabulary. Drafts are compared by their tokens per
call.

--check exits with 1 if a target of docs/control.md is missed. --guide DIR is the folder of the
guide. If it does not exist, a guide of 512 states is trained first, in about 20 minutes on two
cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from common import append_rows, error_over_bound, interleaved, machine_columns
from mtpc_samples import question
from study import Criterion, criteria_table
from torch import Tensor

from lora_ext import control
from lora_ext.control import Constraint, ConstraintProcessor, Guide, Plan, Row
from lora_ext.interop import smollm2
from lora_ext.methods import mtpc
from lora_ext.methods.mtpc import _constrained
from lora_ext.nn import pack_linears

ROWS, BUDGET = 16, 32
LAST = 4  # A word is late if one of the last LAST tokens completes it.
GROUPS = ([" beach"], [" dog", " purple"], [" market", " rain", " music"])
FOUR = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
        "kind": {"enum": ["a", "b", "other"]},
    },
    "required": ["name", "age", "kind"],
}
TWO = {
    "type": "object",
    "properties": {"place": {"type": "string"}, "people": {"type": "integer"}},
    "required": ["place", "people"],
}


class Found(NamedTuple):
    """Measured value, with the part of the benchmark, the case and the name of the quantity."""

    part: str
    case: str
    name: str
    value: float


class Bench:
    """Model, guide and sizes of the measurements."""

    def __init__(self, args: argparse.Namespace):
        self.model, self.tokenizer = smollm2.load_smollm2()
        pack_linears(self.model)
        self.samples, self.rounds, self.rows = args.samples, args.rounds, args.rows
        self.prompt = question(self.tokenizer, "Tell me about", "a small town by the sea")
        self.read = self.model(self.prompts(1)[:, :-1], use_cache=True).past_key_values
        self.guide = learned(self.model, self.tokenizer, args.guide)
        self.size = self.model.get_output_embeddings().weight.shape[0]

    def prompts(self, rows: int) -> Tensor:
        return self.prompt.expand(rows, -1)

    def write(self, rows: int, budget: int, how: Any) -> Tensor:
        """Sample new tokens ``(B, T)``."""
        ids = self.prompts(rows)
        cache = copy.deepcopy(self.read)  # the prompt without its last token, computed once
        cache.batch_repeat_interleave(rows)
        settings = {"max_new_tokens": budget, "do_sample": True, "top_k": 0, "pad_token_id": 2}
        found = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            logits_processor=[how],
            **settings,
        )
        return found[:, ids.shape[1] :]

    def text(self, tokens: Tensor) -> str | None:
        """Decode a row of new tokens; return None if it has no end token."""
        ends = (tokens == self.tokenizer.eos_token_id).nonzero()
        return self.tokenizer.decode(tokens[: int(ends[0])]) if len(ends) else None


def learned(model: Any, tokenizer: Any, folder: Path) -> Guide:
    """Load the guide of a folder; if the folder has no guide, first train a guide and save it
    there."""
    if not (folder / "guide.safetensors").exists():
        things = ("a small town by the sea", "rain", "your day", "a river", "cooking", "music")
        prompts = [question(tokenizer, "Tell me about", x).tolist() for x in things]
        start = time.perf_counter()
        guide = control.distil(model, prompts, 512, eos_token_id=tokenizer.eos_token_id)
        print(f"guide: learned in {time.perf_counter() - start:.0f} s")
        guide.save(folder)
    guide = Guide.load(folder)
    print(f"guide: {guide}, {guide.measures}")
    return guide


# --- satisfaction and words -----------------------------------------------------------------------
def satisfied(bench: Bench) -> Iterator[Found]:
    """Yield the share of sampled texts that an independent check accepts."""

    def is_json(text: str) -> bool:
        value = json.loads(text)
        place, people = value["place"], value["people"]
        return set(value) == set(TWO["properties"]) and type(people) is int and str(place) == place

    given, tokenizer = {"vocab_size": bench.size}, bench.tokenizer
    date = r"\d{4}-\d\d-\d\d"
    kinds: dict[str, tuple[Constraint, int, Callable[[str], bool]]] = {
        "date": (
            Constraint.regex(date, tokenizer, **given),
            12,
            lambda t: re.fullmatch(date, t) is not None,
        ),
        "choice": (
            Constraint.choice(["yes", "no", "it depends"], tokenizer, **given),
            5,
            lambda t: t in ("yes", "no", "it depends"),
        ),
        "json": (Constraint.json_schema(TWO, tokenizer, **given), 24, is_json),
        "words": (
            Constraint.keywords(tokenizer, ["sea"], ["fish"], **given),
            12,
            lambda t: "sea" in t and "fish" not in t,
        ),
    }
    each = -(-bench.samples // len(kinds))
    for name, (constraint, budget, holds) in kinds.items():
        good = done = 0
        while done < each:
            rows = min(64, each - done)
            how = ConstraintProcessor(constraint, bench.guide, max_new_tokens=budget)
            texts = [bench.text(t) for t in bench.write(rows, budget, how)]
            good += sum(text is not None and holds(text) for text in texts)
            done += rows
        yield Found("satisfied", name, "samples", done)
        yield Found("satisfied", name, "share", good / done)


def words(bench: Bench) -> Iterator[Found]:
    """Yield the share of early words and the nats per token, with the mask and with a guide."""
    for group in GROUPS:
        one = Constraint.keywords(bench.tokenizer, group, vocab_size=bench.size)
        for law, guide in (("mask", None), ("guided", bench.guide)):
            torch.manual_seed(1)
            how = ConstraintProcessor(one, guide, max_new_tokens=BUDGET)
            tokens = bench.write(bench.rows, BUDGET, how)
            early = [said(bench, row, group) < BUDGET - LAST for row in tokens]
            case = f"{len(group)} words"
            yield Found(law, case, "early", sum(early) / len(early))
            yield Found(law, case, "nats", nats(bench, tokens))


def said(bench: Bench, row: Tensor, group: list[str]) -> int:
    """Return the position of the token that completes the last word of ``group``."""
    for end in range(1, len(row) + 1):
        text = bench.tokenizer.decode(row[:end])
        if all(word in text for word in group):
            return end - 1
    return len(row)


def nats(bench: Bench, tokens: Tensor) -> float:
    """Return the mean nats per token of the rows under the model, including end tokens."""
    ids = torch.cat([bench.prompts(len(tokens)), tokens], 1)
    law = bench.model(ids).logits[:, -len(tokens[0]) - 1 : -1].log_softmax(-1)
    cost = -law.gather(2, tokens[..., None])[..., 0]
    ends = (tokens == bench.tokenizer.eos_token_id).long()
    own = ends.cumsum(1) - ends == 0
    return float(cost[own].mean())


# --- time that constraints add --------------------------------------------------------------------
def midway(bench: Bench, count: int) -> tuple[list[Row | None], Tensor]:
    """Return constraint states of ``count`` rows after eight new tokens, and the next logits."""
    letters = "abcdefghijklmnop"
    rows: list[Row | None] = []
    for i in range(count):
        listed = [f" {letters[i]}{x}" for x in ("round", "hill", "lamp")[: 1 + i % 3]]
        one = Constraint.keywords(bench.tokenizer, listed, vocab_size=bench.size)
        rows.append(Row.first(Plan(one, BUDGET, 0, bench.guide)))
    ids = bench.prompts(count)
    torch.manual_seed(2)
    for _ in range(8):
        scores = bench.model(ids).logits[:, -1]
        tokens = torch.multinomial(control.apply(rows, scores)[0].softmax(-1), 1)
        rows, ids = control.advance(rows, tokens[:, 0].tolist()), torch.cat([ids, tokens], 1)
    return rows, bench.model(ids).logits[:, -1]


def overhead(bench: Bench) -> Iterator[Found]:
    """Yield the time that 16 constraints add to a step of 16 rows, as a share of the step."""
    from lora_ext.methods.mtpc._trunk import cache_argument, roomy_cache

    rows, scores = midway(bench, ROWS)
    free: list[Row | None] = [None] * ROWS
    cache, ids = roomy_cache(128), bench.prompts(ROWS)
    name = cache_argument(bench.model)
    bench.model(ids, use_cache=True, **{name: cache})
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        bench.model(ids[:, :1], use_cache=True, **{name: cache})
        cache.crop(-1)

    def dense() -> None:
        control.apply(rows, scores)

    def drawn(which: list[Row | None]) -> int:
        def numbers(left, count):
            return torch.rand(len(left), count, 2, generator=generator)

        return control.draw(which, scores, 1.0, numbers)[1]

    calls = {
        "step": step,
        "dense": dense,
        "sparse": lambda: drawn(rows),
        "plain": lambda: drawn(free),
        "advance": lambda: control.advance(rows, [500] * ROWS),
    }
    times = interleaved(calls, rounds=bench.rounds)
    share = {name: t.over(times["step"]) for name, t in times.items()}
    moving = share["advance"]
    yield Found("overhead", "dense", "share", share["dense"] + moving)
    yield Found("overhead", "sparse", "share", share["sparse"] - share["plain"] + moving)
    yield Found("overhead", "sparse", "draws a token", drawn(rows) / ROWS)


def every_state(row: Row, guide: Guide, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """Return Ctrl-G's step for a row.

    The step computes ``log r (V,)`` from two matrices ``(S, V)``: for every next state, the product
    of the guide with the vocabulary, and the mask of the tokens that lead to this state.
    """
    plan = row.plan
    assert isinstance(plan, Plan)
    constraint, table = plan.constraint, plan.messages(row.left - 1)
    source, target, edge = plan.edges
    ahead = table[0].to(dtype) * table[1].to(dtype).exp()[:, None]  # (S + 1, H)
    from_state = torch.zeros(constraint.num_states + 1, len(source), dtype=dtype)
    from_state[source, torch.arange(len(source))] = 1  # VE in Ctrl-G's code
    into = torch.zeros(constraint.num_states + 1, len(source), dtype=dtype)
    into[target, torch.arange(len(source))] = 1  # EV in their code, transposed
    of_edge = edge[:, constraint.class_of.long()]  # (S, V)
    tokens = torch.zeros(len(source), constraint.vocab_size, dtype=dtype)
    state, token = (of_edge >= 0).nonzero(as_tuple=True)
    tokens[of_edge[state, token], token] = 1
    assert row.law is not None
    law, emission = row.law.to(dtype), guide.emission.to(dtype)

    def step() -> Tensor:
        joint = (law * ahead) @ emission  # (S + 1, V)
        mask = (from_state[row.state] * into) @ tokens  # (S + 1, V)
        return ((joint * mask).sum(0) / (law @ emission)).log()

    return step


def against_all_states(bench: Bench) -> Iterator[Found]:
    """Check the result for a row with three words; yield the speedup over Ctrl-G's formula."""
    rows, scores = midway(bench, 3)
    row = rows[2]
    assert row is not None and isinstance(row.plan, Plan)
    theirs = every_state(row, bench.guide)
    (ours,) = (block.ratio[0] for block in control.log_ratios([row]))
    live = ours > -torch.inf
    found, exact = theirs(), every_state(row, bench.guide, torch.float64)()
    worst = error_over_bound(ours[live], found[live], exact[live])
    assert worst <= 1 and bool((found[~live] == -torch.inf).all()), worst

    def numbers(left, count):
        return torch.rand(len(left), count, 2)

    calls = {
        "all states": theirs,
        "dense": lambda: control.log_ratios([row]),
        "sparse": lambda: control.draw([row], scores[2:], 1.0, numbers),
    }
    times = interleaved(calls, rounds=bench.rounds)
    yield Found("all states", "1 row", "states", row.plan.constraint.num_states)
    for name in ("dense", "sparse"):
        yield Found("all states", name, "times", times["all states"].over(times[name]))


def ready(bench: Bench) -> Iterator[Found]:
    """Yield the seconds to compile a schema of four fields and to build its tables for 128 tokens,
    without and with the guide's tables."""
    start = time.perf_counter()
    one = Constraint.json_schema(FOUR, bench.tokenizer, vocab_size=bench.size)
    control.log_ratios([Row.first(Plan(one, 128))])
    yield Found("ready", "four fields", "seconds", time.perf_counter() - start)
    yield Found("ready", "four fields", "states", one.num_states)
    Plan(one, 128, 0, bench.guide).messages(128)
    yield Found("ready", "with the guide's tables", "seconds", time.perf_counter() - start)


# --- drafts ---------------------------------------------------------------------------------------
class Masked(_constrained.Constrained):
    """Constrained drafts that are not extended by forced tokens."""

    def with_forced(self, tokens: Tensor) -> Tensor:
        return tokens


class Plain(Masked):
    """Drafts that ignore the constraint."""

    def drafted(self, hidden: Tensor, pending: Tensor | None, uniforms: Tensor) -> Any:
        window = self.decoder.draft(hidden, pending, uniforms)
        self._window, rows = [], self.rows
        self._runs = torch.zeros(len(rows), dtype=torch.long)
        for k, token in enumerate(window.tokens.unbind(1)):
            given = k == 0 and pending is not None
            blocks = [] if given else control.log_ratios(rows)
            self._window.append(_constrained._Position(rows, blocks))
            rows = rows if given else control.advance(rows, token.tolist())
        self._after = rows
        return window


def drafts(bench: Bench) -> Iterator[Found]:
    """Yield tokens per call of plain drafts, of constrained drafts, and of constrained drafts that
    are extended by forced tokens.

    The head is as ``retrofit`` initialises it, without training, so it predicts only the first
    token of a window.
    """
    model, _ = smollm2.load_smollm2()
    settings = mtpc.MtpcConfig(n_token=4, rank=2, kind="cp", emission="adapter")
    torch.manual_seed(0)
    draft = mtpc.retrofit(model, settings)
    tokenizer, rows = bench.tokenizer, min(8, bench.rows)
    cases = {
        "words": Constraint.keywords(tokenizer, [" beach"], ["the"], vocab_size=bench.size),
        "json": Constraint.json_schema(FOUR, tokenizer, vocab_size=bench.size),
        "free": None,
    }
    ways = {"forced": _constrained.Constrained, "masked": Masked, "plain": Plain}
    for case, one in cases.items():
        for way, kind in ways.items() if one is not None else [("plain", Plain)]:
            with mock.patch("lora_ext.methods.mtpc.decoder.Constrained", kind):
                found = draft.decoder(constraint=one).generate(
                    bench.prompts(rows),
                    max_new_tokens=64 if case == "json" else BUDGET,
                    eos_token_id=tokenizer.eos_token_id,
                    seed=3,
                )
            yield Found("drafts", case, way, found.emitted_per_call)


# --- the targets ----------------------------------------------------------------------------------
def criteria(found: list[Found]) -> list[Criterion]:
    """Check the targets of docs/control.md."""
    at = {tuple(f[:3]): f.value for f in found}
    out: list[Criterion] = []

    def target(name: str, value: float, asked: str, good: bool, digits: int = 2) -> None:
        out.append(Criterion(name, asked, f"{value:.{digits}f}", good))

    for f in found:
        if f.part == "satisfied" and f.name == "share":
            count = at["satisfied", f.case, "samples"]
            target(f"satisfied, {f.case}, {count:.0f} texts", f.value, "1", f.value == 1, 4)
        if f.part == "guided" and f.name == "early":
            before = at["mask", f.case, "early"]
            name = f"{f.case} before the last places (mask alone {before:.2f})"
            target(name, f.value, ">= 0.9", f.value >= 0.9)
        if f.part == "guided" and f.name == "nats":
            other = at["mask", f.case, "nats"]
            target(f"{f.case}, nats per token", f.value, f"< {other:.2f}", f.value < other)
    measured = {f.part for f in found}
    if "overhead" in measured:
        for name, most in (("dense", 0.15), ("sparse", 0.05)):
            value = at["overhead", name, "share"]
            target(f"{name}, share of a step", value, f"<= {most}", value <= most, 3)
    if "all states" in measured:
        for way in ("dense", "sparse"):
            value = at["all states", way, "times"]
            target(f"{way}, times less than Ctrl-G's formula", value, ">= 20", value >= 20, 1)
    if "ready" in measured:
        value = at["ready", "four fields", "seconds"]
        target("four fields ready, seconds", value, "<= 2", value <= 2, 1)
    if "drafts" in measured:
        for case in ("words", "json"):
            value, plain = at["drafts", case, "masked"], at["drafts", case, "plain"]
            name = f"{case}, masked drafts, tokens per call"
            target(name, value, f">= {plain:.2f}", value >= plain)
        value, free = at["drafts", "json", "forced"], at["drafts", "free", "plain"]
        target("json with forced runs, tokens per call", value, f">= {free:.2f}", value >= free)
    return out


PARTS: dict[str, Callable[[Bench], Iterator[Found]]] = {
    "ready": ready,
    "overhead": overhead,
    "all-states": against_all_states,
    "drafts": drafts,
    "words": words,
    "satisfied": satisfied,
}


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    default = smollm2.cache_folder() / "smollm2-guide-512"
    parser.add_argument("--guide", type=Path, default=default, metavar="DIR")
    parser.add_argument("--samples", type=int, default=10_000, metavar="N", help="sampled texts")
    parser.add_argument("--rows", type=int, default=ROWS, metavar="N", help="sampled rows")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="timed rounds")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of control.csv")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), help="parts")
    args = parser.parse_args(arguments)
    bench = Bench(args)
    found: list[Found] = []
    for part in args.only:
        for f in PARTS[part](bench):
            print(f"{f.part}, {f.case}: {f.name} {f.value:.4g}", flush=True)
            found.append(f)
    if args.out:
        rows = [{**machine_columns(), **f._asdict()} for f in found]
        append_rows(args.out / "control.csv", rows)
    judged = criteria(found)
    print(criteria_table(judged))
    return int(args.check and not all(c.passed for c in judged))


if __name__ == "__main__":
    sys.exit(main())
