"""FIM scores (Fisher information matrix): importance of each layer of an adapter, estimated from a
few samples of the server."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lora_ext._checks import choice, integer, require
from lora_ext._torch import evaluating
from lora_ext.federated import LayerNotFound, check_layers, logits_of, merged
from lora_ext.layers import (
    IGNORE,
    LoraLinear,
    adapted_layers,
    adapter_parameters,
    is_active,
    kind_of_layer,
    shift_labels,
)

from .config import Reduce, Score

WHERE = "fim_scores"
#: Function from a parameter's name to the index of its layer, or to None for parameters that are
#: not scored.
LayerOf = Callable[[str], int | None]


class EmptyProxySet(ValueError):
    """Raised if there are no samples to compute importance from."""


def fim_scores(
    model: nn.Module,
    batches: Iterable[Any],
    layer_of: LayerOf,
    *,
    score: Score = "log_prob",
    reduce: Reduce = "fro",
    chunk: int = 8,
) -> Tensor:
    """Compute F, the diagonal empirical Fisher information of each layer's LoRA tensors.

        D = mean over samples of (d log p(y | x) / d theta)^2, elementwise
        F_l = sum over the tensors theta of layer l of norm(D)

    Each batch takes one forward and one backward pass: for a linear layer, the gradient of one
    sample is the product of the layer's inputs and output gradients. Adapters on other layers, with
    scaled outputs or with a bias need one more forward and backward pass per sample. All layers are
    scored, including frozen ones. The model runs in evaluation mode. Afterwards, its training
    modes, ``requires_grad`` flags, gradients and values are the same as before.

    Args:
        model: Model with adapted layers of :mod:`lora_ext.nn` or PEFT, before or after
            ``from_peft``. The first axis of a layer's input must be the samples.
        batches: Batches of n samples. Each is ``(x, y)``, or a mapping of tensors with ``labels``
            and the model's other arguments. Labels are ``(n,)`` or, for sequences of T tokens,
            ``(n, T)``; the score of a sequence is the sum over its tokens. Labels in a mapping are
            shifted, as in transformers. A label of -100 is ignored. The division into batches
            affects only rounding.
        layer_of: Function from the name of a LoRA tensor in ``model.named_parameters()`` to the
            index of its layer, or to None for tensors that are not scored.
        score: Function whose gradient is taken: "log_prob", log p(y | x), or "logit", the logit of
            the label, as in the authors' code.
        reduce: The ``norm`` of the formula: "fro", the Frobenius norm, or "trace", the sum of the
            entries.
        chunk: Largest number of samples whose gradients are in memory at once.

    Returns:
        F, ``(L,)`` float64 on the CPU, for L layers.

    Raises:
        EmptyProxySet: If there is no sample.
        LayerNotFound: If no LoRA tensor of an active adapter has a layer, or an index below the
            largest one has no tensor.
        ValueError: If a setting is out of range; if batches, outputs or labels do not match; or if
            an adapter is merged.
        TypeError: If ``chunk`` or an index is not an integer.

    Source: arXiv 2506.12213, FIM-HLA.
    """
    choice(WHERE, "score", score, get_args(Score))
    choice(WHERE, "reduce", reduce, get_args(Reduce))
    integer(WHERE, "chunk", chunk, 1)
    layers, pairs, alone = _scored(model, layer_of)
    # If the caller is in inference_mode, outputs would have no gradient.
    with _as_evaluated(model, alone), torch.inference_mode(False), torch.enable_grad():
        squares = {id(p): torch.zeros_like(p, dtype=torch.float64) for p in layers}
        fisher = _Fisher(model, pairs, alone, squares, score, chunk)
        samples = sum(fisher.add(batch) for batch in batches)
    require(samples, WHERE, "batches", "at least one sample", "none", EmptyProxySet)
    found = torch.zeros(max(layers.values()) + 1, dtype=torch.float64)
    for parameter, layer in layers.items():
        diagonal = squares[id(parameter)] / samples
        found[layer] += float(diagonal.norm() if reduce == "fro" else diagonal.sum())
    return found


class _Pair(NamedTuple):
    name: str
    layer: Any
    adapter: str
    a: nn.Parameter  # (r, I)
    b: nn.Parameter  # (O, r)
    scaling: float


def _scored(
    model: nn.Module, layer_of: LayerOf
) -> tuple[dict[nn.Parameter, int], list[_Pair], list[nn.Parameter]]:
    """Return the layer index of each LoRA tensor, the pairs of factors that need one backward pass
    per batch, and the tensors that need one per sample."""
    names = {id(p): name for name, p in model.named_parameters()}
    layers: dict[nn.Parameter, int] = {}
    pairs: list[_Pair] = []
    alone: list[nn.Parameter] = []
    for name, module in adapted_layers(model).items():
        layer: Any = module
        for adapter in layer.active_adapters:
            own = dict.fromkeys(adapter_parameters(layer, adapter))  # without PEFT's duplicates
            scored = [p for p in own if id(p) in names and layer_of(names[id(p)]) is not None]
            layers |= {p: integer(WHERE, "layer_of", layer_of(names[id(p)]), 0) for p in scored}
            apart = not scored or adapter not in layer.merged_adapters
            require(apart, WHERE, name, "an adapter that is not merged", f"{adapter!r} merged")
            if scored and _is_plain(layer, adapter):
                a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                pairs.append(_Pair(name, layer, adapter, a, b, layer.scaling[adapter]))
            else:
                alone += scored
    expected = f"an index for a LoRA tensor of an active adapter of {type(model).__name__}"
    require(layers, WHERE, "layer_of", expected, "no index", LayerNotFound)
    check_layers(WHERE, set(layers.values()))
    return layers, pairs, alone


def _is_plain(layer: Any, adapter: str) -> bool:
    """Return whether the adapter adds exactly ``scaling * B A x``."""
    peft_layers: Any = sys.modules.get("peft.tuners.lora.layer")
    linear = type(layer) is LoraLinear or (
        peft_layers is not None and isinstance(layer, peft_layers.Linear)
    )
    special = getattr(layer, "lora_variant", {})
    return (
        linear
        and not (layer.lora_bias[adapter] or adapter in special)
        and kind_of_layer(layer, adapter).sums
        and isinstance(layer.scaling[adapter], int | float)
    )


@contextlib.contextmanager
def _as_evaluated(model: nn.Module, trained: list[nn.Parameter]) -> Iterator[None]:
    """Set the model to evaluation mode in a ``with`` block, in which only the parameters in
    ``trained`` require gradients."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    kept = set(trained)
    try:
        for parameter in flags:
            parameter.requires_grad_(parameter in kept)
        with evaluating(model):
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@dataclass
class _Fisher:
    """Sums of the squared gradients of samples, stored in ``squares`` by ``id(parameter)``."""

    model: nn.Module
    pairs: list[_Pair]
    alone: list[nn.Parameter]
    squares: dict[int, Tensor]
    score: Score
    chunk: int

    def add(self, batch: Any) -> int:
        """Add the squared gradients of each sample of ``batch``; return the number of samples."""
        pairs = [
            p for p in self.pairs if is_active(p.layer, p.adapter) and not p.layer.disable_adapters
        ]
        calls: dict[int, list[tuple[Tensor, Tensor]]] = {id(pair.layer): [] for pair in pairs}

        def watch(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            x = args[0] if args else kwargs["x"]
            if not output.requires_grad:  # Start the graph at the lowest layers that are scored.
                output = output.detach().requires_grad_(True)
            calls[id(layer)].append((x.detach(), output))
            return output

        with contextlib.ExitStack() as hooks:
            for layer in {id(pair.layer): pair.layer for pair in pairs}.values():
                hooks.enter_context(layer.register_forward_hook(watch, with_kwargs=True))
            scores = _sample_scores(self.model, batch, self.score)
        n = len(scores)
        outputs = [output for own in calls.values() for _, output in own]
        if n and outputs:
            gradients = iter(torch.autograd.grad(scores.sum(), outputs, allow_unused=True))
            seen = {key: [(x, next(gradients)) for x, _ in own] for key, own in calls.items()}
            for pair in pairs:
                own = [(x, g) for x, g in seen[id(pair.layer)] if g is not None]
                if own:
                    sides = zip(*own, strict=True)
                    self._add_pair(pair, *(_by_sample(pair.name, ts, n) for ts in sides))
        for sample in _samples(batch) if self.alone and n else ():  # one backward per sample
            score = _sample_scores(self.model, sample, self.score).sum()
            gradients = torch.autograd.grad(score, self.alone, allow_unused=True)
            for parameter, gradient in zip(self.alone, gradients, strict=True):
                if gradient is not None:
                    self.squares[id(parameter)] += gradient.double().square()
        return n

    def _add_pair(self, pair: _Pair, x: Tensor, gradient: Tensor) -> None:
        """Add each sample's squared gradients of both factors, computed from the layer's input
        ``x (n, T, I)`` and output gradient ``(n, T, O)``."""
        dtype = torch.promote_types(pair.a.dtype, torch.float32)
        a, b = pair.a.detach().to(dtype), pair.b.detach().to(dtype)
        parts = (t.to(dtype).split(self.chunk) for t in (x, gradient))
        for xs, ds in zip(*parts, strict=True):
            d = pair.scaling * ds
            for key, left, right in ((id(pair.a), d @ b, xs), (id(pair.b), d, xs @ a.T)):
                if left.shape[1] == 1:  # (u v^T)^2 = u^2 (v^2)^T, elementwise
                    left, right = left[:, 0].double().square(), right[:, 0].double().square()
                    self.squares[key] += left.T @ right
                else:
                    self.squares[key] += (left.mT @ right).double().square().sum(0)


def _by_sample(name: str, tensors: Sequence[Tensor], n: int) -> Tensor:
    """Concatenate tensors to ``(n, T, width)``. In some models, a layer's input has the tokens of
    all n samples in one dimension: ``(n * T, width)``."""
    for t in tensors:
        fits = t.dim() > 1 and t.shape[0] % n == 0
        require(fits, WHERE, name, f"{n} samples in dimension 0", list(t.shape))
    return torch.cat([t.reshape(n, -1, t.shape[-1]) for t in tensors], 1)


def _samples(batch: Any) -> Iterator[Any]:
    if isinstance(batch, Mapping):
        rows = zip(*(t.split(1) for t in batch.values()), strict=True)
        yield from (dict(zip(batch, row, strict=True)) for row in rows)
    else:
        yield from zip(*(t.split(1) for t in batch), strict=True)


def _sample_scores(model: nn.Module, batch: Any, score: Score) -> Tensor:
    """Return log p(y | x) of each sample, or the logit of y, ``(n,)``."""
    named = isinstance(batch, Mapping)
    if named:
        require("labels" in batch, WHERE, "batches", "the key 'labels'", list(batch))
        labels = batch["labels"]
    else:
        pair = isinstance(batch, tuple | list) and len(batch) == 2
        require(pair, WHERE, "batches", "mappings or pairs (x, y)", type(batch).__name__)
        labels = batch[1]
    inputs, segments = merged([batch], WHERE)
    if not segments[0].rows:
        return torch.zeros(0)
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    logits = logits_of(output, segments, WHERE)
    labels = labels.to(logits.device)
    if named and logits.dim() == 3:
        labels = shift_labels(labels)
    expected, found = list(logits.shape[:-1]), list(labels.shape)
    require(found == expected, WHERE, "labels", f"shape {expected}", found)
    known = labels != IGNORE
    classes = logits.shape[-1]
    inside = (labels >= 0) & (labels < classes) | ~known
    if not bool(inside.all()):
        found = labels[~inside].unique().tolist()
        expected = f"class indices below {classes}, or {IGNORE}"
        raise ValueError(f"{WHERE}: labels: expected {expected}, found {found!r:.200}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    values = logits.log_softmax(-1) if score == "log_prob" else logits
    places = labels.where(known, 0).long().unsqueeze(-1)
    picked = values.gather(-1, places).squeeze(-1)
    return picked.where(known, 0).reshape(len(labels), -1).sum(1)
