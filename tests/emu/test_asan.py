"""The flavour with the address sanitizer: it must report wrong accesses and nothing else.

The flavour `check` compares every access of a kernel with the buffer size that the launcher
declares. The flavour `asan` checks the actual buffers. It runs on all kernels only in `make asan`.
"""

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

# libasan 13 and newer keep fake stacks by default, which an emulator with many fibers fills without
# end (21 GB for `packed_linear_asan`).
ENV = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0"}


def test_correct_run_reports_nothing(build_folder: Path):
    done = subprocess.run([build_folder / "emu_asan"], capture_output=True, text=True, env=ENV)
    assert (done.returncode, done.stdout, done.stderr) == (0, "exact\n", "")


def test_buffer_shorter_than_declared_is_found(build_folder: Path):
    done = subprocess.run(
        [build_folder / "emu_asan", "short"], capture_output=True, text=True, env=ENV
    )
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "matmul_tf32_kernel" in done.stderr


@pytest.mark.sanitized
@pytest.mark.parametrize(
    "program",
    [
        "lora_asan",
        "lora_train_asan",
        "circuit_asan",
        "circuit_decode_asan",
        "circuit_sum_asan",
        "circuit_layers_asan",
        "depth_mix_asan",
        "packed_linear_asan",
        "row_attention_asan",
        "vocab_asan",
    ],
)
def test_kernels_stay_inside_their_buffers(sanitized_kernels: Path, program: str):
    done = subprocess.run([sanitized_kernels / program], capture_output=True, text=True, env=ENV)
    assert (done.returncode, done.stdout, done.stderr) == (0, "exact\n", "")


@pytest.mark.sanitized
@pytest.mark.parametrize(
    ("program", "mode", "kernel"),
    [
        # This kernel reads rows in 16-byte pieces.
        ("lora_asan", "workspace", "lora_expand_kernel"),
        ("lora_asan", "overread", "lora_shrink_decode_kernel"),
        ("lora_train_asan", "workspace", "lora_train_project_kernel"),
        ("circuit_asan", "overread", "circuit_leaf_kernel"),
        ("depth_mix_asan", "overread", "depth_mix_kernel"),
        ("circuit_decode_asan", "overread", "circuit_sample_kernel"),
    ],
)
def test_access_one_element_beyond_a_kernel_buffer_is_found(
    sanitized_kernels: Path, program: str, mode: str, kernel: str
):
    """Check that mode ``workspace``, with a workspace one float smaller than the launcher's size,
    fails."""
    done = subprocess.run(
        [sanitized_kernels / program, mode], capture_output=True, text=True, env=ENV
    )
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert kernel in done.stderr
