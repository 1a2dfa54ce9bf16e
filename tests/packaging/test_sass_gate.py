"""The gate on machine code (SASS): kernels that break a rule fail, and correct kernels pass."""

import fnmatch
import re
import shutil
import subprocess

import pytest
from scripts import tool

pytestmark = pytest.mark.slow


loops = tool("sass_loops")  # The gate imports this module.
gate = tool("sass_gate")

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
// Four loads whose addresses are known at once, and four of which each awaits the one before.
__global__ void together_kernel(const float4* x, float* y, int n) {
    float sum = 0;
    #pragma unroll 1
    for (int i = 0; i < n; i += 4) {
        float4 v[4];
        for (int k = 0; k < 4; ++k) v[k] = x[(i + k) * 32 + threadIdx.x];
        for (int k = 0; k < 4; ++k) sum += v[k].x + v[k].y + v[k].z + v[k].w;
    }
    y[threadIdx.x] = sum;
}
__global__ void apart_kernel(const float4* x, float* y, int n) {
    float sum = 0;
    #pragma unroll 1
    for (int i = 0; i < n; i += 4) {
        for (int k = 0; k < 4; ++k) {
            const float4 v = x[(i + k) * 32 + threadIdx.x + (sum < 0)];
            sum += v.x + v.y + v.z + v.w;
        }
    }
    y[threadIdx.x] = sum;
}
// The wide load knows its address at once; or after three trips, one after the other.
__global__ void near_kernel(const float4* x, const int* place, float* y) {
    const float4 v = x[threadIdx.x];
    y[threadIdx.x + place[0]] = v.x + v.y + v.z + v.w;
}
__global__ void far_kernel(const float4* x, const int* place, float* y) {
    const float4 v = x[place[place[place[threadIdx.x]]]];
    y[threadIdx.x] = v.x + v.y + v.z + v.w;
}
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define WAIT asm volatile("griddepcontrol.wait;" ::: "memory")
#else
#define WAIT
#endif
// Two wide loads in front of the kernel's wait, and behind it.
__global__ void early_kernel(const float4* x, float* y) {
    const float4 v = x[threadIdx.x], w = x[threadIdx.x + 32];
    WAIT;
    y[threadIdx.x] += v.x + v.y + v.z + v.w + w.x + w.y + w.z + w.w;
}
__global__ void late_kernel(const float4* x, float* y) {
    WAIT;
    const float4 v = x[threadIdx.x], w = x[threadIdx.x + 32];
    y[threadIdx.x] += v.x + v.y + v.z + v.w + w.x + w.y + w.z + w.w;
}
__global__ void store_kernel(float* y) {
    y[threadIdx.x] = 0;
    WAIT;
    y[threadIdx.x + 32] = 1;
}
__global__ void slow_kernel(const float4* x, float* y, int n) {
    float sum = 0;
    #pragma unroll 1
    for (int i = 0; i < n; ++i) {
        const float4 v = x[i * 32 + threadIdx.x];
        sum += sinf(v.x) + sinf(v.y) + sinf(v.z) + sinf(v.w);
    }
    y[threadIdx.x] = sum;
}
__global__ void expf_kernel(const float* x, float* y) { y[threadIdx.x] = __expf(x[threadIdx.x]); }
__global__ void ex2_kernel(const float* x, float* y) {
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y[threadIdx.x]) : "f"(x[threadIdx.x] * 1.4427f));
}
}
void launch(float4* x, float* y) {
    expf_kernel<<<1, 32>>>(y, y);
    ex2_kernel<<<1, 32>>>(y, y);
    near_kernel<<<1, 32>>>(x, (int*)y, y);
    far_kernel<<<1, 32>>>(x, (int*)y, y);
    early_kernel<<<1, 32>>>(x, y);
    late_kernel<<<1, 32>>>(x, y);
    store_kernel<<<1, 32>>>(y);
    slow_kernel<<<1, 32>>>(x, y, 4);
    good_kernel<float4, 1><<<1, 128>>>(x, x, 3);
    spill_kernel<<<1, 32>>>(y, 3);
    together_kernel<<<1, 32>>>(x, y, 4);
    apart_kernel<<<1, 32>>>(x, y, 4);
}}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    folder = tmp_path_factory.mktemp("sass")
    (folder / "t.cu").write_text(SOURCE)
    targets = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"]
    subprocess.run([nvcc, "-O3", *targets, "-c", "t.cu", "-o", "t.o"], cwd=folder, check=True)
    return folder / "t.o"


