"""Whole circuits in one call: tables of leaves, the values of all units, their flows, and walks.

Letters: ``B`` rows, ``N`` leaf units, ``U`` units, ``W`` weights, ``R`` roots; ``M`` blocks of leaf
units, or walks. What an op returns as ``(B, U)`` lies unit-major in memory: a vector holds one unit
of many rows.

Sources: expected flows as gradients, Darwiche 2003; layers of one shape, Peharz et al. 2020.
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
    """What :func:`circuit_layers` computes: of a region graph, what
    ``lora_ext.circuits._program.compile_program(graph, compile_graph(graph))`` makes.

    Attributes:
        numbers: int32, on the device of the values; ``csrc/include/lora_ext/circuit_layers.h`` has
            the layout.
        plan: its sizes, ten numbers, and four for each stage: what a host needs to know.
    """

    numbers: Tensor
    plan: list[int]

    def to(self, device: torch.device) -> Program:
        """Return the same program with its ``numbers`` on another ``device``."""
        return Program(self.numbers.to(device), self.plan)


def circuit_table(table: Tensor, x: Tensor, row: Tensor, block: int, norm: str = "none") -> Tensor:
    """Return log-values of leaves over finitely many values, looked up.

    ``out[b, m * block + j] = log p[row[m] + j, x[b, m]]``, 0 where ``x`` is -1. Differentiable once
    in ``table``; sums over rows of data are taken in order.

    Args:
        table: ``(R, V)`` float32, or float64 on the CPU; a row per distribution.
        x: ``(B, M)`` int64 in [-1, V).
        row: ``(M,)`` int64, multiples of ``block``: the first row of each block.
        block: leaf units that look at one variable.
        norm: ``"logits"``: rows are log-softmaxed, those of nothing but ``-inf`` stay so;
            ``"none"``: log-probabilities as they are.

    Returns:
        ``(B, M * block)`` in the dtype of ``table``.

    Raises:
        ValueError: if a shape, dtype, device or name disagrees or, on the CPU, a number is out of
            range.
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
    """Return log-values of all units of a circuit, from those of its leaves.

    ``l[out] = log sum_i W[o, i] exp(term[i])`` of every sum, where a term is the sum of log-values
    of other units: :func:`log_einsum_exp` after the products, node after node, as exact at ``-inf``
    and as safe from underflow. A row's bits depend neither on its batch nor on threads.

    Args:
        leaf: ``(B, N)`` float32, or float64 on the CPU.
        w: ``(W,)``, dtype and device of ``leaf``: the weights of all sums.
        program: what is computed.
        norm: ``"logits"``: each row of a matrix is log-softmaxed; ``"none"``: log-weights as they
            are.
        semiring: ``"max"`` takes the largest term in place of their sum, and passes over NaN.
        precision: of sums on CUDA, as :func:`log_einsum_exp` takes it, and of any number of terms;
            the CPU and ``"max"`` know ``"fp32"`` alone, and gradients are computed in it.

    Returns:
        ``(B, U)``: 0, ``-inf``, the leaves, then all other units.

    Raises:
        ValueError: if a shape, dtype, device or name disagrees or, on the CPU, the program does not
            hold together.
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
    """Return gradients of :func:`circuit_layers` from those of the roots.

    With log-weights, ``norm="none"`` and ``droots`` 1 they are the expected flows of a circuit.

    Args:
        droots: ``(B, R)``.
        val: the result, of the sum.
        w, program, norm: as they went in.
        need_dw: whether the gradient of the weights is wanted.

    Returns:
        Those of all units ``(B, U)``, and of the weights ``(W,)``, or empty.

    Raises:
        ValueError: as there.

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
    """Walk from the roots down along one term per sum; return the leaf unit of each variable.

    A sum weighs its terms by ``W[o, i] exp(term[i])``. A walk takes the heaviest, the first of
    several, or draws one by the rule of :func:`reference._circuit.draw`: after
    :func:`circuit_layers` with ``"max"`` it is the best tree, after ``"sum"`` an exact sample of
    one. What normalises a row of weights says nothing of its terms, so there is no ``norm``.

    Args:
        val: ``(B, U)``, the result of :func:`circuit_layers`.
        w, program: as they went in.
        root: ``(B,)`` int64 in [0, R): the root that a row's walks start from. Out of range on
            CUDA, its walks come nowhere.
        uniforms: ``(M, sums)`` float32 or float64 in [0, 1), for the regions of sums in the order
            of the graph; M is a multiple of B, and the walks of a row follow one another. None: one
            walk per row, which takes the heaviest terms.

    Returns:
        ``(M, variables)`` int64: columns of ``val``, or -1 outside the root's scope.

    Raises:
        ValueError: if a shape, dtype or device disagrees or, on the CPU, the program does not hold
            together, or a root or a uniform is out of range.

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
