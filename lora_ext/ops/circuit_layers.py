"""Evaluation of whole circuits in one call: leaf tables, values and flows of all units, and walks.

A unit is a leaf, a sum, or a product of leaves. A walk descends from a root unit to leaf units. The
flow of a unit or weight is its expected number of uses in a sample.

Letters: ``B`` rows, ``N`` leaf units, ``U`` units, ``W`` weights, ``R`` roots; ``M`` blocks of leaf
units, or walks. Results ``(B, U)`` are unit-major in memory: the values of one unit for all rows
are contiguous, so that a SIMD vector contains one unit of many rows.

Sources: expected flows as gradients, Darwiche 2003; layers of equal shape, Peharz et al. 2020.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_ext._checks import require_dtype, require_tensor

from ._registration import fake

_c = torch.ops.lora_ext
_FLOATS = (torch.float32, torch.float64)


class Program(NamedTuple):
    """Program of a circuit, which :func:`circuit_layers` executes.

    ``lora_ext.circuits._program.compile_program(graph, compile_graph(graph))`` compiles it from a
    region graph.

    Attributes:
        numbers: Encoded program, int32 on the device of the values. The header
            ``csrc/include/lora_ext/circuit_layers.h`` defines its layout.
        plan: Sizes that the host needs: ten for the program, then four per stage of execution.
    """

    numbers: Tensor
    plan: list[int]

    def to(self, device: torch.device) -> Program:
        """Return the program with its ``numbers`` moved to ``device``."""
        return Program(self.numbers.to(device), self.plan)


def circuit_table(table: Tensor, x: Tensor, row: Tensor, block: int, norm: str = "none") -> Tensor:
    """Look up the log-values of leaves of discrete variables in a table.

    With the table's probabilities ``p``, ``out[b, m * block + j] = log p[row[m] + j, x[b, m]]``, or
    0 if ``x[b, m]`` is -1.
    Differentiable once in ``table``; the backward sums over the rows of ``x`` in order.

    Args:
        table: ``R`` distributions over ``V`` values, one per row: ``(R, V)`` float32, or float64 on
            the CPU.
        x: Values ``(B, M)`` int64 in [-1, V).
        row: First table row of each block, ``(M,)`` int64, multiples of ``block``.
        block: Number of leaf units per block.
        norm: Meaning of the table. ``"logits"``: each row is log-softmaxed, and a row of only
            ``-inf`` stays unchanged. ``"none"``: the entries are log-probabilities.

    Returns:
        ``(B, M * block)`` in the dtype of ``table``.

    Raises:
        ValueError: If a shape, dtype, device or ``norm`` is wrong or, on the CPU, a number is out
            of range.
    """
    return _c.circuit_table.default(table, x, row, block, norm)


@fake("circuit_table")
def _fake_table(table: Tensor, x: Tensor, row: Tensor, block: int, norm: str) -> Tensor:
    op = "circuit_table"
    require_tensor(op, "table", table, "(R, V)", None, *_FLOATS)
    require_tensor(op, "x", x, "(B, M)", None, torch.int64)
    require_tensor(op, "row", row, "(M,)", x.shape[1:], torch.int64)
    return _unit_major(table, x.shape[0], x.shape[1] * block)


@fake("circuit_table_backward")
def _fake_table_backward(de: Tensor, table: Tensor, *_: Any) -> Tensor:
    return de.new_empty(table.shape)


def circuit_layers(
    leaf: Tensor,
    w: Tensor,
    program: Program,
    norm: str = "logits",
    semiring: str = "sum",
    precision: str = "fp32",
) -> Tensor:
    """Compute the log-values of all units of a circuit from the log-values of its leaf units.

    Every sum o with weights ``W`` is ``l[o] = log sum_i W[o, i] exp(term[i])``. A term is the
    log-value of a product, which is the sum of the log-values of its factors. Each sum is computed
    as in :func:`log_einsum_exp`, equally exact at ``-inf`` and safe from underflow. A row's bits
    depend neither on its batch nor on the number of threads.

    Args:
        leaf: Log-values of the leaf units, ``(B, N)`` float32, or float64 on the CPU.
        w: Weights of all sums, one vector, in the dtype and on the device of ``leaf``.
        program: Program to execute.
        norm: Meaning of ``w``. ``"logits"``: each row of a matrix of weights is log-softmaxed.
            ``"none"``: the entries are log-weights.
        semiring: ``"sum"``, or ``"max"`` for the largest term (NaN is ignored).
        precision: Precision of sums on CUDA, as for :func:`log_einsum_exp`, but for any number of
            terms. The CPU and ``"max"`` support only ``"fp32"``; gradients always use ``"fp32"``.

    Returns:
        Log-values ``(B, U)``: the constants 0 and ``-inf``, the leaf units, then all other units.

    Raises:
        ValueError: If a shape, dtype, device or option is wrong or, on the CPU, the program is
            inconsistent.
    """
    return _c.circuit_layers.default(
        leaf, w, program.numbers, program.plan, norm, semiring, precision
    )


@fake("circuit_layers")
def _fake_layers(leaf: Tensor, w: Tensor, program: Tensor, plan: list[int], *_: str) -> Tensor:
    require_tensor("circuit_layers", "leaf", leaf, "(B, units)", None, *_FLOATS)
    require_tensor("circuit_layers", "w", w, "(W,)", None, leaf.dtype)
    return _unit_major(leaf, leaf.shape[0], plan[0])


def circuit_layers_backward(
    droots: Tensor,
    val: Tensor,
    w: Tensor,
    program: Program,
    norm: str = "logits",
    need_dw: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of :func:`circuit_layers` from the gradients of the roots.

    With log-weights (``norm="none"``) and ``droots`` 1, the gradients are the expected flows of the
    circuit.

    Args:
        droots: Gradients of the roots, ``(B, R)``.
        val: Result of :func:`circuit_layers` with ``semiring="sum"``.
        w: Weights that were passed to :func:`circuit_layers`.
        program: Program that was passed to :func:`circuit_layers`.
        norm: Meaning of ``w``, see :func:`circuit_layers`.
        need_dw: Whether to compute the gradient of the weights.

    Returns:
        The gradients of all units, ``(B, U)``, and of the weights, ``(W,)`` or empty.

    Raises:
        ValueError: As for :func:`circuit_layers`.

    Source: Darwiche 2003, section 3.
    """
    return _c.circuit_layers_backward.default(
        droots, val, w, program.numbers, program.plan, norm, need_dw
    )