@pytest.fixture(scope="module")
def kernels(compiled):
    return {(kernel.name, kernel.arch): kernel for kernel in gate.read([compiled])}


ARCHS = ("sm_80", "sm_90a")
KINDS = ("spill", "together", "apart", "near", "far", "early", "late", "store", "slow")
KINDS += ("expf", "ex2")


def test_every_kernel_has_its_plain_name_and_its_rules(kernels):
    names = ["good_kernel<float4, 1>", *(f"{k}_kernel" for k in KINDS)]
    assert set(kernels) == {(name, arch) for name in names for arch in ARCHS}
    assert all(len(kernel.code) > 10 and kernel.registers > 0 for kernel in kernels.values())
    kernel = kernels["good_kernel<float4, 1>", "sm_80"]
    other = [
        {"match": "bad_*", "max_registers": 1},
        {"match": "*", "arch": ["sm_90a"], "max_registers": 1},
    ]
    assert gate.judge(kernel, other) == []


def test_objects_are_checked_in_parallel_and_reported_in_order(compiled, kernels, tmp_path):
    copy = tmp_path / "u.o"
    shutil.copy(compiled, copy)
    rules = [{"match": "good_kernel*", "max_registers": 1}]
    found = gate.all_verdicts([copy, compiled], rules)
    assert [(one.name, one.arch) for one in found] == sorted([*kernels, *kernels])
    for one in found:
        kernel = kernels[one.name, one.arch]
        assert (one.row, list(one.wrong)) == (gate.row(kernel), gate.judge(kernel, rules))
        wrong = one.name.startswith(("good", "spill", "expf"))
        assert bool(one.wrong) == (wrong or (one.name, one.arch) == ("store_kernel", "sm_90a"))


