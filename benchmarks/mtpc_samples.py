"""Training of a draft for SmolLM2-135M on the model's own answers.

Answers are generated once, greedy and sampled, and stored with the hidden states of every position,
so that training runs no layer of the model. At first, training minimises the divergence between the
draft's and the model's distributions at each token of a window (`ops.chunked_kl`). At the end, it
maximises the overlap of both distributions, which is the acceptance rate of a sampling verifier.
Training is limited by steps and not by seconds, so a busy machine gives the same head.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lean import LeanLlama
from torch import Tensor
from torch.nn import functional as F

from lora_ext import ops
from lora_ext.methods import mtpc
from lora_ext.methods.mtpc._trunk import roomy_cache

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
UNSEEN = 4  # number of things that are not used in training


class Answers(NamedTuple):
    """All answers, concatenated to ``N`` tokens."""

    hidden: Tensor  # (N, D) bfloat16: the state that predicts the token
    tokens: Tensor  # (N,)
    normaliser: Tensor  # (N,): log of the sum of the state's exponentiated logits
    lengths: Tensor  # tokens of each answer


def question(tokenizer: Any, verb: str, thing: str) -> Tensor:
    """Return a question in the chat template, ``(S,)``."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{verb} {thing}."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"][0]


def answers(
    model: Any,
    tokenizer: Any,
    things: Sequence[str],
    new_tokens: int,
    sampled: Sequence[bool],
    file: Path,
) -> Answers:
    """Return the model's answers to all questions about some things, and store them in a file.

    Args:
        model: SmolLM2 in bfloat16.
        sampled: One round of answers per entry, sampled or greedy.
    """
    if file.exists():
        return Answers(*torch.load(file))
    by_length: dict[int, list[Tensor]] = defaultdict(list)
    for thing, verb in itertools.product(things, VERBS):
        ids = question(tokenizer, verb, thing)
        by_length[len(ids)].append(ids)
    lean, start = LeanLlama(model), time.process_time()
    parts: list[Answers] = []
    torch.manual_seed(0)
    for sample in sampled:
        for group in by_length.values():
            for prompts in torch.stack(group).split(128):
                ids, hidden = _answer(lean, prompts, new_tokens, sample)
                parts += _cut(ids, hidden, model.generation_config.eos_token_id)
                done = sum(len(part.tokens) for part in parts)
                print(
                    f"{done} tokens of answers in {time.process_time() - start:.0f} s of CPU",
                    flush=True,
                )
    hidden, tokens, _, lengths = (torch.cat(part) for part in zip(*parts, strict=True))
    weight = model.lm_head.weight.detach()
    sums = [F.linear(h, weight).float().logsumexp(-1) for h in hidden.split(512)]
    found = Answers(hidden, tokens, torch.cat(sums), lengths)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tuple(found), file)
    return found


@torch.no_grad()
def _answer(
    lean: LeanLlama, prompts: Tensor, new_tokens: int, sample: bool
) -> tuple[Tensor, Tensor]:
    """Return new tokens ``(B, T)`` and the states that predict them ``(B, T, D)``."""
    seen: list[Tensor] = []
    hook = lean.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, -1]))
    cache, token, new = roomy_cache(prompts.shape[1] + new_tokens), prompts, []
    for _ in range(new_tokens):
        logits = lean(token, cache=cache, logits_to_keep=1).logits[:, -1].float()
        if sample:
            sums = logits.softmax(-1).cumsum(-1)
            limit = torch.rand(len(sums), 1) * sums[:, -1:]
            token = torch.searchsorted(sums, limit, right=True).clamp(max=sums.shape[1] - 1)
        else:
            token = logits.argmax(-1, keepdim=True)
        new.append(token)
    hook.remove()
    return torch.cat(new, 1), torch.stack(seen, 1)


def _cut(ids: Tensor, hidden: Tensor, eos: int) -> Iterator[Answers]:
    """Yield the answer of every row, up to and including its end token."""
    for row, states in zip(ids, hidden, strict=True):
        ends = (row == eos).nonzero()
        length = int(ends[0]) + 1 if len(ends) else len(row)
        none = torch.empty(0)
        yield Answers(states[:length].clone(), row[:length], none, torch.tensor([length]))


class Batch(NamedTuple):
    """``N`` windows of ``K`` tokens, each after a decided token."""

    hidden: Tensor  # (N, D): state of the token before the decided one
    tokens: Tensor  # (N, 1 + K): the decided token, then the window
    teacher: Tensor  # (N, K, D): the model's states over the window
    normaliser: Tensor  # (N, K)


