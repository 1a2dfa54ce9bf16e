"""Learning rates: transfer to another width, and a larger learning rate for the factor B."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from lora_ext._checks import number, require
from lora_ext.layers import known_scheme

#: Powers p by scheme: the largest stable learning rate is proportional to ``n ** -p``.
_POWERS = {"init_a": 0.5, "init_a_normal": 0.5, "init_b": 1.0, "init_b_normal": 1.0}
_RANK_RULES = ("none", "inverse")


def loraplus_param_groups(
    model: nn.Module,
    lr: float,
    loraplus_lr_ratio: float,
    *,
    weight_decay: float = 0.0,
    lr_embedding: float = 1e-6,
) -> list[dict[str, Any]]:
    """Return the parameter groups of LoRA+ for a torch optimizer, divided as in PEFT's
    ``create_loraplus_optimizer``.

    According to the theory, B needs the larger rate even if its initial values are random
    ("init_b"), since the updates of B become smaller with the width.

    Args:
        model: Model with layers of :mod:`lora_ext.nn` or PEFT. Frozen parameters are ignored.
        lr: eta_A, learning rate of A and of all parameters that are in no other group.
        loraplus_lr_ratio: lambda, eta_B over eta_A. The example of the LoRA+ authors uses 20; for
            harder tasks they increase it and halve ``lr``.
        weight_decay: Weight decay of matrices and magnitudes; biases and layer norms get 0.
        lr_embedding: Learning rate of both factors of adapted embeddings.

    Returns:
        Four groups, each with ``params``, ``lr`` and ``weight_decay``. They contain, in order: A
        and other matrices; factors of embeddings; B and vectors; biases and layer norms, without
        decay. A group may be empty. Every parameter that trains is in exactly one group.

    Raises:
        ValueError: If no parameter of the model trains; if a learning rate or the ratio is not
            positive and finite; if the weight decay is negative.

    Warns:
        UserWarning: If the ratio is below 1.

    Source: LoRA+ (Hayou et al. 2024, arXiv 2402.12354); PEFT's ``create_loraplus_optimizer``.
    """
    where = "loraplus_param_groups"
    number(where, "lr", lr, above=0)
    number(where, "lr_embedding", lr_embedding, above=0)
    _check_ratio(where, "loraplus_lr_ratio", loraplus_lr_ratio)
    number(where, "weight_decay", weight_decay, 0)
    rest, embeddings, faster, faster_undecayed = [], [], [], []
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_embedding_" in name:
            embeddings.append(parameter)
        elif "lora_B" not in name and parameter.dim() != 1:
            rest.append(parameter)
        elif "bias" in name or id(parameter) in norms:
            faster_undecayed.append(parameter)
        else:
            faster.append(parameter)
    groups = [
        {"params": rest, "lr": lr, "weight_decay": weight_decay},
        {"params": embeddings, "lr": lr_embedding, "weight_decay": weight_decay},
        {"params": faster, "lr": lr * loraplus_lr_ratio, "weight_decay": weight_decay},
        {"params": faster_undecayed, "lr": lr * loraplus_lr_ratio, "weight_decay": 0.0},
    ]
    trained = any(group["params"] for group in groups)
    require(trained, where, "model", "trainable parameters", "none")
    return groups


def suggest_lr(
    base_lr: float,
    base_width: float,
    width: float,
    scheme: bool | str,
    *,
    loraplus_ratio: float | None = None,
    rank: int | None = None,
    base_rank: int | None = None,
    rank_rule: str = "none",
) -> float | tuple[float, float]:
    """Return the learning rate for width n, given one that was tuned at width n0.

    If A and B have the same learning rate, it is ``base_lr (n0 / n) ** 0.5`` for random initial
    values of A, and ``base_lr n0 / n`` for random initial values of B. With LoRA+ and any scheme,
    the learning rate of A is proportional to ``n0 / n``, and that of B does not depend on the
    width.

    Args:
        base_lr: Learning rate that was tuned at ``base_width``; with LoRA+, that of A.
        base_width: n0, number of input features of the adapted layers for which ``base_lr`` was
            tuned.
        width: n, number of input features of the adapted layers to train.
        scheme: Scheme of initialisation: True, "init_a" or "init_a_normal" (A is random);
            "init_b" or "init_b_normal" (B is random).
        loraplus_ratio: eta_B over eta_A at ``base_width``; if it is given, two learning rates are
            returned.
        rank: Rank of the adapter to train; used only by ``rank_rule``.
        base_rank: Rank for which ``base_lr`` was tuned; used only by ``rank_rule``.
        rank_rule: "none": the learning rate does not depend on the rank; "inverse": it is
            multiplied by ``base_rank / rank``. The correct rule depends on scheme and scaling.

    Returns:
        The learning rate, or with ``loraplus_ratio`` those of A and B,
        ``(base_lr n0 / n, base_lr ratio)``.

    Raises:
        ValueError: If the scheme is unknown or has no known rule; if a number is not positive and
            finite; or if ``rank_rule`` is unknown, or is "inverse" and a rank is missing.

    Warns:
        UserWarning: If the ratio is below 1, since in LoRA+ B has the larger learning rate.

    Sources: Hayou et al. 2024 (2406.08447); LoRA+ (2402.12354).
    """
    where = "suggest_lr"
    for name, value in (("base_lr", base_lr), ("base_width", base_width), ("width", width)):
        number(where, name, value, above=0)
    name = known_scheme(scheme, f"{where}: scheme")
    expected, found = ", ".join(map(repr, _POWERS)), f"{scheme!r}, for which no rule is known"
    require(name in _POWERS, where, "scheme", f"True or one of {expected}", found)
    require(rank_rule in _RANK_RULES, where, "rank_rule", f"one of {_RANK_RULES}", repr(rank_rule))
    of_rank = 1.0
    if rank_rule == "inverse":
        for argument, value in (("rank", rank), ("base_rank", base_rank)):
            require(value is not None, where, argument, "a rank with rank_rule='inverse'", None)
            number(where, argument, value, above=0)
        of_rank = base_rank / rank  # pyright: ignore[reportOperatorIssue]  (neither is None)
    narrower = base_width / width
    if loraplus_ratio is None:
        return base_lr * narrower ** _POWERS[name] * of_rank
    _check_ratio(where, "loraplus_ratio", loraplus_ratio)
    return base_lr * narrower * of_rank, base_lr * loraplus_ratio * of_rank


def _check_ratio(where: str, name: str, value: float) -> None:
    """Raise unless a ratio is finite and above 0; warn if it is below 1."""
    number(where, name, value, above=0)
    if value < 1:
        expected = "at least 1, so that B learns as fast as A or faster"
        warnings.warn(f"{where}: {name}: expected {expected}, found {value!r}", stacklevel=3)