def test_error_names_an_object_file_that_cannot_be_read(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    (tmp_path / "no.o").write_text("no object")
    with pytest.raises(SystemExit, match=r"sass_gate: cuobjdump cannot read .*no\.o"):
        gate.all_verdicts([tmp_path / "no.o"], [])


@pytest.mark.parametrize("arch", ARCHS)
def test_good_kernel_passes_and_spilling_kernel_fails(kernels, arch):
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
    reasons = " ".join(gate.judge(kernels["spill_kernel", arch], []))
    assert "1024 bytes of stack" in reasons and "LDL/STL" in reasons


@pytest.mark.parametrize("arch", ARCHS)
def test_dependent_loads_are_distinguished_from_loads_in_flight_together(kernels, arch):
    rule = {"match": "*_kernel", "min_inflight": 60}
    assert [one.inflight for one in kernels["together_kernel", arch].flights] == [64]
    assert [one.inflight for one in kernels["apart_kernel", arch].flights] == [16]
    assert gate.judge(kernels["together_kernel", arch], [rule]) == []
    (reason,) = gate.judge(kernels["apart_kernel", arch], [rule])
    assert reason == "16 bytes per thread in flight in a main loop (min. 60)"


@pytest.mark.parametrize(
    ("good", "bad", "rule", "reason"),
    [
        ("near", "far", {"max_trips": 0}, "3 memory trips before the first wide load (max. 0)"),
        (
            "early",
            "late",
            {"first_bytes": 32},
            "0 bytes per thread requested before the wait for the previous kernel (min. 32)",
        ),
        (
            "together",
            "slow",
            {"instructions_per_element": 6},
            "instructions for each value that a main loop loads (max. 6)",
        ),
    ],
)
def test_kernel_with_a_longer_prologue_or_iteration_fails(kernels, good, bad, rule, reason):
    rule = {"match": "*_kernel", **rule}
    assert gate.judge(kernels[f"{good}_kernel", "sm_90a"], [rule]) == []
    (found,) = gate.judge(kernels[f"{bad}_kernel", "sm_90a"], [rule])
    assert found.endswith(reason)


def test_load_in_front_of_the_wait_of_a_shrink_and_any_store_there_fails(kernels):
    (rule,) = [rule for rule in gate.load_rules(gate.RULES) if "forbid_before_wait" in rule]
    assert fnmatch.fnmatchcase("lora_shrink_decode_kernel<float, true, 1>", rule["match"])
    rule = {**rule, "match": "*_kernel"}
    assert gate.judge(kernels["late_kernel", "sm_90a"], [rule]) == []
    (reason,) = gate.judge(kernels["early_kernel", "sm_90a"], [rule])
    assert re.match(r"LDG\S* before the wait for the previous kernel, forbidden by ", reason)
    (reason,) = gate.judge(kernels["store_kernel", "sm_90a"], [])
    assert re.match(r"STG\S* before the wait for the previous kernel, forbidden by ", reason)
    reasons = gate.judge(kernels["near_kernel", "sm_90a"], [rule])
    assert reasons == ["forbid_before_wait: expected code to check, found none"]


def test_code_that_a_branch_reaches_past_the_wait_counts_as_before_it():
    lines = ["BRA P0, 0x30", "ACQBULK ", "LDG.E R0", "LDG.E.U16 R4", "EXIT "]
    code = [instruction(line, at=16 * i) for i, line in enumerate(lines)]
    found = loops.before_wait(code)
    assert found is not None
    assert [one.opcode for one in found] == ["BRA", "LDG.E.U16", "EXIT"]
    assert loops.before_wait(code[2:]) is None


@pytest.mark.parametrize("key", gate.COSTS)
def test_rule_for_a_cost_that_cannot_be_measured_in_a_kernel_fails(kernels, key):
    kernel = kernels["spill_kernel", "sm_80"]
    reasons = gate.judge(kernel, [{"match": "spill_kernel", key: 1}])
    assert f"{key}: expected code to measure, found none" in reasons


def instruction(text: str, sets: int = 7, waits: int = 0, at: int = 0) -> loops.Instruction:
    opcode, _, operands = text.partition(" ")
    return loops.Instruction(at, opcode, operands, "", sets << 46 | waits << 52)


LOAD = "LDG.E.128 R4, desc[UR4][R2.64]"


@pytest.mark.parametrize(
    ("turn", "inflight", "overlap"),
    [
        # one load, used immediately
        ([(LOAD, 0, 0), ("FADD R0, R0, R4", 7, 1)], 16, 0),
        # two loads with separate barriers, both issued before the first result is used
        ([(LOAD, 0, 0), (LOAD, 1, 0), ("FADD R0", 7, 1), ("FADD R0", 7, 2)], 32, 0),
        # The second load is issued after the first one has arrived.
        ([(LOAD, 0, 0), ("FADD R0", 7, 1), (LOAD, 1, 0), ("FADD R0", 7, 2)], 16, 0),
        # The product waits for the load, so nothing is in flight during it.
        ([(LOAD, 0, 0), ("HMMA.16816.F32 R8", 7, 1)], 16, 0),
        # The load is used in the next iteration, so it is in flight during the product.
        ([("MOV R8, R4", 7, 1), (LOAD, 0, 0), ("HMMA.16816.F32 R8", 7, 0)], 16, 16),
        # A ring buffer of three stages: two loads are in flight while one is used.
        (
            [
                ("DEPBAR.LE SB0, 0x1", 7, 0),
                ("HMMA.16816.F32 R8", 7, 0),
                ("LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64]", 7, 0),
                ("LDGDEPBAR", 0, 0),
            ],
            32,
            16,
        ),
    ],
)
def test_bytes_in_flight_are_derived_from_the_barriers(turn, inflight, overlap):
    found = loops.flight([instruction(text, sets, waits) for text, sets, waits in turn])
    assert (found.inflight, found.overlap) == (inflight, overlap)


def test_path_through_a_loop_is_the_one_with_most_loads():
    lines = [
        ("MOV R0, RZ", 7, 0),
        (LOAD, 0, 0),  # 0x10, the loop head
        ("BRA P1, 0x50", 7, 0),
        (LOAD.replace(".128", ""), 1, 0),
        ("BRA 0x60", 7, 0),
        (LOAD, 1, 0),  # 0x50
        ("FADD R0", 7, 3),  # 0x60
        ("BRA P0, 0x10", 7, 0),
        ("EXIT ", 7, 0),
    ]
    code = [instruction(line, sets, waits, 16 * i) for i, (line, sets, waits) in enumerate(lines)]
    (turn,) = loops.main_loops(code)
    assert [one.address for one in turn] == [0x10, 0x20, 0x50, 0x60, 0x70]
    assert loops.flight(turn).inflight == 32


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"min_inflight": 17}, "16 bytes per thread in flight in a main loop (min. 17)"),
        ({"min_overlap": 1}, "no main loop to measure min_overlap in"),
        ({"max_registers": 4}, "registers (max. 4)"),
        ({"require": [r"HMMA\b"]}, r"no HMMA\b"),
        ({"require_loop": [r"EXIT\b"]}, r"no EXIT\b in a loop"),
        ({"forbid_loop": [r"LDG\b"]}, "in a loop, forbidden by"),
        ({"threads": 1024, "min_blocks": 3}, "2 blocks per multiprocessor (min. 3)"),
    ],
)
def test_error_names_an_invalid_rule(kernels, rule, words):
    reasons = gate.judge(kernels["good_kernel<float4, 1>", "sm_90a"], [{"match": "*", **rule}])
    assert len(reasons) == 1 and words in reasons[0]


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    # computed by cuda_occupancy.h (CUDA 13.0) with the constants of an H100
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


