"""Kernel instances that the cases of ``lora-ext gpu-report`` launch, compared with kernels.lock."""

from __future__ import annotations

import launched
import pytest
import torch

from lora_ext import _loader
from lora_ext.cli import _gpu_cases, _gpu_report, _gpu_variants


def test_names_of_the_lock_and_of_symbols_are_equal() -> None:
    names = launched.locked()
    assert "lora_gram_kernel<__half, double>" in names and "lora_plan_kernel" in names
    scope = "lora_ext::(anonymous namespace)::"
    kernels = {
        "lora_plan_kernel(lora_ext::LoraIds, int)": "lora_plan_kernel",
        "void a_kernel<(Product)0, 64>(lora_ext::Gemm)": "a_kernel<(Product)0, 64>",
    }
    for symbol, name in kernels.items():
        assert launched.lock_name(symbol.replace("void ", f"void {scope}")) == name
    symbol = f"void {scope}b_kernel<({scope}Product)0, {scope}WarpTeam>({scope}Row)"
    assert launched.lock_name(symbol) == "b_kernel<(Product)0, WarpTeam>"


def test_names_of_cases_are_unique_and_begin_with_the_timed_ones() -> None:
    names = [case.op for case in _gpu_variants.all_cases()]
    timed = [case.op for case in _gpu_cases.all_cases()]
    assert len(set(names)) == len(names) and names[: len(timed)] == timed


@pytest.mark.slow
@pytest.mark.emulated
def test_cases_launch_every_instance_of_the_lock(emulated: torch.device) -> None:
    if reason := launched.lacking():
        pytest.skip(reason)
    path = str(_loader.load("_emu").__file__)
    found: set[str] = set()
    wrong = []
    for case in _gpu_variants.all_cases():
        with launched.recorded(path) as names:
            check = _gpu_report._check(case, emulated)
        print(f"{case.op}: error {check['error']}, {', '.join(sorted(set(names)))}")
        found |= set(names)
        wrong += [] if check["ok"] else [check]
        assert names, f"{case.op} launched no kernel"
    assert not wrong
    assert sorted(found ^ launched.locked()) == []
