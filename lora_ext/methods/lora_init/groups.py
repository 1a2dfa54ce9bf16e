"""loraplus_param_groups: a larger learning rate for B than for A."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_ext._checks import number, require

from ._rates import check_ratio


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
    check_ratio(where, "loraplus_lr_ratio", loraplus_lr_ratio)
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
