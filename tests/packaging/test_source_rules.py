"""Rules for source files that a compiler does not enforce, such as which headers a file may
include."""

import ast
import re
import runpy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from backends import OP_MODULES
from scripts import ROOT

import lora_ext
from lora_ext import reference
from lora_ext.ops import _registration

CSRC = ROOT / "csrc"
SOURCES = [p for p in CSRC.rglob("*") if p.suffix in {".h", ".cuh", ".cu", ".cpp"}]


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.M)


@pytest.mark.parametrize("room", ["include", "device", "cuda", "cpu", "emu"])
def test_kernels_twins_and_emulator_include_no_torch_header(room):
    bad = {
        str(path.relative_to(ROOT)): header
        for path in SOURCES
        if path.is_relative_to(CSRC / room)
        for header in includes(path)
        if re.match(r"(torch|ATen|c10|pybind11|Python\.h)", header)
    }
    assert not bad


def test_torch_extension_and_c10_cuda_headers_are_included_in_one_place_each():
    users = [p.relative_to(CSRC).as_posix() for p in SOURCES if "torch/extension.h" in includes(p)]
    assert users == ["bindings.cpp"]
    users = {
        p.relative_to(CSRC).as_posix()
        for p in SOURCES
        if any(h.startswith(("c10/cuda", "ATen/cuda")) for h in includes(p))
    }
    assert users <= {"ops/stream.h"}


def test_kernel_files_access_the_hardware_only_through_the_device_header():
    wrong = []
    for path in (p for p in SOURCES if p.is_relative_to(CSRC / "cuda")):
        code = re.sub(r"//[^\n]*", "", path.read_text())
        wrong += [f"{path.name}: {w}" for w in (r"\basm\b", "<<<") if re.search(w, code)]
        wrong += [f"{path.name}: {h}" for h in includes(path) if h.startswith("cuda")]
    assert not wrong


def test_comments_have_at_most_a_hundred_columns():
    """Check comments, which clang-format does not wrap because some of them contain tables."""
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in SOURCES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 100 and "//" in line
    ]
    assert not long


def test_federated_needs_no_flower():
    files = (ROOT / "lora_ext/federated").glob("*.py")
    flower = re.compile(r"^\s*(from|import) flwr\b", re.M)
    assert not [path.name for path in files if flower.search(path.read_text())]


def test_ops_are_called_only_by_ops_through_the_name_that_tests_replace():
    """Check calls through ``torch.ops``. Other packages may only call ops that they define in
    Python."""
    callers = {
        path.relative_to(ROOT / "lora_ext").parts[0]
        for path in (ROOT / "lora_ext").rglob("*.py")
        if OPS & set(re.findall(r"torch\.ops\.lora_ext\.(\w+)", path.read_text()))
    }
    assert callers <= {"ops"}
    calls = {
        path.stem: re.findall(r".*torch\.ops\b(?!\.aten).*", path.read_text())
        for path in (ROOT / "lora_ext/ops").glob("*.py")
        if path.stem not in ("__init__", "_registration")
    }
    assert all(set(lines) <= {"_c = torch.ops.lora_ext"} for lines in calls.values())
    assert {m.__name__.split(".")[-1] for m in OP_MODULES} == {n for n, c in calls.items() if c}


OPS = set(
    re.findall(
        r"^ {4}(?:Op|Differentiable|NoGradient|InPlace)<&(\w+)",
        (CSRC / "ops/table.h").read_text(),
        re.M,
    )
)


class Tellings(NamedTuple):
    """Names of an op's formula (in ``lora_ext.reference``), of its loop (the CPU twin) and of its
    CUDA launcher."""

    reference: str
    twin: str
    launcher: str  # without "launch_", or "-" if the op runs on the CPU only


