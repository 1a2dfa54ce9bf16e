"""MoD on a small Llama and a Markov source that changes: `python benchmarks/mod.py --check`.

A language model of six layers learns an order-2 Markov source and is then tuned on the
half-and-half mixture of that source with another: by LoRA, LoRA with MoD, MoD alone, and both on
the last three layers. Reported are cross entropies on unseen sequences, of the mixture and of each
layer by itself, and parameters. Besides: how much memory the loss takes at a vocabulary of 32000,
of the plain model, of MoD and of k tensors of logits; and how far mixing before the head is from
mixing logits.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import study
import torch
import transformers
from study import DIRECTION, NOT_REPRODUCED, REPRODUCED, Claim, Criterion, Row, Rows, Verdict
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from lora_ext.methods import mod
from lora_ext.nn import LoraConfig, decoder_layers, wrap

CLAIM = Claim(
    paper="Tuning Language Models by Mixture-of-Depths Ensemble (arXiv 2410.13077)",
    claim="Added to a tuning method, an ensemble of the last layers improves it, modestly; late "
    "layers can be tuned to losses close to the last layer's; in the place of trainable modules it "
    "is nearly as good with far fewer parameters.",
    setup="A Llama of 6 layers, width 64, vocabulary 32, pretrained for 400 steps on an order-2 "
    "Markov source, tuned for 200 on its half-and-half mixture with another; LoRA of rank 4 on q, "
    "v, up, down; lambda 0.1, k = 3.",
    seeds=3,
)
VOCAB, WIDTH, LAYERS, LENGTH = 32, 64, 6, 32
TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
LAST = tuple(range(LAYERS - 3, LAYERS))
RATE, RANK, ALPHA = 3e-3, 4, 8
#: LoRA's layers, None where there is no LoRA; and whether MoD is there.
ARMS: dict[str, tuple[tuple[int, ...] | None, bool]] = {
    "LoRA": (tuple(range(LAYERS)), False),
    "LoRA + MoD": (tuple(range(LAYERS)), True),
    "MoD": (None, True),
    "LoRA, last 3": (LAST, False),
    "LoRA + MoD, last 3": (LAST, True),
}
LARGE, TOKENS, HIDDEN = 32000, 256, 256  # vocabulary, tokens and width where memory is measured


@dataclass(frozen=True)
class Sizes:
    """Of the runs."""

    pretraining: int = 400
    tuning: int = 200
    batch: int = 16
    held_out: int = 256
    large: int = LARGE


QUICK = Sizes(4, 4, 4, 8, 2000)


# -------------------------------------------------------------------------------------------------
# The source


def markov(generator: torch.Generator) -> Tensor:
    """Transition law ``(V, V, V)`` of an order-2 source: the two last tokens add their logits, as a
    law of its own for each pair of them is more than this model learns from so few tokens."""
    older, newer = (torch.randn(VOCAB, VOCAB, generator=generator) for _ in range(2))
    return (older[:, None] + newer).softmax(-1)


def sequences(law: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``(count, LENGTH)`` tokens."""
    rows = torch.randint(0, VOCAB, (count, 2), generator=generator)
    while rows.shape[1] < LENGTH:
        following = law[rows[:, -2], rows[:, -1]]
        rows = torch.cat([rows, torch.multinomial(following, 1, generator=generator)], 1)
    return rows


def llama(vocab: int, width: int, layers: int) -> Any:
    """A Llama with random weights, in training mode."""
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=max(LENGTH, TOKENS),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


# -------------------------------------------------------------------------------------------------
# Measuring


def measure(seeds: Sequence[int], quick: bool) -> Iterator[Row]:
    """Rows of the parts "identity", "memory" and "arm"."""
    sizes = QUICK if quick else Sizes()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small gain nothing from threads
    try:
        for seed in seeds:
            yield {"part": "identity", "seed": seed, "error": identity(seed)}
        yield {"part": "memory", "seed": 0, **memory(sizes.large)}
        for seed in seeds:
            yield from arms(seed, sizes)
    finally:
        torch.set_num_threads(threads)


