"""Run jax for ``chain_peers.Jax``, which starts ``python jax_chain.py FOLDER`` and uses its pipes.

The script reads FOLDER/chain.npz and prints jax's version. For each line ``[form, what, count]`` of
its input, it prints the seconds of ``count`` calls and writes the result to FOLDER/result.npz.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np


def log_form(parts, x):
    """Run the recursion in log space."""
    leaf, steps, first = parts
    e = _observed(jax.nn.log_softmax(leaf, 2), x)

    def step(below, inputs):
        w, here = inputs
        top = below.max(1, keepdims=True)
        return jnp.log(jnp.exp(below - top) @ w.T) + top + here, None

    below, _ = jax.lax.scan(step, e[0], (jax.nn.softmax(steps, 2), e[1:]))
    top = below.max(1, keepdims=True)
    return (jnp.log(jnp.exp(below - top) @ jax.nn.softmax(first, 1).T) + top)[:, 0]


def scaled_form(parts, x):
    """Run the recursion with probabilities, which are divided by the largest one at every step."""
    leaf, steps, first = parts
    p = _observed(jax.nn.softmax(leaf, 2), x)

    def step(carry, inputs):
        (below, total), (w, here) = carry, inputs
        top = below.max(1, keepdims=True)
        return ((below / top) @ w.T * here, total + jnp.log(top)), None

    start = p[0], jnp.zeros((len(x), 1))
    (below, total), _ = jax.lax.scan(step, start, (jax.nn.softmax(steps, 2), p[1:]))
    return (jnp.log(below @ jax.nn.softmax(first, 1).T) + total)[:, 0]


def _observed(table, x):
    """Look up the observations ``x (B, T)`` in ``table (T, r, V)``; return ``(T, B, r)``."""
    return jax.vmap(lambda rows, values: rows[:, values].T)(table, x.T)


def main() -> None:
    folder = Path(sys.argv[1])
    with np.load(folder / "chain.npz") as arrays:
        parts = tuple(jnp.asarray(arrays[k]) for k in ("leaf", "steps", "first"))
        x = jnp.asarray(arrays["x"])
    calls = {}
    for name, form in (("log", log_form), ("scaled", scaled_form)):
        calls[name, "value"] = jax.jit(form)
        calls[name, "step"] = jax.jit(jax.grad(lambda p, x, f=form: f(p, x).sum()))
    print(jax.__version__, flush=True)
    for line in sys.stdin:
        form, what, count = json.loads(line)
        call = calls[form, what]
        result = jax.block_until_ready(call(parts, x))  # compiles, and waits for the result
        start = time.perf_counter()
        for _ in range(count):
            jax.block_until_ready(call(parts, x))
        took = time.perf_counter() - start
        listed = result if isinstance(result, tuple) else (result,)
        np.savez(folder / "result.npz", *map(np.asarray, listed))
        print(took, flush=True)


if __name__ == "__main__":
    main()