def test_unknown_key_raises_and_the_rules_of_the_repository_are_valid(tmp_path):
    (tmp_path / "kernels.toml").write_text('[[rule]]\nmatch = "*"\nmax_register = 3\n')
    with pytest.raises(SystemExit, match="unknown keys \\['max_register'\\]"):
        gate.load_rules(tmp_path / "kernels.toml")
    gate.load_rules(gate.RULES)


def test_loop_with_too_few_products_fails():
    """Check loops with two products among eight instructions (a quarter) and among four (a
    half)."""
    product, move = "HMMA.16816.F32.BF16 R8, R4, R6, R8", "IMAD R9, R9, R9, RZ"

    def kernel(moves):
        body = [LOAD, product, product, *[move] * moves]
        code = [instruction(text, at=16 * i) for i, text in enumerate(body)]
        code += [loops.Instruction(16 * len(code), "BRA", "0x0", "P0")]
        code += [loops.Instruction(16 * len(code), "EXIT", "")]
        return gate.Kernel("sm_90a", "k", "k", code=code)

    rule = {"match": "k", "mma_share": 40}
    assert gate.judge(kernel(0), [rule]) == []
    (reason,) = gate.judge(kernel(4), [rule])
    assert reason == "25 percent of a main loop multiplies on tensor cores (min. 40)"


# A step of lora_expand_kernel: the product, then the store of y, which is loaded two steps ahead.
B, Y = LOAD, LOAD.replace("R4", "R20")
STORE, PRODUCT = "STG.E.128 desc[UR4][R2.64], R20", "HMMA.16816.F32.BF16 R8, R4, R6, R8"


def expand_step(*outer: tuple[str, int, int]) -> list[loops.Instruction]:
    """Return a loop over steps around a loop over blocks of ranks, which loads the next B."""
    inner = [(B, 0, 0), (PRODUCT, 7, 0), ("MOV R30, R4", 7, 1), ("BRA P1, 0x10", 7, 0)]
    lines = [("MOV R0, RZ", 7, 0), *inner, *outer, ("BRA P0, 0x0", 7, 0), ("EXIT ", 7, 0)]
    return [instruction(line, sets, waits, 16 * i) for i, (line, sets, waits) in enumerate(lines)]


def test_expand_loop_whose_store_waits_for_the_next_y_fails():
    """Check a loop in which the current and the next y share a scoreboard."""
    rule = {"match": "k", "turn_trips": 1}
    old = expand_step((Y, 5, 0), ("PRMT R12, R20", 7, 1 << 5), (STORE, 7, 0))
    apart = expand_step(("PRMT R12, R20", 7, 1 << 5), (STORE, 7, 0), (Y, 5, 0))
    assert [loops.turn_trips(loops.loops_of(code)) for code in (old, apart)] == [2, 1]
    assert gate.judge(gate.Kernel("sm_90a", "k", "k", code=apart), [rule]) == []
    (reason,) = gate.judge(gate.Kernel("sm_90a", "k", "k", code=old), [rule])
    assert reason == "2 memory trips in series in an iteration of a loop that multiplies (max. 1)"


