"""The gate on machine code: a kernel that spills must fail, its good twin must not."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("sass_gate", ROOT / "tools/sass_gate.py")
assert spec and spec.loader
gate = importlib.util.module_from_spec(spec)
sys.modules["sass_gate"] = gate
spec.loader.exec_module(gate)

SOURCE = """
namespace lora_ext { namespace {
template <class T, int kStep> __global__ void good_kernel(const T* x, T* y, int n) {
    __shared__ T s[128];
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        s[threadIdx.x] = x[i];
        __syncthreads();
        y[i] = s[threadIdx.x ^ kStep];
        __syncthreads();
    }
}
__global__ void spill_kernel(float* y, int n) {
    float a[256];
    for (int i = 0; i < 256; ++i) a[i] = y[i];
    for (int k = 0; k < n; ++k) a[(k * 37 + n) & 255] += a[k & 255];
    for (int i = 0; i < 256; ++i) y[i] = a[i];
}
}
void launch(float4* x, float* y) {
    good_kernel<float4, 1><<<1, 128>>>(x, x, 3);
    spill_kernel<<<1, 32>>>(y, 3);
}}
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    folder = tmp_path_factory.mktemp("sass")
    (folder / "t.cu").write_text(SOURCE)
    targets = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"]
    subprocess.run([nvcc, "-O3", *targets, "-c", "t.cu", "-o", "t.o"], cwd=folder, check=True)
    return {(kernel.name, kernel.arch): kernel for kernel in gate.read([folder / "t.o"])}


ARCHS = ("sm_80", "sm_90a")


def test_every_kernel_is_found_under_its_plain_name(kernels):
    names = ("good_kernel<float4, 1>", "spill_kernel")
    assert set(kernels) == {(name, arch) for name in names for arch in ARCHS}
    assert all(len(kernel.code) > 10 and kernel.registers > 0 for kernel in kernels.values())


@pytest.mark.parametrize("arch", ARCHS)
def test_a_kernel_that_spills_fails(kernels, arch):
    reasons = " ".join(gate.judge(kernels["spill_kernel", arch], []))
    assert "1024 bytes of stack" in reasons and "LDL/STL" in reasons


@pytest.mark.parametrize("arch", ARCHS)
def test_a_good_kernel_passes_rules_that_hold(kernels, arch):
    rule = {
        "match": "good_kernel<float4, *>",
        "arch": [arch],
        "max_registers": 40,
        "threads": 128,
        "min_blocks": 8,
        "require_loop": [r"LDG\b.*\.128", r"BAR\b"],
        "forbid_loop": [r"(LDG|STG)\b(?!.*\.128)"],
    }
    assert gate.judge(kernels["good_kernel<float4, 1>", arch], [rule]) == []


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"max_registers": 4}, "registers, budget 4"),
        ({"require": [r"HMMA\b"]}, r"no HMMA\b"),
        ({"require_loop": [r"EXIT\b"]}, r"no EXIT\b in a loop"),
        ({"forbid_loop": [r"LDG\b"]}, "in a loop, forbidden by"),
        ({"threads": 1024, "min_blocks": 3}, "2 blocks per multiprocessor, least 3"),
    ],
)
def test_a_broken_rule_is_named(kernels, rule, words):
    reasons = gate.judge(kernels["good_kernel<float4, 1>", "sm_90a"], [{"match": "*", **rule}])
    assert len(reasons) == 1 and words in reasons[0]


def test_a_rule_for_another_kernel_or_architecture_is_ignored(kernels):
    kernel = kernels["good_kernel<float4, 1>", "sm_80"]
    other = [
        {"match": "bad_*", "max_registers": 1},
        {"match": "*", "arch": ["sm_90a"], "max_registers": 1},
    ]
    assert gate.judge(kernel, other) == []


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    # computed by cuda_occupancy.h (CUDA 13.0), fed with the constants of an H100
    [
        (78, 128, 31232, 6),
        (32, 1024, 0, 2),
        (255, 256, 0, 1),
        (16, 32, 0, 32),
        (32, 128, 102400, 2),
        (40, 96, 8192, 16),
        (168, 384, 200000, 1),
        (64, 256, 48000, 4),
        (24, 160, 5000, 12),
    ],
)
def test_occupancy_agrees_with_cuda_occupancy_h(registers, threads, shared, blocks):
    assert gate.blocks_per_multiprocessor(registers, threads, shared) == blocks


def test_an_unknown_key_in_the_rules_is_refused(tmp_path):
    (tmp_path / "kernels.toml").write_text('[[rule]]\nmatch = "*"\nmax_register = 3\n')
    with pytest.raises(SystemExit, match="unknown keys \\['max_register'\\]"):
        gate.load_rules(tmp_path / "kernels.toml")


def test_the_rules_in_the_repository_are_readable():
    gate.load_rules(gate.RULES)
