"""Initial values of LoRA factors.

If ``B A = 0``, training starts at the base model. Which of the two factors is zero determines which
one changes first, and at which learning rates training is stable (``docs/layers.md``). Shape
letters: ``r`` rank, ``n`` input and ``m`` output features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lora_ext._checks import require

#: Schemes that need only the two factors, not the base weight.
FREE = (
    "init_a", "init_b", "init_a_normal", "init_b_normal", "init_b_unit", "init_ab", "gaussian",
    "orthogonal",
)  # fmt: skip
#: Schemes that move part of the base weight into the adapter.
DECOMPOSING = ("pissa", "pissa_niter_<K>", "olora")
#: Schemes of PEFT that need data or a quantised weight; they are not implemented here.
_ELSEWHERE = ("loftq", "eva", "corda", "lora_ga", "mica")


def init_lora_(
    A: Tensor,
    B: Tensor,
    scheme: bool | str = True,
    *,
    fan_in: int | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Initialise the factors of one adapter, in place.

    ==================== ============================== =========================
    scheme               A                              B
    ==================== ============================== =========================
    True, "init_a"       U(-1/sqrt(n), 1/sqrt(n))       0
    "init_a_normal"      N(0, 1/n)                      0
    "gaussian"           N(0, 1/r^2), for every n       0
    "init_b"             0                              U(-1/sqrt(r), 1/sqrt(r))
    "init_b_normal"      0                              N(0, 1/r)
    "init_b_unit"        0                              N(0, 1), PEFT's for embeddings
    "init_ab", False     as "init_a"                    as "init_b": B A is not 0
    "orthogonal"         (randn(n, r/2) Q[0::2])^T / 10 randn(m, r/2) Q[1::2] / 10;
                         with Q (r, r) orthogonal       B A = 0, neither is 0
    ==================== ============================== =========================

    Values are drawn in float32 on the device of ``A`` and then rounded, so the same seed gives the
    same values in every dtype, up to rounding. True equals PEFT's initialisation
    ``nn.init.kaiming_uniform_(A, a=sqrt(5))`` bit for bit. False initialises both factors like the
    weight of an ``nn.Linear``.

    Args:
        A: factor ``(r, n)`` in float16, bfloat16, float32 or float64; further dimensions are
            flattened into n.
        B: factor ``(m, r)`` in one of these dtypes; further dimensions are flattened into r.
        scheme: name of a scheme in the table, or a bool.
        fan_in: value of n in the distributions; default is n from the shape of ``A``.
        generator: random generator. The default is torch's default generator for the device of
            ``A``.

    Raises:
        ValueError: If the scheme is unknown or needs the base weight of a layer; if the factors
            differ in r or have fewer than two dimensions; or if r is odd and the scheme is
            "orthogonal".
        NotImplementedError: If the scheme is implemented only in PEFT.
        TypeError: If a factor has the wrong dtype.
        RuntimeError: If the factors are on the meta device.

    Sources: Hayou et al. 2024, "The Impact of Initialization on LoRA Finetuning Dynamics";
    "gaussian", "orthogonal" and False: PEFT.
    """
    name = known_scheme(scheme, "init_lora_: scheme")
    if name not in FREE:
        why, known = "splits the base weight, so it needs a layer", ", ".join(map(repr, FREE))
        expected = f"one of True, False, {known}"
        raise ValueError(f"init_lora_: scheme: {scheme!r} {why}; expected {expected}")
    for factor_name, factor in (("A", A), ("B", B)):
        fits = factor.is_floating_point() and factor.element_size() >= 2
        dtypes = "float16, bfloat16, float32 or float64"
        require(fits, "init_lora_", factor_name, dtypes, factor.dtype, TypeError)
    a, b = (f.detach().flatten(1) if f.dim() >= 2 else f for f in (A, B))
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
        expected, found = "A (r, n) and B (m, r) with the same r > 0", tuple(A.shape)
        raise ValueError(f"init_lora_: expected {expected}, found {found} and {tuple(B.shape)}")
    if A.is_meta or B.is_meta:
        raise RuntimeError("init_lora_: expected factors with values, found one on device meta")
    r, n = a.shape[0], a.shape[1] if fan_in is None else fan_in
    new_a, new_b = (torch.zeros_like(t, dtype=torch.float32) for t in (a, b))
    if name in ("init_a", "init_ab"):
        new_a = _uniform(a, n, generator)
    if name in ("init_b", "init_ab"):
        new_b = _uniform(b, r, generator)
    if name == "init_a_normal":
        new_a = _normal(a.shape, a, generator) / math.sqrt(n)
    if name in ("init_b_normal", "init_b_unit"):
        new_b = _normal(b.shape, b, generator) / (1 if name == "init_b_unit" else math.sqrt(r))
    if name == "gaussian":
        new_a.normal_(std=1 / r, generator=generator)
    if name == "orthogonal":
        new_a, new_b = _orthogonal(a, b, generator)
    with torch.no_grad():
        a.copy_(new_a)
        b.copy_(new_b)


