"""Learning rates: one that was tuned at one width, carried over to another; larger ones for B."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from lora_ext._checks import number, require
from lora_ext.layers import known_scheme

#: The largest stable rate goes like n to this power.
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
    """Parameter groups of LoRA+ for a torch optimizer, divided as PEFT's own function does.

    Where B starts random ("init_b") theory still wants the larger rate on B: its updates are what
    falls with the width there.

    Args:
        model: with layers of :mod:`lora_ext.nn` or of PEFT. Frozen parameters are left out.
        lr: eta_A, of everything that the other groups do not have.
        loraplus_lr_ratio: lambda, eta_B over eta_A. The LoRA+ authors' example has 20; for harder
            tasks they raise it and halve ``lr``.
        weight_decay: of matrices and magnitudes; biases and layer norms get none.
        lr_embedding: of both factors of adapted embeddings.

    Returns:
        Four groups, which may be empty, each with ``params``, ``lr``, ``weight_decay``: A and the
        rest; embeddings; B and vectors; those among them that do not decay. Every parameter that
        trains is in one of them, once.

    Raises:
        ValueError: nothing of the model trains; a rate or ratio that is not positive and finite; a
            negative weight decay.

    Warns:
        UserWarning: a ratio below 1.

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
    require(trained, where, "model", "parameters that train", "none")
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
    """The rate for width n, of one that was found at width n0.

    With one rate for both factors, ``base_lr (n0 / n) ** 0.5`` where A starts random, and
    ``base_lr n0 / n`` where B does. With LoRA+ the rate of A falls as ``n0 / n`` and that of B does
    not depend on the width, whichever starts random.

    Args:
        base_lr: the rate at ``base_width``; with LoRA+ that of A.
        base_width: n0, inputs of the adapted layers where ``base_lr`` was found.
        width: n, inputs of the adapted layers now.
        scheme: True, "init_a", "init_a_normal"; "init_b", "init_b_normal".
        loraplus_ratio: eta_B over eta_A at ``base_width``, for two rates.
        rank: now. base_rank: where ``base_lr`` was found. Used by ``rank_rule`` alone.
        rank_rule: "none": the rank does not matter; "inverse": times ``base_rank / rank``. Which of
            the two holds depends on scheme and scaling.

    Returns:
        The rate; or, with ``loraplus_ratio``, of A and B, ``(base_lr n0 / n, base_lr ratio)``.

    Raises:
        ValueError: an unknown scheme, or one for which no rule is known; a number that is not
            positive and finite; an unknown ``rank_rule``, or "inverse" without both ranks.

    Warns:
        UserWarning: a ratio below 1; LoRA+ is for B learning faster.

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
            require(value is not None, where, argument, "a rank beside rank_rule='inverse'", None)
            number(where, argument, value, above=0)
        of_rank = base_rank / rank  # pyright: ignore[reportOperatorIssue]  (neither is None)
    narrower = base_width / width
    if loraplus_ratio is None:
        return base_lr * narrower ** _POWERS[name] * of_rank
    _check_ratio(where, "loraplus_ratio", loraplus_ratio)
    return base_lr * narrower * of_rank, base_lr * loraplus_ratio * of_rank


def _check_ratio(where: str, name: str, value: float) -> None:
    """Refuse a ratio that is no finite number above 0, and warn of one below 1."""
    number(where, name, value, above=0)
    if value < 1:
        expected = "at least 1, so that B learns as fast as A or faster"
        warnings.warn(f"{where}: {name}: expected {expected}, found {value!r}", stacklevel=3)
