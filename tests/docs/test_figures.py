"""Compare the figures of the README and of pages in docs with the rows in benchmarks/results.

`FIGURES` maps the page and the place of each figure to its computation from the newest rows. A
place is the first cell of a table row, in which `...` matches any text, or a piece of text with `#`
for each number. Values are rounded half up to the number of decimals on the page. Figures have at
least two significant digits.
"""

import csv
import functools
import re
import sys
from collections.abc import Callable
from decimal import ROUND_HALF_UP, Decimal

import pytest
from scripts import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # benchmarks is not a package.
from report import latest, promises

Value = Callable[[], Decimal]
README, BENCHMARKS, TRAINING = "README.md", "docs/benchmarks.md", "docs/training.md"
CLIENTS, MANY = "docs/notes/federated.md", "docs/many_adapters.md"
PACKED = "docs/notes/packed.md"

# Sections in which every figure of a table must be checked by this file.
SECTIONS = (
    (README, "Speed"), (BENCHMARKS, "LoRA on the CPU"), (BENCHMARKS, "Circuits on the CPU"),
    (TRAINING, "What a step can gain"), (CLIENTS, "Many clients in one batch"),
    (PACKED, "Accuracy"),
)  # fmt: skip


@functools.cache
def rows(file: str) -> list[dict[str, str]]:
    with (ROOT / f"benchmarks/results/{file}.csv").open(newline="") as lines:
        return sorted(csv.DictReader(lines), key=lambda row: row["date"])


def value(file: str, column: str = "over_lora_ext", **wanted: str) -> Value:
    def newest() -> Decimal:
        found = [row for row in rows(file) if wanted.items() <= row.items()]
        assert found, f"benchmarks/results/{file}.csv: expected a row with {wanted}, found none"
        (row,) = (row for row in found if row["date"] == found[-1]["date"])  # one row per run
        return Decimal(row[column])

    return newest


def of(function: Callable[..., Decimal], *values: Value) -> Value:
    return lambda: function(*(value() for value in values))


lora = functools.partial(value, "lora_cpu")
circuit = functools.partial(value, "circuit_cpu", threads="1", rows="64", components="32")
engine = functools.partial(value, "circuit_engine_cpu", threads="1")
clients = functools.partial(value, "clients_cpu")
gain = functools.partial(value, "vllm_cpu", "gain", case="r16", dtype="float32")


def step(targets: str, kind: str, provider: str, column: str = "over_peft") -> Value:
    case = f"step, {targets}, 1 adapter, 4 x 128 tokens, dropout {kind}"
    return value("whole_steps_cpu", column, case=case, provider=provider)


def hmm(provider: str, rank: int, part: str) -> Value:
    return engine(threads="2", table="hmm", case=f"r = {rank}, {part}", provider=provider)


AMD, INTEL = "AMD EPYC", "Intel(R) Xeon(R) Processor"


def packed(over: str, rows: int, provider: str, matrix: str = "model", cpu: str = AMD) -> Value:
    case = f"decode {rows} rows of {rows} adapters"
    how = {"matrix": matrix, "dtype": "float32", "case": case, "provider": provider, "cpu": cpu}
    return value("packed_cpu", over, **how)


def accuracy(name: str) -> list[Value]:
    columns = {"bits_per_weight": 1, "kl": 1000, "same_token": 100}
    return [of(lambda v, by=by: v * by, value("packed_accuracy", column, format=name))
            for column, by in columns.items()]  # fmt: skip


HEADS = ("cp", "hmm")
KINDS, DROPOUT = ("0.0, float32", "0.0, float32, oneDNN off", "0.0, autocast"), "0.1, float32"
OURS, CHUNKED, TARGETS = "lora_ext", "lora_ext, chunked loss", ("q and v", "all linear")
STEPS = {p: [step(t, k, p) for t in TARGETS for k in KINDS] for p in (OURS, CHUNKED)}
ROUTERS = [
    value(
        "whole_steps_cpu", "over_peft", provider=OURS,
        case=f"step, all linear, 8 adapters, {r} top 2, 4 x 128 tokens, dropout 0.0, float32")
    for r in ("X-LoRA", "Arrow")
]  # fmt: skip
DROPOUT_STEPS = [step(t, DROPOUT, p) for t in TARGETS for p in (OURS, CHUNKED)]
LIMITS = [step(t, k, "peft", "over_base") for t in TARGETS for k in KINDS]
EIGHT = [f"step of 8 adapters x {tokens} tokens" for tokens in (16, 64)]
MANY_STEPS = [lora("over_peft", case=case, provider=OURS) for case in EIGHT]
VLLM = [gain(kind=kind, provider=OURS) for kind in ("decode", "prefill")]
SHARES_OF_PEFT = [of(lambda ratio: 1 / ratio, ratio) for ratio in MANY_STEPS]
DECODE, PREFILL = (
    [lora("over_base", case=case, provider=p) for p in (OURS, "peft")]
    for case in ("decode 16 rows of 16 adapters", "prefill 8 rows of 8 adapters x 128")
)
RANKS, PARTS = (16, 32, 64, 128, 256, 512), ("forward", "forward and backward")
HMM_PEERS = {
    "jax.jit, lax.scan, scaled": "jax.jit, scaled", "jax.jit, lax.scan": "jax.jit",
    "torch, stacked, scaled": "torch, scaled", "torch, stacked": "torch",
    "libcirkit (target 3)": "libcirkit",
}  # fmt: skip
FASTEST = {p: [of(min, *(hmm(x, r, p) for x in HMM_PEERS.values())) for r in RANKS] for p in PARTS}