def places(data: Answers, k: int) -> Tensor:
    """Return the positions in ``data`` of tokens that are followed by ``k`` tokens of the same
    answer."""
    end, found = 0, list[int]()
    for length in data.lengths.tolist():
        found += range(end, end + length - k)
        end += length
    return torch.tensor(found)


def windows(data: Answers, at: Tensor, k: int) -> Batch:
    """Return the windows of ``k`` tokens after the tokens at the positions ``at``."""
    window = at[:, None] + torch.arange(k + 1)
    later = window[:, 1:]
    tokens, teacher = data.tokens[window], data.hidden[later]
    return Batch(data.hidden[at].float(), tokens, teacher, data.normaliser[later])


def batches(data: Answers, k: int, size: int) -> Iterator[Batch]:
    """Yield batches of random windows inside answers; the generator never ends."""
    every = places(data, k)
    while True:
        yield windows(data, every[torch.randint(len(every), (size,))], k)


def learn(
    draft: mtpc.Draft, data: Iterable[Batch], steps: int, rate: float = 2e-3, distil: bool = True
) -> None:
    """Train a draft with a bridge for some steps, with products in bfloat16.

    Args:
        distil: If true, learn from the model's states; this requires one component and windows of
            one token. If false, the loss is the cross entropy of the answers' tokens.
    """
    unembed = draft.head.unembed.detach().bfloat16()
    optimizer = torch.optim.AdamW(draft.parameters(), lr=rate, betas=(0.9, 0.98))
    began = time.process_time()
    for step, batch in enumerate(itertools.islice(data, steps)):
        done = step / steps
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 100) * (1 - done)
        if not distil:
            loss = _cross_entropy(draft, batch)
        elif done < 0.7:
            loss = _divergence(draft, batch, unembed)
        else:
            loss = _missed_overlap(draft, batch, unembed)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            spent = time.process_time() - began
            print(f"step {step + 1}: loss {loss.item():.3f}, {spent:.0f} s of CPU", flush=True)


def window_states(draft: mtpc.Draft, batch: Batch) -> Iterator[Tensor]:
    """Yield the input of the head at every window of the chain, ``(N, D)``."""
    assert draft.bridge is not None
    state, embed = batch.hidden, draft.model.get_input_embeddings()
    n, chain = draft.config.n_token, draft.config.chain
    for k in range(1 + n * (chain - 1)):
        with torch.autocast("cpu", torch.bfloat16):
            state = draft.bridge(state, embed(batch.tokens[:, k]))
        if k % n == 0:
            yield state.float()


def _cross_entropy(draft: mtpc.Draft, batch: Batch) -> Tensor:
    n = draft.config.n_token
    losses = [
        mtpc.window_loss(draft.head, state, batch.tokens[:, 1 + k * n : 1 + (k + 1) * n])[0]
        for k, state in enumerate(window_states(draft, batch))
    ]
    return torch.stack([0.6**k * loss for k, loss in enumerate(losses)]).sum()


def _read(draft: mtpc.Draft, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for every token of a window, the states of the draft and of the model before the
    unembedding."""
    for k, state in enumerate(window_states(draft, batch)):
        yield draft.head.leaves.states(state).bfloat16(), batch.teacher[:, k]


def _divergence(draft: mtpc.Draft, batch: Batch, unembed: Tensor) -> Tensor:
    losses = [
        0.6**k * ops.chunked_kl([state, teacher], unembed, None)
        for k, (state, teacher) in enumerate(_read(draft, batch))
    ]
    return torch.stack(losses).sum()


def _missed_overlap(draft: mtpc.Draft, batch: Batch, unembed: Tensor) -> Tensor:
    """Return the negative overlap of the draft's and the model's distributions.

    The overlap is a sum over positions, weighted by the probability that decoding reaches each.
    """
    loss, survival = torch.tensor(0.0), torch.ones(len(batch.hidden))
    for k, (state, teacher) in enumerate(_read(draft, batch)):
        p = (F.linear(teacher, unembed).float() - batch.normaliser[:, k, None]).exp()
        q = F.linear(state, unembed).float().softmax(-1)
        overlap = torch.minimum(p, q).sum(-1)
        loss = loss - ((survival + 0.05) * overlap).mean()
        survival = survival * _kept(p, q, draft.head.listed.places(batch.tokens[:, 1 + k]))
    return loss


@torch.no_grad()
def _kept(p: Tensor, q: Tensor, place: Tensor) -> Tensor:
    """Return the probability ``min(1, q / p)`` that a drafted token of the text is accepted.

    The probability is 0 for a token outside the shortlist, which has the ``place`` -1.
    """
    at = place.clamp(min=0)[:, None]
    return (q.gather(1, at) / p.gather(1, at))[:, 0].clamp(max=1).masked_fill(place < 0, 0)