@fake("circuit_layers_backward")
def _fake_layers_backward(
    droots: Tensor, val: Tensor, w: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return _unit_major(val, *val.shape), w.new_empty(w.numel() if rest[-1] else 0)


def circuit_layers_walk(
    val: Tensor, w: Tensor, program: Program, root: Tensor, uniforms: Tensor | None = None
) -> Tensor:
    """Walk from a root to the leaves, along one term of each sum and all factors of each product.

    Term i of sum o has weight ``W[o, i] exp(term[i])``. A walk follows the term with the largest
    weight (the first one at a tie), or draws a term with :func:`reference._circuit.draw`. If
    ``val`` is from :func:`circuit_layers` with ``"max"``, the largest weights lead to the most
    probable tree; if it is from ``"sum"``, a drawn tree is an exact sample. The normaliser of a row
    of weights cancels, so there is no argument ``norm``.

    Args:
        val: Result of :func:`circuit_layers`, ``(B, U)``.
        w: Weights that were passed to :func:`circuit_layers`.
        program: Program that was passed to :func:`circuit_layers`.
        root: Index of the root of each row's walks, ``(B,)`` int64 in [0, R). On CUDA, walks from a
            root out of range return -1 for all variables.
        uniforms: Uniform numbers ``(M, sums)`` float32 or float64 in [0, 1), one per set of sums
            with common terms, in the order of the graph. M is a multiple of B, and the walks of a
            row are consecutive. None for one walk per row along the largest weights.

    Returns:
        Leaf unit of each variable, ``(M, variables)`` int64: a column of ``val``, or -1 outside the
        root's scope.

    Raises:
        ValueError: If a shape, dtype or device is wrong or, on the CPU, the program is
            inconsistent, or a root or a uniform number is out of range.

    Source: ancestral sampling given evidence, and max-product decoding, Peharz et al. 2017.
    """
    return _c.circuit_layers_walk.default(val, w, program.numbers, program.plan, root, uniforms)


@fake("circuit_layers_walk")
def _fake_walk(
    val: Tensor, w: Tensor, program: Tensor, plan: list[int], root: Tensor, uniforms: Tensor | None
) -> Tensor:
    op, walks = "circuit_layers_walk", root
    require_tensor(op, "val", val, "(B, U)", None, *_FLOATS)
    require_dtype(op, "w", w, val.dtype)
    require_tensor(op, "root", root, "(B,)", val.shape[:1], torch.int64)
    if uniforms is not None:
        require_tensor(op, "uniforms", uniforms, "(M, sums)", None, *_FLOATS)
        walks = uniforms
    return root.new_empty(walks.shape[0], plan[8])


def _unit_major(like: Tensor, rows: int, units: int) -> Tensor:
    lanes = (rows + 15) // 16 * 16
    return like.new_empty(units, lanes).narrow(1, 0, rows).t()