@pytest.mark.parametrize("arch", ARCHS)
def test_compiled_expf_fails_and_ex2_passes(kernels, arch):
    assert gate.judge(kernels["ex2_kernel", arch], []) == []
    (reason,) = gate.judge(kernels["expf_kernel", arch], [])
    assert reason == "1 exponentials test for denormals (max. 0)"


def test_planted_expf_fails_unless_a_rule_allows_it():
    guard = "FSETP.GEU.AND P1, PT, R18, -126, PT"
    code = [instruction(text) for text in (guard, "MUFU.EX2 R4, R18", "EXIT ")]
    kernel = gate.Kernel("sm_90a", "k<float>", "k<float>", code=code)
    plain = gate.Kernel("sm_90a", "k<float>", "k<float>", code=code[1:])
    rules = [{"match": "k<*>"}, {"match": "k<float>", "guarded_exp": 1}]
    assert gate.judge(plain, []) == gate.judge(kernel, rules) == []
    assert gate.judge(kernel, rules[:1]) == ["1 exponentials test for denormals (max. 0)"]


def test_kernel_that_releases_the_next_one_before_its_wait_fails():
    rule = {"match": "k", "early_release": 0}
    wait, release = "ACQBULK ", "PREEXIT "
    for lines, reasons in (
        ([wait, release], []),
        ([release, wait], ["1 ways to let the next kernel start before the wait (max. 0)"]),
        (
            ["BRA P0, 0x20", wait, release],
            ["1 ways to let the next kernel start before the wait (max. 0)"],
        ),
        ([release], ["early_release: expected code to measure, found none"]),
    ):
        code = [instruction(text) for text in (*lines, "EXIT ")]
        assert gate.judge(gate.Kernel("sm_90a", "k", "k", code=code), [rule]) == reasons


RECORDED = {
    (match[1], match[2]): {
        label: float(n) for label, n in re.findall(r"  (\w+) ([\d.]+)", match[3])
    }
    for match in re.finditer(
        r"^(sm_\w+) +(?:\d+ +)+(\S.*?)  inflight \S+(.*)$", gate.LOCK.read_text(), re.M
    )
}


@pytest.mark.parametrize(
    ("key", "label", "planted"),
    [
        ("first_bytes", "first", -16),  # one load fewer before the wait
        ("instructions_per_element", "each", 1.5),
        ("turn_trips", "turn", 1),
    ],
)
def test_rules_leave_no_room_for_a_slower_kernel(key, label, planted):
    """Check that limits are close to the recorded costs: a slightly worse cost breaks a rule."""
    kernel_report = tool("kernel_report")
    cases = {one.kernel for case in kernel_report.CASES for one in case.launches}
    rules, judged = gate.load_rules(gate.RULES), 0
    for name in cases:
        own = [
            rule
            for rule in rules
            if fnmatch.fnmatchcase(name, rule["match"])
            and key in rule
            and "sm_90a" in rule.get("arch", ["sm_90a"])
        ]
        found = RECORDED["sm_90a", name].get(label)
        if found is None or (not own and key != "instructions_per_element"):
            continue
        judged += 1
        limits = [rule[key] for rule in own]
        assert limits, f"{name}: no rule for {key}"
        if planted < 0:
            assert found >= max(limits) > found + planted, name
        else:
            limit = min(limits)
            assert found <= limit < found + planted, (name, found, limit)
    assert judged


def test_exponential_that_tests_for_denormals_fails_in_every_kernel():
    rules = gate.load_rules(gate.RULES)
    assert not any("guarded_exp" in rule for rule in rules)
    guard = instruction("FSETP.GEU.AND P1, PT, R18, -126, PT")
    for arch, name in RECORDED:
        planted = gate.Kernel(arch, name, name, registers=32, code=[guard])
        assert "1 exponentials test for denormals (max. 0)" in gate.judge(planted, rules)