def known_scheme(scheme: bool | str, where: str = "init_lora_weights") -> str:
    """Return the canonical name of a scheme: "init_a" for True, "init_ab" for False.

    Raises:
        ValueError: If the scheme is unknown. The message lists the known schemes.
        NotImplementedError: If the scheme is implemented only in PEFT.
        TypeError: If the scheme is neither a bool nor a str.
    """
    if scheme is True:
        return "init_a"
    if scheme is False:
        return "init_ab"
    if not isinstance(scheme, str):
        raise TypeError(f"{where}: expected a bool or a str, found {scheme!r}")
    name = scheme.lower()
    niter = name.removeprefix("pissa_niter_")
    if name in FREE or name in ("pissa", "olora") or (niter != name and niter.isdecimal()):
        return name
    if name in _ELSEWHERE or name.startswith("corda"):
        remedy = "let PEFT initialise the adapter, and load the file that it saves"
        raise NotImplementedError(f"{where}: {scheme!r} is not implemented here; {remedy}")
    known = ", ".join(map(repr, FREE + DECOMPOSING))
    raise ValueError(f"{where}: expected True, False or one of {known}, found {scheme!r}")


def decompose(weight: Tensor, r: int, scaling: float, scheme: str) -> tuple[Tensor, Tensor]:
    """Return factors such that ``scaling * B A`` is the leading part of a base weight ``(m, n)``.

    A is ``(r, n)`` and B is ``(m, r)``, both in float32. The caller subtracts ``scaling * B A``
    from the base weight. The schemes are:

    * "pissa": the r largest singular values and their vectors; each factor is scaled by the square
      roots of the singular values.
    * "pissa_niter_<K>": the same, by a randomised singular value decomposition with K iterations.
    * "olora": the first r columns of Q (in B) and the first r rows of R (in A) of a QR
      decomposition.

    Sources: PiSSA (Meng et al. 2024), eqs. 2 and 3; OLoRA (Büyükakyüz 2024), algorithm 1; both as
    implemented in PEFT.
    """
    if r > min(weight.shape):
        raise ValueError(
            f"init_lora_weights: {scheme!r} needs r of at most {min(weight.shape)}, the smaller "
            f"dimension of the base weight, found {r}"
        )
    weight = weight.detach().float()
    if scheme == "olora":
        q, upper = torch.linalg.qr(weight)
        return upper[:r].contiguous(), q[:, :r].contiguous()
    if scheme == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :r], s[:r], vh[:r]
    else:
        u, s, v = torch.svd_lowrank(weight, r, niter=int(scheme.rpartition("_")[2]))
        vh = v.t()
    root = (s / scaling).sqrt()
    return root[:, None] * vh, u * root


def _uniform(like: Tensor, fan_in: int, generator: torch.Generator | None) -> Tensor:
    # This is the bound of kaiming_uniform_(a=sqrt(5)). The expression is written as in torch, so
    # that the values are bitwise equal.
    std = nn.init.calculate_gain("leaky_relu", math.sqrt(5)) / math.sqrt(fan_in)
    bound = math.sqrt(3.0) * std
    new = torch.empty_like(like, dtype=torch.float32, memory_format=torch.contiguous_format)
    return new.uniform_(-bound, bound, generator=generator)


def _normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, generator=generator, device=like.device, dtype=torch.float32)


def _orthogonal(a: Tensor, b: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    r = a.shape[0]
    if r % 2:
        raise ValueError(f'init_lora_: "orthogonal" needs an even r, found {r}')
    q, _ = torch.linalg.qr(_normal((r, r), a, generator))
    new_a = (_normal((a.shape[1], r // 2), a, generator) @ q[0::2]).T / 10
    new_b = _normal((r // 2, b.shape[0]), a, generator).T @ q[1::2] / 10
    return new_a, new_b
