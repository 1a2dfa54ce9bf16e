"""SmolLM2 for the studies: rows of text, training, and the loss on unseen texts.

With ``quick``, a tiny random byte-level Llama takes its place.
"""

from __future__ import annotations

import copy
import functools
import random
import sysconfig
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import study
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_ext.layers import IGNORE

from . import material

KINDS = ("python", "packages")  # the standard library's source; one line per Debian package


class Bytes:
    """Byte-level tokenizer with the methods that studies use."""

    pad_token_id = eos_token_id = 256
    eos_token, pad_token, padding_side, vocab_size = "\0", "\0", "right", 257

    def __call__(self, text: str, **_: Any) -> Any:
        from transformers import BatchEncoding

        return BatchEncoding({"input_ids": list(text.encode())})

    def decode(self, ids: Iterable[int], **_: Any) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")


@dataclass(frozen=True)
class Language:
    """Frozen base model, its tokenizer, and its hash, which is one of the rows' settings."""

    base: Any
    tokenizer: Any
    hash: str

    def copy(self) -> Any:
        return copy.deepcopy(self.base)

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


@functools.cache
def load(quick: bool) -> Language:
    """Load SmolLM2-135M-Instruct in float32; with ``quick``, the tiny model."""
    if not quick:
        model, tokenizer = material.smollm2()
        return Language(model.requires_grad_(False), tokenizer, material.SMOLLM2.sha256[:12])
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=257,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=256,
        )
        model = LlamaForCausalLM(config)
    return Language(model.eval().requires_grad_(False), Bytes(), "quick")


@functools.cache
def rows_of(kind: str, count: int, length: int, quick: bool) -> Tensor:
    """Return ``(count, length)`` tokens, with one text per row, in a fixed random order."""
    language = load(quick)
    texts = _python() if kind == "python" else _packages(quick)
    random.Random(0).shuffle(texts)
    rows: list[list[int]] = []
    for text in texts:
        ids = language.ids(text[: 20 * length])
        if len(ids) >= length:
            rows.append(ids[:length])
        if len(rows) == count:
            return torch.tensor(rows)
    raise RuntimeError(f"{kind}: expected {count} texts of {length} tokens, found {len(rows)}")


def _python() -> list[str]:
    """Return the top-level functions of the standard library, each with the text up to the next."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts: list[str] = []
    for path in sorted(folder.glob("*.py")):
        text = path.read_text(errors="ignore")
        texts += [f"def {part}" for part in text.split("\ndef ")[1:]]
    return texts


def _packages(quick: bool) -> list[str]:
    """Return texts of six lines about packages each; with ``quick``, of one repeated line."""
    if quick:
        return ["games: a game of chance for two or more players\n" * 20] * 100
    found, names, _ = material.sections(20, 150)
    lines = [f"{names[place]}: {text}\n" for text, place in found]
    return ["".join(lines[i : i + 6]) for i in range(0, len(lines), 6)]


def whole_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the model's loss over all tokens."""
    return model(**batch, use_cache=False).loss


def answer_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss over the labelled tokens; faster than ``whole_loss`` if few tokens have
    labels.

    The head, a fifth of SmolLM2's work, runs only on the states that predict labelled tokens.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    states = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    targets = batch["labels"][:, 1:]
    labelled = targets != IGNORE
    return cross_entropy(model.lm_head(states[labelled]), targets[labelled])


def train(
    model: Any,
    batches: Iterable[dict[str, Tensor]],
    groups: Sequence[dict[str, Any]],
    tick: Callable[[], object] = lambda: None,
    loss: Callable[[Any, dict[str, Tensor]], Tensor] = whole_loss,
    part: str = "",
    clip: float | None = None,
    schedule: Callable[[float], float] | None = None,
) -> None:
    """Run AdamW without weight decay, one step per batch; each group has a learning rate.

    Within a run of a study, the parameters, the optimizer's state and torch's random state are
    saved every five minutes under the name ``part``, and training continues from them. Batches
    must not depend on torch's random state during training.

    Args:
        clip: Largest norm of the gradient, or None.
        schedule: Function that maps ``(i + 1) / n`` to the factor of all learning rates at step i
            of n. It requires that ``batches`` has a length, n.
    """
    model.train()
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    checkpoint, done = study.checkpoint(part or "model"), 0
    if (saved := checkpoint.restored()) is not None:
        done = saved["steps"]
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        with torch.no_grad():
            for parameter, value in zip(parameters, saved["parameters"], strict=True):
                parameter.copy_(value)

    def state() -> dict[str, Any]:
        return {
            "steps": done,
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "parameters": [p.detach() for p in parameters],
        }

    for step, batch in enumerate(batches):
        if step < done:
            continue
        if schedule is not None and isinstance(batches, Sized):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule((step + 1) / len(batches))
        optimizer.zero_grad()
        loss(model, batch).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        done = step + 1
        checkpoint.offer(state)
        tick()
    model.eval()


@torch.no_grad()
def loss_of(model: Any, rows: Tensor, batch: int = 8) -> float:
    """Return the mean cross entropy in nats per token; for MoD, only that of the mixture."""
    total = 0.0
    for part in rows.split(batch):
        out = model(input_ids=part, labels=part, use_cache=False)
        loss = out.loss if getattr(out, "ce_loss", None) is None else out.ce_loss
        total += len(part) * loss.item()
    return total / len(rows)