# Each line contains an op, its formula, its CPU twin and its CUDA launcher.
TABLE = """\
lora_plan lora_plan lora_plan_cpu lora_plan
lora_segment_ids lora_segment_ids lora_segment_ids_cpu lora_segment_ids
lora_shrink lora_shrink LoraCpu.shrink lora_shrink
lora_expand_ lora_expand_ LoraCpu.expand lora_expand
lora_apply lora_apply LoraCpu.apply lora_apply
lora_apply_ lora_apply_ LoraCpu.apply lora_apply
lora_apply_siblings_ lora_apply_siblings_ LoraCpu.apply lora_apply
lora_linear_forward lora_linear LoraTrainCpu.shrink lora_train_shrink
lora_linear_backward lora_linear_backward LoraTrainCpu.da_dx lora_train_backward
lora_dropout lora_dropout LoraTrainCpu.dropout lora_dropout
lora_gram lora_gram GramCpu.gram lora_gram
lora_pair_stats lora_pair_stats GramCpu.pair_stats lora_pair_stats
circuit_leaf circuit_scan CircuitCpu.leaf circuit_leaf
circuit_leaf_backward circuit_scan CircuitCpu.leaf_backward circuit_leaf_backward
emission_gather emission_gather CircuitCpu.leaf circuit_leaf
emission_gather_backward emission_gather CircuitCpu.leaf_backward circuit_leaf_backward
circuit_scan circuit_scan CircuitCpu.scan circuit_scan
circuit_scan_backward circuit_scan CircuitCpu.scan_backward circuit_scan_backward
circuit_conditional_dist \
    circuit_conditional_dist CircuitDecodeCpu.conditional_dist circuit_conditional_dist
circuit_sample circuit_sample CircuitDecodeCpu.sample circuit_sample
circuit_argmax circuit_argmax CircuitDecodeCpu.argmax circuit_argmax
spec_verify spec_verify CircuitDecodeCpu.verify spec_verify
log_einsum_weights log_einsum_exp LogSumCpu.weights log_sum_weights
log_einsum_exp log_einsum_exp LogSumCpu.forward log_sum_finish
log_einsum_exp_backward log_einsum_exp LogSumCpu.dvalues log_sum_dvalues
log_einsum_max log_einsum_exp LogSumCpu.max log_max
circuit_table circuit_table CircuitTableCpu.forward circuit_table
circuit_table_backward circuit_table CircuitTableCpu.backward circuit_table_backward
circuit_layers circuit_layers LayersCpu.forward layers_forward
circuit_layers_backward circuit_layers LayersCpu.backward layers_backward
circuit_layers_walk circuit_layers_walk LayersCpu.walk layers_walk
depth_mix_forward depth_mix DepthMixCpu.forward depth_mix
depth_mix_backward depth_mix DepthMixCpu.backward depth_mix_backward
pack_weight pack_weight PackedLinearCpu.pack pack_weight
packed_linear packed_linear PackedLinearCpu.product packed_linear
packed_lora_linear packed_linear PackedLinearCpu.product packed_linear
unpack_weight unpack_weight PackedBitsCpu.unpack unpack_weight
pointwise pointwise PointwiseCpu.apply -
row_attention row_attention RowAttentionCpu.attend row_attention
vocab_cross_entropy chunked_cross_entropy VocabCpu.cross_entropy_update cross_entropy_update
vocab_cross_entropy_backward \
    chunked_cross_entropy VocabCpu.cross_entropy_gradient cross_entropy_gradient
vocab_kl chunked_kl VocabCpu.kl_update kl_update
vocab_kl_backward chunked_kl VocabCpu.kl_gradient kl_gradient
"""
TELLINGS = {op: Tellings(*told) for op, *told in map(str.split, TABLE.splitlines())}


def test_table_of_ops_equals_both_registrations():
    others = {"cpu_isa", "set_cpu_isa", "has_kernels", "set_debug", "is_plain_product", "same_bits"}
    assert {n for n in dir(lora_ext._C) if not n.startswith("_")} - others == OPS
    registered = {
        schema.name.removeprefix("lora_ext::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("lora_ext::")
    }
    assert registered >= OPS  # More ops are defined in Python.


def test_every_op_has_a_formula_a_loop_a_kernel_and_a_stub():
    assert set(TELLINGS) == OPS
    headers = "\n".join(p.read_text() for p in (CSRC / "include").rglob("*.h"))
    kernels = "\n".join(p.read_text() for p in (CSRC / "cuda").rglob("*.cu"))
    refusals = (CSRC / "ops/no_kernels.cpp").read_text()
    for op, (formula, twin, launcher) in TELLINGS.items():
        assert hasattr(reference, formula), f"{op}: expected reference.{formula}"
        family, _, step = twin.rpartition(".")
        declared = rf"struct {family} {{[^}}]*\(\*{step}\)" if family else rf"void {twin}\("
        assert re.search(declared, headers), f"{op}: expected a twin {twin}"
        for text in (headers, kernels, refusals) if launcher != "-" else ():
            assert re.search(rf"\blaunch_{launcher}\(|LX_NO_KERNEL\(launch_{launcher},", text), op
    tree = ast.parse(runpy.run_path(str(ROOT / "tools/stubs.py"))["stubs"]())
    stubs = {
        f.name: [a.arg for a in f.args.posonlyargs]
        for f in tree.body
        if isinstance(f, ast.FunctionDef)
    }
    schemas = {
        op: [a.name for a in getattr(torch.ops.lora_ext, op).default._schema.arguments]
        for op in OPS
    }
    assert {op: stubs.get(op) for op in OPS} == schemas


def test_every_op_is_tested_and_has_a_fake_kernel():
    laws = [*(ROOT / "tests").glob("cases*.py"), *(ROOT / "tests").glob("test_contract*.py")]
    laws += (ROOT / "tests/ops").glob("test_*.py")  # Plans and sum layers are tested there.
    text = "\n".join(path.read_text() for path in laws)
    driven = set(re.findall(r"\b(?:ops|reference)\.(\w+)", text))
    assert {t.reference for t in TELLINGS.values()} <= driven
    assert _registration._fakes.keys() == OPS
    assert _registration._backwards.keys() <= OPS
