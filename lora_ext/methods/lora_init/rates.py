"""Learning rates: transfer to another width n, and a larger learning rate for the factor B.

``gamma[v]`` is the exponent of the growth of a value v with the width: v is of order
``n ** gamma[v]``.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from torch import nn

from lora_ext._checks import integer, number, require
from lora_ext.layers import known_scheme

#: Powers p by scheme: the largest stable learning rate is proportional to ``n ** -p``.
_POWERS = {"init_a": 0.5, "init_a_normal": 0.5, "init_b": 1.0, "init_b_normal": 1.0}
_RANK_RULES = ("none", "inverse")
_ZERO = -math.inf  # gamma of the value 0
#: ``gamma[A x]`` and ``gamma[B]`` before the first step, by scheme.
_INITIAL_EXPONENTS = {
    **dict.fromkeys(("init_a", "init_a_normal"), (0.0, _ZERO)),
    "gaussian": (0.5, _ZERO),  # The variance of A does not depend on n.
    **dict.fromkeys(("init_b", "init_b_normal", "init_b_unit"), (_ZERO, 0.0)),
    "init_ab": (0.0, 0.0),
}
_TOLERANCE = 1e-9  # for comparisons with 0: (-1/3 + 1) - 2/3 is 1e-16


def loraplus_param_groups(
    model: nn.Module,
    lr: float,
    loraplus_lr_ratio: float,
    *,
    weight_decay: float = 0.0,
    lr_embedding: float = 1e-6,
) -> list[dict[str, Any]]:
    """Return the parameter groups of LoRA+ for a torch optimizer, as in PEFT's
    ``create_loraplus_optimizer``.

    According to the theory, B needs a larger learning rate than A even if the initial values of B
    are random ("init_b"), since the updates of B become smaller with the width.

    Args:
        model: Model with layers of :mod:`lora_ext.nn` or PEFT. Frozen parameters are ignored.
        lr: eta_A, learning rate of A and of all parameters that are in no other group.
        loraplus_lr_ratio: lambda, eta_B over eta_A. The example of the LoRA+ authors uses 20; for
            harder tasks, the authors increase the ratio and halve ``lr``.
        weight_decay: Weight decay of matrices and magnitudes; biases and layer norms get 0.
        lr_embedding: Learning rate of both factors of adapted embeddings.

    Returns:
        Four groups, each with ``params``, ``lr`` and ``weight_decay``. The groups contain, in
        order: A and other matrices; factors of embeddings; B and vectors; biases and layer norms,
        without decay. A group may be empty. Every trainable parameter is in exactly one group.

    Raises:
        ValueError: If no parameter of the model is trainable; if a learning rate or the ratio is
            not positive and finite; if the weight decay is negative.

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

    If A and B have the same learning rate, the result is ``base_lr (n0 / n) ** 0.5`` for random
    initial values of A, and ``base_lr n0 / n`` for random initial values of B. With LoRA+ and any
    scheme, the learning rate of A is proportional to ``n0 / n``, and that of B does not depend on
    the width.

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
        rank_rule: "none": the learning rate does not depend on the rank; "inverse": the rate is
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
    """Raise ValueError unless a ratio is finite and above 0; warn if it is below 1."""
    number(where, name, value, above=0)
    if value < 1:
        expected = "at least 1, so that B learns as fast as A or faster"
        warnings.warn(f"{where}: {name}: expected {expected}, found {value!r}", stacklevel=3)


def gamma_exponents(
    scheme: bool | str, eta_A_exp: float, eta_B_exp: float, steps: int = 2
) -> dict[str, float | bool]:
    """Return how an adapter's features and updates grow with the width n after some steps of Adam.

    ``gamma[v]`` is the exponent g if v is of order ``n^g``. For the input x, ``Z_A = A x`` and
    ``Z_B = B A x``. The entries of Adam's update directions are of order one. For the direction g_A
    of A, ``gamma[g_A x] = 1``, since g_A has the signs of x, so that n terms add up. Therefore:

        gamma[Z_A^t] = max(gamma[Z_A^(t-1)], gamma[eta_A] + 1)
        gamma[B_t]   = max(gamma[B_(t-1)],   gamma[eta_B])
        gamma[Z_B^t] = gamma[B_t] + gamma[Z_A^t]
        gamma[d1]    = gamma[B_(t-1)] + gamma[eta_A] + 1        d1 = B_(t-1) (A_t - A_(t-1)) x
        gamma[d2]    = gamma[eta_B] + gamma[Z_A^(t-1)]          d2 = (B_t - B_(t-1)) A_(t-1) x

    Args:
        scheme: Scheme of :func:`lora_ext.nn.init_lora_` that draws the factors independently.
        eta_A_exp: gamma of the learning rate of A, for example -0.5 if the rate is proportional to
            ``n ** -0.5``, or minus infinity if A is not trained.
        eta_B_exp: gamma of the learning rate of B.
        steps: t, number of steps, at least 1. The result is the same for all t >= 2.

    Returns:
        Dictionary. ``Z_A``, ``B``, ``Z_B``, ``d1`` and ``d2`` are exponents, minus infinity for a
        value of zero. ``stable`` is True if Z_B is of order one or below, ``internally_stable`` if
        Z_A is of order one or below, and ``efficient`` if ``stable`` is True and both d1 and d2 are
        of order one.

    Raises:
        ValueError: If the scheme is unknown, or its exponents are not known ("orthogonal", and the
            schemes that split the base weight); if an exponent is NaN or plus infinity; or if
            ``steps`` is below 1.

    Source: Hayou et al. 2024, sections 3 and 4.
    """
    name = known_scheme(scheme, "gamma_exponents: scheme")
    expected = f"True, False or one of {', '.join(map(repr, _INITIAL_EXPONENTS))}"
    require(name in _INITIAL_EXPONENTS, "gamma_exponents", "scheme", expected, repr(scheme))
    for argument, value in (("eta_A_exp", eta_A_exp), ("eta_B_exp", eta_B_exp)):
        fits = not math.isnan(value) and value != math.inf
        require(fits, "gamma_exponents", argument, "a number or minus infinity", value)
    integer("gamma_exponents", "steps", steps, 1)
    z_a, b = _INITIAL_EXPONENTS[name]
    d1 = d2 = _ZERO
    for _ in range(steps):
        d1, d2 = b + eta_A_exp + 1, eta_B_exp + z_a
        z_a, b = max(z_a, eta_A_exp + 1), max(b, eta_B_exp)
    stable = b + z_a <= _TOLERANCE
    return {
        "Z_A": z_a,
        "B": b,
        "Z_B": b + z_a,
        "d1": d1,
        "d2": d2,
        "stable": stable,
        "internally_stable": z_a <= _TOLERANCE,
        "efficient": stable and abs(d1) <= _TOLERANCE and abs(d2) <= _TOLERANCE,
    }
