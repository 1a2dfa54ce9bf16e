"""Hidden states of several depths, each normed, mixed to one in a single pass.

The hidden states come as tensors of their own and are never stacked. Statistics and sums are in
float32 (float64 stays float64), and every result is rounded once. Results and gradients repeat bit
for bit, whatever the number of threads; autocast leaves the ops alone, since their sums are in
float32 anyway.

Letters: ``k`` hidden states, 1 to 8; ``d`` their width; ``...`` the positions, of any shape.

Source: mixture-of-depths ensembles (arXiv 2410.13077). A head that is linear makes a mix of hidden
states and a mix of logits the same, if the weights sum to 1 or the head has no bias.
"""

from collections.abc import Sequence

from torch import Tensor

from lora_ext import reference


def depth_mix(
    hiddens: Sequence[Tensor],
    gammas: Tensor | Sequence[Tensor],
    weights: Tensor,
    eps: float,
    betas: Tensor | Sequence[Tensor] | None = None,
    norm: str = "rms",
) -> Tensor:
    """Norm each of k hidden states and add them up by weights.

    ``u = sum_e weights[..., e] * n_e`` with ``n_e = gammas[e] * h_e / sqrt(mean(h_e^2) + eps) +
    betas[e]``; ``norm="layer"`` takes the mean of each ``h_e`` from it first. No ``n_e`` is rounded
    on the way, as a norm that is called by itself would round it.

    Differentiable once in ``hiddens``, ``gammas``, ``betas`` and ``weights``; each gradient has the
    dtype of its argument. A weight of zero is a factor like others: it does not keep out what is
    not a number. A row of zeros gives ``betas``, with finite gradients where ``eps > 0``.

    Args:
        hiddens: k tensors ``(..., d)`` float16, bfloat16, float32, or float64 on the CPU, of one
            shape, dtype and device; any strides, copied only where the elements of a row lie apart
            or the rows do not follow one stride.
        gammas: ``(k, d)``, or k tensors ``(d,)``. They may have the dtype of the hiddens or any
            that float32 holds exactly (float64 for float64 hiddens), so float32 norms fit to 16-bit
            hiddens; two dtypes among gammas and betas cost a copy in float32.
        weights: ``(..., k)``, its dtype by the same rule.
        eps: what is added to the mean square, at least 0.
        betas: as ``gammas``, or None for 0.
        norm: "rms" or "layer".

    Returns:
        ``(..., d)`` in the dtype of the hiddens.

    Raises:
        ValueError: if k is not in 1 to 8, or if a shape, dtype or device disagrees, naming the
            argument.
        RuntimeError: on double backward.

    Source: arXiv 2410.13077, the ensemble of late layers, mixed before the head.
    """
    return reference.depth_mix(hiddens, gammas, weights, eps, betas, norm)


def depth_mix_routed(
    hiddens: Sequence[Tensor],
    gammas: Tensor | Sequence[Tensor],
    router: Tensor,
    bias: Tensor,
    eps: float,
    betas: Tensor | Sequence[Tensor] | None = None,
    norm: str = "rms",
) -> tuple[Tensor, Tensor]:
    """:func:`depth_mix` by weights that the last hidden state chooses.

    ``weights = softmax(router @ n_k + bias)`` of each position, where ``n_k`` is the last hidden,
    normed and not rounded. Differentiable once in all tensors; the router's gradient flows into
    ``n_k`` too, and both results may have one.

    Args:
        hiddens, gammas, eps, betas, norm: as there.
        router: ``(k, d)``, its dtype by the rule for ``gammas``.
        bias: ``(k,)``, likewise.

    Returns:
        The mix ``(..., d)`` in the dtype of the hiddens, and the weights ``(..., k)`` in float32
        (float64 for float64).

    Raises:
        ValueError, RuntimeError: as there.
    """
    return reference.depth_mix_routed(hiddens, gammas, router, bias, eps, betas, norm)
