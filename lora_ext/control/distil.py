"""Learning a guide from texts that a language model writes.

The model's hidden states in these texts are clustered; each cluster is a state of the guide. The
emission of a state is the mean of the model's next-token distributions over the cluster. With a few
thousand hidden states, this estimate is better than counts of the sampled tokens. Transitions are
first estimated from counts, and then improved by EM as long as the likelihood of held-out texts
increases.

Letters: ``N`` texts, ``L`` tokens of the longest text, ``D`` features of a hidden state, ``H``
states of the guide.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_ext._checks import integer, require
from lora_ext.circuits import Categorical, Circuit, RegionGraph

from ._guide import Guide, regions_of_hmm
from .prior import PriorHead

#: Function that wraps an iterable to show its progress, such as ``tqdm.tqdm``.
Progress = Callable[..., Iterable[Any]]
_WHERE = "distil"
_CHUNK = 256
_TRIED = 8  # points per cluster from which the first centres are drawn
_AHEAD = 8  # number of following tokens that a prior head is fitted to


@torch.no_grad()
def distil(
    model: Any,
    prompts: Tensor | Sequence[Sequence[int]],
    states: int = 512,
    *,
    samples: int = 4096,
    length: int = 32,
    batch: int = 16,
    em_steps: int = 10,
    prior_steps: int = 200,
    held_out: float = 0.1,
    eos_token_id: int | Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Guide:
    """Learn a guide from texts that a model generates from prompts.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        prompts: Prompts as a tensor with one row per prompt, or as lists of tokens of any lengths.
            Text i continues prompt ``i % len(prompts)``.
        states: Number of states ``H``.
        samples: Number of texts, at least 2.
        length: Largest number of tokens of a text.
        batch: Number of texts that are generated in one batch.
        em_steps: Largest number of EM steps for the transitions. EM stops at the first step that
            does not increase the likelihood of held-out texts.
        prior_steps: Number of training steps of the guide's :class:`~lora_ext.control.PriorHead`; 0
            for no head.
        held_out: Fraction of the texts that are held out to compute the measures and to stop EM.
        eos_token_id: End token or tokens; None for those of the model's ``generation_config``.
        seed: Seed of the samples and the clusters. The state of torch's generator is restored
            afterwards.
        progress: Function ``progress(iterable, desc=..., total=...)`` that shows the progress, such
            as ``tqdm.tqdm``.

    Returns:
        A guide whose ``measures`` are ``held_out_nats`` and ``model_nats``, the negative
        log-likelihoods per token of held-out texts under the guide and under the model, and
        ``tokens``, the number of training tokens. With a prior head there is also ``prior_nats``:
        the guide's negative log-likelihood per token of the 8 tokens after a held-out hidden state,
        starting from the distribution that the head predicts from this hidden state.

    Raises:
        ValueError: If a number is out of range; the message names the argument.
    """
    for name, value, low in (
        ("states", states, 1),
        ("samples", samples, 2),
        ("length", length, 2),
        ("batch", batch, 1),
        ("em_steps", em_steps, 0),
        ("prior_steps", prior_steps, 0),
    ):
        integer(_WHERE, name, value, low, expected=f"a whole number, at least {low}")
    require(0 < held_out < 1, _WHERE, "held_out", "a share between 0 and 1", held_out)
    rows = [list(map(int, p)) for p in prompts]
    good = bool(rows) and all(rows)
    require(good, _WHERE, "prompts", "a non-empty list of non-empty prompts", f"{rows!r:.80}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = getattr(model, "generation_config", None)
        eos = getattr(config, "eos_token_id", None) if eos_token_id is None else eos_token_id
        ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        # Rows of one call have prompts of the same length, so no padding is needed.
        order = sorted((rows[i % len(rows)] for i in range(samples)), key=len)
        calls: list[list[list[int]]] = []
        for prompt in order:
            if not calls or len(calls[-1]) == batch or len(calls[-1][0]) != len(prompt):
                calls.append([])
            calls[-1].append(prompt)
        parts = [
            _written(model, torch.tensor(call), length, ends)
            for call in _shown(calls, progress, "texts")
        ]
        texts = _Texts(*(torch.cat(p) for p in zip(*parts, strict=True)))
        head = model.get_output_embeddings()
        return _learned(texts, head, states, em_steps, prior_steps, held_out, progress)


class _Texts(NamedTuple):
    """Texts of a model.

    Attributes:
        tokens: Tokens ``(N, L)``, -1 after the end of a text.
        hidden: Hidden state from which each token was drawn, ``(N, L, D)`` float32.
        nats: Model's negative log-probability of each token, ``(N, L)``; 0 after the end.
    """

    tokens: Tensor
    hidden: Tensor
    nats: Tensor


def _written(model: Any, ids: Tensor, length: int, eos: list[int]) -> _Texts:
    """Sample a batch of texts from the model."""
    device = model.get_input_embeddings().weight.device
    fed, settings = ids.to(device), _settings(model)
    ended = torch.zeros(len(ids), dtype=torch.bool, device=device)
    entered: list[Tensor] = []  # input of the LM head in the last call
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    ends = torch.tensor(eos, device=device, dtype=torch.long)
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, given: entered.append(given[0]))
    try:
        for _ in range(length):
            entered.clear()
            logits = model(fed, use_cache=True, **settings).logits
            law = logits[:, -1].float().log_softmax(-1)
            fed = torch.multinomial(law.exp(), 1)
            nats = torch.where(ended, 0.0, -law.gather(1, fed)[:, 0])
            tokens, hidden = torch.where(ended, -1, fed[:, 0]), entered[-1][:, -1].float()
            columns.append((tokens.cpu(), hidden.cpu(), nats.cpu()))
            ended = ended | torch.isin(fed[:, 0], ends)
    finally:
        hook.remove()
    return _Texts(*(torch.stack(column, 1) for column in zip(*columns, strict=True)))


def _settings(model: Any) -> dict[str, Any]:
    """Return arguments for the model's forward: a new cache, which the calls extend in place.

    If the model supports ``logits_to_keep``, its LM head is only applied to a prompt's last token.
    """
    from transformers import DynamicCache

    known = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    return {"cache" if "cache" in known else "past_key_values": DynamicCache(), **last}


def _learned(
    written: _Texts,
    head: Any,
    states: int,
    em_steps: int,
    prior_steps: int,
    held_out: float,
    progress: Progress | None,
) -> Guide:
    """Learn a guide from texts: clusters, emissions, transitions and, optionally, a prior head."""
    tokens, order = written.tokens, torch.randperm(len(written.tokens))
    apart = min(len(order) - 1, max(1, round(held_out * len(order))))
    train, test = tokens[order[:-apart]], tokens[order[-apart:]]
    seen = train >= 0
    hidden = written.hidden[order[:-apart]][seen]
    expected = f"at most {len(hidden)}, the number of sampled training tokens"
    require(len(hidden) >= states, _WHERE, "states", expected, states)
    cluster = torch.full(train.shape, -1)
    cluster[seen] = _clusters(hidden, states, progress)
    emission = _emission(head, hidden, cluster[seen], states, progress)
    before, after = cluster[:, :-1].flatten(), cluster[:, 1:].flatten()
    both = after >= 0  # where `after` is not -1, `before` is not -1 either
    transition = torch.full((states, states), 1 / states)
    transition.index_put_((before[both], after[both]), torch.ones(int(both.sum())), accumulate=True)
    first = torch.bincount(cluster[:, 0], minlength=states).float() + 0.1
    guide = Guide(first / first.sum(), transition / transition.sum(1, keepdim=True), emission)
    count = int((test >= 0).sum())
    guide, best = _with_transitions(guide, train, test, em_steps, progress)
    guide.measures = {
        "held_out_nats": -best / count,
        "model_nats": float(written.nats[order[-apart:]].sum()) / count,
        "tokens": float(seen.sum()),
    }
    if prior_steps:
        # The next _AHEAD tokens of every position of every text, -1 after the end.
        behind = torch.nn.functional.pad(tokens, (0, _AHEAD - 1), value=-1).unfold(1, _AHEAD, 1)
        there = tokens[order] >= 0
        places, following = written.hidden[order][there], behind[order][there]  # (n, D), (n, m)
        prior = PriorHead(guide, places.shape[1])
        nats = prior.fit(places, following, steps=prior_steps, apart=count, progress=progress)
        guide.prior, guide.measures["prior_nats"] = prior.weight.detach(), nats
    return guide


def _clusters(points: Tensor, count: int, progress: Progress | None) -> Tensor:
    """Return the cluster of each point, ``(n,)``, from 15 rounds of k-means."""
    centres = _spread(points[torch.randperm(len(points))[: _TRIED * count]], count)
    for _ in _shown(range(15), progress, "clusters"):
        nearest = _nearest(points, centres)
        size = torch.bincount(nearest, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where(size[:, None] > 0, sums / size.clamp(min=1)[:, None], centres)
    return _nearest(points, centres)


def _spread(points: Tensor, count: int) -> Tensor:
    """Draw the first centres ``(count, D)`` by k-means++ (Arthur and Vassilvitskii 2007).

    Hidden states after the same tokens are equal. K-means++ does not draw equal points twice;
    otherwise rounding would decide to which of two equal centres a point is assigned.
    """
    chosen = torch.zeros(count, dtype=torch.long)
    gap = torch.full((len(points),), torch.inf)
    # This mode does not copy the points, and the distance of equal points is exactly 0.
    mode = "donot_use_mm_for_euclid_dist"
    for i in range(1, count):
        last = points[chosen[i - 1 : i]]  # (1, D)
        gap = torch.minimum(gap, torch.cdist(points, last, compute_mode=mode)[:, 0].square())
        chosen[i] = torch.multinomial(gap.clamp(min=torch.finfo(gap.dtype).tiny), 1)
    return points[chosen]


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    square = centres.square().sum(1)
    parts = [(square - 2 * part @ centres.t()).argmin(1) for part in points.split(4096)]
    return torch.cat(parts)


def _emission(
    head: Any, hidden: Tensor, cluster: Tensor, states: int, progress: Progress | None
) -> Tensor:
    """Return the mean of the model's next-token distributions in each cluster, smoothed.

    The mean over all clusters is added to each cluster with the weight of one token.
    """
    weight, sums = head.weight, torch.empty(0)
    parts = list(zip(hidden.split(_CHUNK), cluster.split(_CHUNK), strict=True))
    for points, places in _shown(parts, progress, "emissions"):
        laws = head(points.to(weight.device, weight.dtype)).float().softmax(-1).cpu()
        sums = sums if len(sums) else laws.new_zeros(states, laws.shape[1])
        sums.index_add_(0, places, laws)
    mixed = sums + sums.sum(0) / sums.sum()
    return mixed / mixed.sum(1, keepdim=True)


def _with_transitions(
    guide: Guide, train: Tensor, test: Tensor, steps: int, progress: Progress | None
) -> tuple[Guide, float]:
    """Update the transitions and the initial distribution by EM, and return the best guide.

    EM stops at the first step that does not increase the likelihood of held-out texts. Emissions do
    not change, because EM would overfit the emissions to the few sampled tokens.

    Returns:
        The guide, and the log-likelihood of the held-out texts.
    """
    best = float(guide.log_prob(test).double().sum())
    if steps == 0:
        return guide, best
    rank, vocab = guide.emission.shape
    graph = RegionGraph.hmm(train.shape[1], rank, Categorical(vocab), homogeneous=True)
    circuit = Circuit(graph)
    root, latent, inputs = regions_of_hmm(graph)
    table = circuit.region_leaves(inputs)["logits"]
    table.copy_(guide.emission.log())
    circuit.region_weights(root).copy_(guide.initial.log()[None])
    circuit.region_weights(latent).copy_(guide.transition.log())
    for _ in _shown(range(steps), progress, "EM steps"):
        circuit.em_step(train, pseudocount=1.0)
        table.copy_(guide.emission.log())
        found = Guide.from_circuit(circuit)
        value = float(found.log_prob(test).double().sum())
        if value <= best:
            break
        guide, best = found, value
    return guide, best


def _shown(items: Any, progress: Progress | None, what: str) -> Iterable[Any]:
    return items if progress is None else progress(items, desc=what, total=len(items))