def arms(seed: int, sizes: Sizes) -> Iterator[Row]:
    """Every arm from the same pretrained model, with the same batches in the same order."""
    generator = torch.Generator().manual_seed(seed)
    first, second = markov(generator), markov(generator)
    before = sequences(first, sizes.pretraining * sizes.batch, generator)
    half = sizes.tuning * sizes.batch // 2
    after = torch.cat([sequences(law, half, generator) for law in (first, second)])
    after = after[torch.randperm(len(after), generator=generator)]
    held_out = torch.cat(
        [sequences(law, sizes.held_out // 2, generator) for law in (first, second)]
    )
    torch.manual_seed(seed)
    base = llama(VOCAB, WIDTH, LAYERS)
    train(base, before, sizes.batch, f"seed {seed}: pretraining")
    yield {"part": "arm", "seed": seed, "arm": "untuned", **evaluate(base, held_out)}
    for arm, (layers, with_mod) in ARMS.items():
        model = copy.deepcopy(base).requires_grad_(False)
        torch.manual_seed(seed)
        if layers is not None:
            settings: Any = {"target_modules": list(TARGETS), "layers_to_transform": list(layers)}
            wrap(model, LoraConfig(r=RANK, lora_alpha=ALPHA, **settings))
        if with_mod:
            mod.apply(model)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        train(model, after, sizes.batch, f"seed {seed}: {arm}")
        row = {"part": "arm", "seed": seed, "arm": arm, "parameters": trained}
        yield {**row, **evaluate(model, held_out)}


def train(model: Any, data: Tensor, batch: int, name: str) -> None:
    """AdamW over the data once."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for rows in tqdm(data.split(batch), desc=name, unit="step", leave=False):
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def evaluate(model: Any, data: Tensor) -> Row:
    """Cross entropy in nats a token; of each layer by itself, and its part, where there is MoD."""
    out = model.eval()(input_ids=data, labels=data, use_cache=False)
    if not isinstance(out, mod.ModOutput):
        return {"ce": out.loss.item()}
    layers = {f"layer_{e}": loss for e, loss in enumerate(out.layer_losses.tolist())}
    parts = {f"weight_{e}": w for e, w in enumerate(out.routing_weights.mean((0, 1)).tolist())}
    return {"ce": out.ce_loss.item(), **layers, **parts}


@torch.no_grad()
def identity(seed: int) -> float:
    """The largest difference between logits mixed before the head and k logits mixed, float32."""
    torch.manual_seed(seed)
    model = llama(VOCAB, WIDTH, LAYERS).eval()
    mod.apply(model)
    for parameter in model.mod.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    hiddens: list[Tensor] = []
    for block in list(decoder_layers(model))[-3:]:
        block.register_forward_hook(lambda _, __, out: hiddens.append(out))
    ids = torch.randint(0, VOCAB, (4, LENGTH))
    found = model(input_ids=ids)
    norms = [*model.mod.norms, model.model.norm]
    explicit = sum(
        found.routing_weights[..., e, None] * model.lm_head(norm(h))
        for e, (norm, h) in enumerate(zip(norms, hiddens, strict=True))
    )
    return (found.logits - explicit).abs().max().item()


def memory(vocab: int) -> Row:
    """Peaks beyond what stands before the head: the plain loss, MoD's, and that of k logits."""
    torch.manual_seed(0)
    model = llama(vocab, HIDDEN, 3).requires_grad_(False)
    ids = torch.randint(0, vocab, (1, TOKENS))
    hiddens = [torch.randn(1, TOKENS, HIDDEN, requires_grad=True) for _ in range(3)]

    # The blocks are replaced by given hidden states: what is measured is the loss alone.
    for block, hidden in zip(decoder_layers(model), hiddens, strict=True):
        block.forward = lambda *_, hidden=hidden, **__: hidden * 1

    def loss() -> Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def naive() -> Tensor:
        norms, weights = [copy.deepcopy(model.model.norm) for _ in range(3)], (0.05, 0.05, 0.9)
        each = [model.lm_head(norm(h)) for norm, h in zip(norms, hiddens, strict=True)]
        mixed = sum(w * z for w, z in zip(weights, each, strict=True))
        teacher = each[-1].detach().float().log_softmax(-1)
        kl = [
            F.kl_div(z.float().log_softmax(-1), teacher, log_target=True, reduction="sum")
            for z in each[:-1]
        ]
        return model.loss_function(mixed, ids, vocab) + 0.1 * sum(kl) / TOKENS

    plain, dense = peak(loss), peak(naive)
    mod.apply(model.train())
    ours = peak(loss)
    return {
        "plain_mib": plain / 2**20,
        "mod_mib": ours / 2**20,
        "naive_mib": dense / 2**20,
        "mod_ratio": ours / plain,
        "naive_ratio": dense / plain,
        "vocab": vocab,
    }


def peak(loss: Any) -> int:
    """Bytes that forward and backward hold at most, beyond what was there; by the allocator."""
    loss().backward()  # gradients stand, and nothing is built for the first time
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        loss().backward()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    held = most = 0
    for event in sorted(
        (e for e in events if e.get("name") == "[memory]"), key=lambda event: event["ts"]
    ):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


# -------------------------------------------------------------------------------------------------
# Judging


def criteria(rows: Rows) -> list[Criterion]:
    """Those of the specification."""
    found = []
    error = max(row["error"] for row in rows if row["part"] == "identity")
    found.append(
        Criterion(
            "mixing before the head is mixing logits", "<= 1e-5", f"{error:.1e}", error <= 1e-5
        )
    )
    sizes = next(row for row in rows if row["part"] == "memory")
    name = f"peak of the loss at V = {sizes['vocab']}, k = 3, of the plain model's"
    ratio, naive = sizes["mod_ratio"], sizes["naive_ratio"]
    found.append(Criterion(name, "< 1.5", f"{ratio:.2f}", ratio < 1.5))
    found.append(Criterion("the same of k logits", "> 2.5", f"{naive:.2f}", naive > 2.5))
    gap = max(
        row[f"layer_{e}"] - row["layer_2"] for row in arm(rows, "LoRA + MoD") for e in range(2)
    )
    found.append(
        Criterion("late layers above the last, nats", "<= 0.06", f"{gap:.3f}", gap <= 0.06)
    )
    parts = [parameters(rows, "MoD") / parameters(rows, "LoRA"), min(gains(rows))]
    found.append(
        Criterion("MoD alone: of LoRA's parameters", "<= 3 %", f"{parts[0]:.1%}", parts[0] <= 0.03)
    )
    found.append(
        Criterion(
            "MoD alone: of LoRA's gain, each seed", ">= 40 %", f"{parts[1]:.0%}", parts[1] >= 0.4
        )
    )
    added = ce(rows, "LoRA + MoD") - ce(rows, "LoRA")
    found.append(
        Criterion("LoRA + MoD above LoRA, nats", "<= 0.005", f"{added:+.4f}", added <= 0.005)
    )
    last = ce(rows, "LoRA + MoD, last 3") - ce(rows, "LoRA")
    found.append(
        Criterion("LoRA + MoD, last 3, above LoRA, nats", "<= 0.04", f"{last:+.4f}", last <= 0.04)
    )
    return found


def verdict(rows: Rows) -> Verdict:
    """Reproduced: every criterion, and MoD improves LoRA in the mean. Direction only: it replaces
    LoRA at a fraction of its parameters, but does not improve it."""
    added = ce(rows, "LoRA + MoD") - ce(rows, "LoRA")
    share, gain = parameters(rows, "MoD") / parameters(rows, "LoRA"), gains(rows)
    figure = (
        f"alone {share:.1%} of LoRA's parameters for {sum(gain) / len(gain):.0%} of its gain; "
        f"added to LoRA {added:+.4f} nats a token"
    )
    met = all(c.passed for c in criteria(rows))
    if met and added < 0:
        return Verdict(figure, REPRODUCED)
    return Verdict(figure, DIRECTION if min(gain) >= 0.4 else NOT_REPRODUCED)


def show(rows: Rows) -> None:
    """All numbers of the arms."""
    lines = []
    for name in ("untuned", *ARMS):
        these = arm(rows, name)
        each = ", ".join(f"{row['ce']:.4f}" for row in these)
        late: list[str] = []
        if isinstance(these[0]["layer_0"], float):
            late = [
                " ".join(f"{study.mean(these, f'{kind}_{e}'):.3f}" for e in range(3))
                for kind in ("layer", "weight")
            ]
        count = these[0]["parameters"]
        lines.append((name, count, f"{study.mean(these, 'ce'):.4f}", each, *(late or ["", ""])))
    header = ("arm", "parameters", "cross entropy", "by seed", "layers alone", "their weights")
    print(study.markdown(header, lines) + "\n")
    sizes = next(row for row in rows if row["part"] == "memory")
    print(
        "peak of the loss: "
        + ", ".join(f"{n} {sizes[f'{n}_mib']:.0f} MiB" for n in ("plain", "mod", "naive"))
        + "\n"
    )


def arm(rows: Rows, name: str) -> Rows:
    """The rows of an arm."""
    return [row for row in rows if row["part"] == "arm" and row["arm"] == name]


def ce(rows: Rows, name: str) -> float:
    """Mean cross entropy of an arm."""
    return study.mean(arm(rows, name), "ce")


def parameters(rows: Rows, name: str) -> int:
    """What an arm trains."""
    return arm(rows, name)[0]["parameters"]


def gains(rows: Rows) -> list[float]:
    """By seed, what MoD alone gains, of what LoRA gains."""
    columns = [[row["ce"] for row in arm(rows, name)] for name in ("untuned", "MoD", "LoRA")]
    return [
        (untuned - ours) / (untuned - lora) for untuned, ours, lora in zip(*columns, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(study.run(sys.modules[__name__]))
