"""The asan flavour: quiet on a correct run, on all those stacks, and loud on a bad one."""

import subprocess
from pathlib import Path


def test_a_correct_run_is_quiet(build_folder: Path):
    done = subprocess.run([build_folder / "emu_asan"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "exact\n", "")


def test_a_buffer_shorter_than_declared_is_found(build_folder: Path):
    done = subprocess.run([build_folder / "emu_asan", "short"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "matmul_tf32_kernel" in done.stderr