FIGURES: dict[tuple[str, str], list[Value]] = {
    (README, "time of a decode step of SmolLM2's shape, 16 rows with 16 adapters..."): DECODE,
    **{(page, place): [packed("over_base", 16, "packed")] for page, place in (
        ("docs/packed.md", "a packed decode step takes # of the time"),
        (MANY, "divided by that of the unpacked model without adapters | # |"))},
    (README, "the same for SmolLM2-135M with [packed]..."): [
        packed("over_base", 16, "packed", cpu=cpu) for cpu in (AMD, INTEL)],
    ("docs/packed.md", "figures are # in float32 (# with one row) and #, # and # with 8 bits"): [
        *(packed("over_base", n, "packed", cpu=INTEL) for n in (16, 1)),
        *(packed("over_base", n, "8 bits", "bits", INTEL) for n in (1, 4, 16))],
    ("docs/packed.md", "With 8 bits it takes #, # and # of that time with 1, 4 and 16 rows"):
        [packed("over_base", n, "8 bits", "bits") for n in (1, 4, 16)],
    **{(PACKED, name): accuracy(name) for name in (
        *(f"{kind}, group {n}" for kind in ("8 bits", "4 bits", "4 bits, minimum")
            for n in (32, 64, 128)),
        *(f"4 bits, group {n}; head 8 bits" for n in (32, 64)),
        *(f"GGUF {kind}" for kind in ("Q8_0", "Q4_0", "Q4_1", "Q4_0; head Q8_0")),
        *(f"{n} bits, group 64, int8 activations" for n in (8, 4)))},
    (README, "PEFT's time over ours, forward and backward...: with dropout; without"): [
        lora("over_peft", case=f"layers, dropout {p}, geometric mean") for p in ("0.1", "0.0")],
    (README, "time of the formula under `torch.compile` over ours...`cp`; `hmm`"): [
        circuit(case=PARTS[1], kind=k, provider="torch.compile") for k in HEADS],
    (README, "time of the fastest of jax.jit, torch and libcirkit...forward; with backward"): [
        of(pick, *FASTEST[part]) for part in PARTS for pick in (min, max)],
    (README, "time of vLLM 0.32's own LoRA...of rank 16: decode; prefill"): VLLM,
    (README, "time over ours, 32 federated clients...client after another; `torch.func.vmap`"): [
        clients(case="32 clients x 16, d = 64", provider=p) for p in ("loop", "vmap")],
    (README, "time of one training step with 8 adapters...64 tokens each"): SHARES_OF_PEFT,
    (README, "float32, dropout 0.1"): DROPOUT_STEPS[::2],
    (README, "float32; with oneDNN off; autocast to bfloat16"): STEPS[OURS],
    (README, "the same three with `chunked_loss(model)`; dropout 0.1 with it"): [
        *STEPS[CHUNKED][:3], DROPOUT_STEPS[1], *STEPS[CHUNKED][3:], DROPOUT_STEPS[3]],
    (README, "limit without dropout: PEFT's time over the model without adapters"): [
        of(pick, *limits) for limits in (LIMITS[:3], LIMITS[3:]) for pick in (min, max)],
    (BENCHMARKS, "PEFT took # times the model without adapters in the first run"): [
        lora("over_base", case="decode 8 rows of 8 adapters", provider="peft")],
    **{(BENCHMARKS, f"{case}:...{p}{end}"): [circuit(case=case, kind=k, provider=p) for k in HEADS]
        for case in (*PARTS, "all prefixes")
        for p, end in (("torch.compile", "..."), ("torch", ""))},
    (BENCHMARKS, "logits read once, forward, over this machine's copy (target 0.7)"): [
        circuit("of_copy", case="forward", kind=k, provider=OURS) for k in HEADS],
    **{(BENCHMARKS, place): [hmm(peer, rank, part) for rank in RANKS for part in PARTS]
        for place, peer in HMM_PEERS.items()},
    (BENCHMARKS, "best form takes # / # times our time at 16 states and # / # times at 64"): [
        hmm("torch.compile", rank, part) for rank in (16, 64) for part in PARTS],
    **{(BENCHMARKS, place): [engine(table=t, case=c.format(n), provider=p) for n in sizes]
        for place, t, c, sizes, p in (
            ("EM on 512...hmmlearn, scaling", "em", "r = {}", (8, 32), "hmmlearn, scaling"),
            ("the same: hmmlearn, log", "em", "r = {}", (8, 32), "hmmlearn, log"),
            ("an epoch on...RAT-SPN...", "digits", "RAT-SPN, {} units", (8, 16), "einsum layers"),
            ("the same: libcirkit, other...", "digits", "RAT-SPN, {} units", (8, 16), "libcirkit"),
            ("an epoch on...Chow-Liu...", "digits", "HCLT, {} units", (16, 32), "einsum layers"),
            ("the same: libcirkit", "digits", "HCLT, {} units", (16, 32), "libcirkit"))},
    **{(BENCHMARKS, p): [engine(table="rat_spn", case=f"{n} units, {part}", provider=p)
            for n in (8, 16, 32) for part in PARTS]
        for p in ("einsum layers, torch.compile", "einsum layers")},
    **{(CLIENTS, place): [clients(case=case, provider=p) for p in ("loop", "peft", "vmap")]
        for place, case in (
            ("model of four square layers, ranks 4 to 8: 8 x 16, 64", "8 clients x 16, d = 64"),
            *((f"same model: {n} x {b}, {d}...", f"{n} clients x {b}, d = {d}")
                for n, b, d in ((32, 16, 64), (64, 16, 64), (32, 16, 256), (32, 64, 256))),
            ("Llama of four layers, 16 clients x 4...", "Llama, 16 clients x 4, d = 64"))},
    (TRAINING, "PEFT's step over the bare model's: float32; with oneDNN off; autocast"): LIMITS,
    (TRAINING, "PEFT's over ours: float32; with oneDNN off; autocast"): STEPS[OURS],
    (TRAINING, "with `chunked_loss(model)` too"): STEPS[CHUNKED],
    (TRAINING, "dropout 0.1: PEFT's over the bare model's"): [
        step(t, DROPOUT, "peft", "over_base") for t in TARGETS],
    (TRAINING, "dropout 0.1: PEFT's over ours; with `chunked_loss(model)` too"): DROPOUT_STEPS,
    (TRAINING, "16 tokens each take # of PEFT's eight steps, with 64 tokens #"): SHARES_OF_PEFT,
    (TRAINING, "takes # times as long as ours with X-LoRA and # times with Arrow"): ROUTERS,
    ("docs/notes/training.md", "the ratios were # (16 tokens) and # (64 tokens)"): MANY_STEPS,
    (MANY, "16 rows of 16 adapters, over the model without adapters | #; PEFT #"): DECODE,
    (MANY, "8 adapters, the same ratio | #; PEFT #"): PREFILL,
    ("docs/vllm.md", "decode is # and prefill # times"): VLLM,
}  # fmt: skip


