"""Fastest known implementations of a hidden Markov model without this package.

All implementations compute the log-likelihood of ``Circuit(RegionGraph.hmm(...))`` from copies of
its parameters. The steps are stacked into one tensor in the order of evaluation, from the last
variable to the first. This is also the order of the circuit's weights.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from lora_ext.circuits import Circuit

JAX_CHAIN = Path(__file__).with_name("jax_chain.py")
FORMS = ("log", "scaled")


@dataclass(frozen=True)
class Peer:
    """Model with its own copy of the parameters.

    Attributes:
        value: Computes log-likelihoods ``(B,)``.
        step: Runs forward and backward.
        gradient: Returns the gradient of the sum of all log-likelihoods, in the order of
            ``Circuit.weights``.
    """

    value: Callable[[], object]
    step: Callable[[], object]
    gradient: Callable[[], Tensor]


def torch_peer(
    model: Callable[[], Tensor], weights: list[Tensor], others: Sequence[Tensor] = ()
) -> Peer:
    """Return the peer of a torch model with the parameters ``weights`` and ``others``.

    Each step first sets the gradients of all these parameters to None, as ``zero_grad`` does.
    """

    def step() -> None:
        for w in (*weights, *others):
            w.grad = None
        model().sum().backward()

    def gradient() -> Tensor:
        step()
        return torch.cat([w.grad.flatten() for w in weights if w.grad is not None])

    return Peer(model, step, gradient)


@dataclass(frozen=True)
class Chain:
    """Logits ``leaf (T, r, V)``, ``steps (T - 1, r, r)``, ``first (1, r)``; last variable first."""

    leaf: Tensor
    steps: Tensor
    first: Tensor

    @classmethod
    def of(cls, circuit: Circuit) -> Chain:
        """Copy and stack the circuit's parameters."""
        names = {circuit.graph.label(i): i for i in range(len(circuit.graph.regions))}
        last_first = range(circuit.num_variables - 1, -1, -1)
        leaf = [circuit.region_leaves(names[f"x{t}"])["logits"] for t in last_first]
        steps = [circuit.region_weights(names[f"z{t}"]) for t in last_first]
        parts = (torch.stack(leaf), torch.stack(steps[:-1]), steps[-1])
        return cls(*(t.detach().clone().requires_grad_() for t in parts))

    def peer(self, form: Callable[..., Tensor], x: Tensor) -> Peer:
        """Return the peer that evaluates ``form``, such as :func:`stacked`, on these parameters."""
        parts = self.leaf, self.steps, self.first
        return torch_peer(lambda: form(*parts, x), [self.steps, self.first], [self.leaf])


def stacked(leaf: Tensor, steps: Tensor, first: Tensor, x: Tensor) -> Tensor:
    """Run the recursion in log space; everything outside of the recursion is batched."""
    e = _observed(leaf.log_softmax(2), x)  # T x (B, r)
    w = steps.softmax(2).transpose(1, 2).unbind()
    below = e[0]
    for t in range(len(w)):
        top = below.amax(1, keepdim=True)
        below = ((below - top).exp() @ w[t]).log() + top + e[t + 1]
    top = below.amax(1, keepdim=True)
    return (((below - top).exp() @ first.softmax(1).T).log() + top)[:, 0]


def scaled(leaf: Tensor, steps: Tensor, first: Tensor, x: Tensor) -> Tensor:
    """Run the recursion with probabilities, which are divided by the largest one at every step.

    This form needs no logarithm of states, but a state that is less likely than the most likely one
    by a factor of e^-88 underflows to 0.
    """
    p = _observed(leaf.softmax(2), x)
    w = steps.softmax(2).transpose(1, 2).unbind()
    below, tops = p[0], []
    for t in range(len(w)):
        tops.append(below.amax(1, keepdim=True))
        below = (below / tops[-1]) @ w[t] * p[t + 1]
    return (below @ first.softmax(1).T)[:, 0].log() + torch.cat(tops, 1).log().sum(1)


def _observed(table: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """Look up the observed values in every state: ``(B, r)`` per variable, last variable first."""
    steps, _, values = table.shape
    index = torch.arange(steps)[:, None] * values + x.T.flip(0)  # (T, B)
    return embedding(index, table.transpose(1, 2).flatten(0, 1)).unbind()


class Jax:
    """``jax.jit`` over ``lax.scan`` in a separate process with the same number of threads.

    Args:
        python: Interpreter that has jax.
        chain: The parameters.
        x: Observations ``(B, T)``.
        threads: Number of threads for XLA.
    """

    def __init__(self, python: str, chain: Chain, x: Tensor, threads: int):
        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name)
        parts = {"leaf": chain.leaf, "steps": chain.steps, "first": chain.first}
        arrays = {k: t.detach().numpy() for k, t in parts.items()}
        np.savez(self._path / "chain.npz", x=x.flip(1).numpy().astype(np.int32), **arrays)
        flag = f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()}"
        own = {"NPROC": str(threads), "XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen(
            [python, str(JAX_CHAIN), str(self._path)],
            env=os.environ | own,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.version = self._answer()

    def peer(self, form: str) -> Peer:
        value, step = (JaxCall(self, form, what) for what in ("value", "step"))
        return Peer(value, step, lambda: torch.cat([t.flatten() for t in step.result()[1:]]))

    def ask(self, form: str, what: str, count: int) -> float:
        """Make ``count`` calls in the other process; return the seconds that they took."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([form, what, count]) + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def read(self) -> list[Tensor]:
        """Return the result of the last call."""
        with np.load(self._path / "result.npz") as arrays:
            return [torch.from_numpy(arrays[k]) for k in arrays.files]

    def close(self) -> None:
        self._process.communicate()
        self._folder.cleanup()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"jax: the process ended with status {self._process.wait()}")
        return line.strip()


@dataclass(frozen=True)
class JaxCall:
    """Call in the process of ``jax``, timed by the clock of that process (``common.Remote``)."""

    jax: Jax
    form: str
    what: str

    def seconds(self, count: int) -> float:
        """Return the seconds of ``count`` calls, after one call that is not timed."""
        return self.jax.ask(self.form, self.what, count)

    def result(self) -> list[Tensor]:
        """Make one call and return its result."""
        self.seconds(1)
        return self.jax.read()

    def __call__(self) -> Tensor:
        return self.result()[0]


def jax_missing(python: str) -> str | None:
    """Return the reason why jax is skipped, or None if it can run."""
    if shutil.which(python) is None:
        return f"no interpreter {python}"
    found = subprocess.run([python, "-c", "import jax"], capture_output=True, text=True)
    if found.returncode == 0:
        return None
    last = (found.stderr.strip().splitlines() or ["nothing"])[-1]
    return f"{python} prints {last}; install the extra jax there, or set --jax-python"
