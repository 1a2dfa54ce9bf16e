"""Peak memory of a training step, which never stores all logits over the vocabulary."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("circuit_head_memory.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "hidden", "vocabulary", "n_token", "rank", "kind", "emission"),
    [
        (2048, 64, 320, 8, 32, "cp", "full"),
        (2048, 64, 320, 8, 32, "btree", "full"),
        (2048, 64, 320, 8, 32, "hmm", "full"),
        (64, 64, 49152, 4, 8, "hmm", "adapter"),
    ],
)
def test_peak_of_a_step_is_at_most_a_quarter_of_the_logits(
    rows: int, hidden: int, vocabulary: int, n_token: int, rank: int, kind: str, emission: str
):
    arguments = [rows, hidden, vocabulary, n_token, rank, kind, emission]
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={"PYTHONPATH": ".", "PATH": "/usr/bin:/bin"},
    )
    assert run.returncode == 0, run.stderr
    logits = 4 * rows * n_token * rank * vocabulary
    assert int(run.stdout) <= logits / 4, f"{int(run.stdout) / 2**20:.0f} MiB"