def table_rows(page: str) -> list[tuple[str, list[str]]]:
    """Return the first cell, and the numbers in the other cells, of each table row in the
    :data:`SECTIONS` of a page."""
    parts = re.split(r"^## ", (ROOT / page).read_text(), flags=re.M)
    chosen = "".join(p for p in parts if (page, p.partition("\n")[0]) in SECTIONS)
    body = re.sub(r"^\|.*\n\|-.*$", "", chosen, flags=re.M)  # removes table headers
    lines = re.findall(r"^\| *([^|]*?) *\|(.*)\|$", body, re.M)
    return [(label, re.findall(r"\d+(?:\.\d+)?", cells)) for label, cells in lines]


def matches(place: str, label: str) -> bool:
    return bool(re.fullmatch(re.escape(place).replace(r"\.\.\.", ".*"), label))


def numbers(page: str, place: str) -> list[str]:
    """Return the numbers at a place of the page, which must occur exactly once."""
    if "#" in place:
        text = " ".join((ROOT / page).read_text().split())
        pattern = re.escape(place).replace(r"\#", r"(\d+(?:\.\d+)?)")
        found = [list(match.groups()) for match in re.finditer(pattern, text)]
    else:
        found = [shown for label, shown in table_rows(page) if matches(place, label)]
    assert len(found) == 1, f"{page}: expected '{place}' once, found it {len(found)} times"
    return found[0]


@pytest.mark.parametrize(("page", "place"), FIGURES)
def test_figures_equal_the_newest_rows(page: str, place: str) -> None:
    shown = numbers(page, place)
    pairs = zip(FIGURES[page, place], shown, strict=True)
    assert shown == [str(v().quantize(Decimal(text), ROUND_HALF_UP)) for v, text in pairs]
    assert all(len(text.replace(".", "").lstrip("0")) > 1 for text in shown)


def test_page_has_the_table_that_report_prints() -> None:
    page = " ".join((ROOT / BENCHMARKS).read_text().split())
    printed = promises(latest(rows("lora_cpu"))).splitlines()
    assert [line for line in printed if " ".join(line.split()) not in page] == []


@pytest.mark.parametrize("page", dict(SECTIONS))
def test_every_row_of_a_result_table_is_checked_once(page: str) -> None:
    printed = re.findall(r"^\| (.*?) \|", promises(latest(rows("lora_cpu"))), re.M)
    places = [place for found, place in FIGURES if found == page]
    places += printed if page == BENCHMARKS else []
    labels = [label for label, _ in table_rows(page)]
    checks = {x: sum(matches(p, x) for p in places) * labels.count(x) for x in labels}
    assert {label: number for label, number in checks.items() if number != 1} == {}
