"""Script that test_mtpc_circuit_head_memory.py runs in another process.

It prints by how many bytes one loss and its backward raise the peak memory of the process.
"""

import resource
import sys

import torch

from lora_ext.methods.mtpc import window_loss
from lora_ext.nn import CircuitHead


def main() -> None:
    """Print the growth; command line: rows, hidden, vocabulary, positions, rank, kind, emission."""
    rows, hidden, vocabulary, n_token, rank = map(int, sys.argv[1:6])
    torch.set_num_threads(1)
    head = CircuitHead(hidden, vocabulary, n_token, rank, *sys.argv[6:8])

    def step(n: int) -> None:
        h = torch.randn(n, hidden, requires_grad=True)
        loss, _ = window_loss(head, h, torch.randint(0, vocabulary, (n, n_token)))
        loss.backward()

    step(2)  # loads code and allocates the gradients of the parameters
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(rows)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


main()
