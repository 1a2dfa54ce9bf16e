"""The benchmarks check results before timing, keep result files valid, and report missed goals."""

import copy
import csv
import sys

import pytest
import torch

pytest.importorskip("peft", reason="the whole-model benchmarks compare with peft")
import common
import depth_mix
import lora_gram
import lora_layers
import lora_model
import lora_ops
import lora_train
import report
from row import Row

from lora_ext.nn import LoraLinear, VoraLinear

SMALL = lora_ops.Shape("small", tokens=12, adapters=4, in_features=40, out_features=24, rank=16)


@pytest.fixture
def problem(monkeypatch):
    monkeypatch.setattr(lora_ops, "COLD_BYTES", 1)
    return lora_ops.Problem.make(SMALL, "cpu", torch.float32)


@pytest.mark.parametrize("name", lora_ops.PROVIDERS)
def test_every_provider_equals_the_reference(problem, name):
    before = problem.y.clone()
    assert lora_ops.check(problem, lora_ops.PROVIDERS[name]) <= 1
    assert torch.equal(problem.y, before)


def test_provider_that_is_slightly_wrong_is_not_timed(problem):
    def wrong(p: lora_ops.Problem) -> None:
        lora_ops.run_lora_ext(p)
        p.y.mul_(1 + 1e-4)

    with pytest.raises(SystemExit, match="small: result is off"):
        lora_ops.check(problem, wrong)


def test_bytes_of_mixed_ranks_are_counted_by_rank_in_banks_and_pages(monkeypatch):
    monkeypatch.setattr(lora_ops, "COLD_BYTES", 1)
    full = lora_ops.Problem.make(SMALL, "cpu", torch.float32)
    mixed = lora_ops.Problem.make(SMALL, "cpu", torch.float32, ranks=[8, 16, 8, 16])
    assert lora_ops.check(mixed, lora_ops.run_lora_ext) <= 1
    assert full.nbytes() - mixed.nbytes() == 4 * 16 * (SMALL.in_features + SMALL.out_features)
    with pytest.raises(SystemExit):  # The baselines do not support mixed ranks.
        lora_ops.check(mixed, lora_ops.run_loop)
    pool = lora_ops.Problem.make(SMALL, "cpu", torch.float32, [8, 16, 8, 16], paged=True)
    assert [a.shape[0] for a, _ in pool.banks] == [6, 6]  # six pages of 8 ranks
    assert pool.page_table.shape == (4, 2) and (pool.page_table[[0, 2], 1] == -1).all()
    assert lora_ops.check(pool, lora_ops.run_lora_ext) <= 1


def test_error_may_be_three_times_that_of_the_baseline_in_the_same_run():
    exact = torch.tensor([4.0, 1.0], dtype=torch.float64)
    peer, ours = (exact + exact.new_tensor([0.0, off]) for off in (0.01, -0.03))
    assert common.error_over_bound(ours, peer, exact) == pytest.approx(1)
    least = 3 * 4 * common.MIN_PEER_ERROR
    assert common.error_over_bound(exact + least, exact, exact) == pytest.approx(1)
    assert common.error_over_bound(exact, exact, exact) == 0
    zeros = torch.zeros(2, dtype=torch.float64)
    assert common.error_over_bound(zeros, zeros, zeros) == 0
    assert not common.error_over_bound(exact * torch.nan, peer, exact) <= 1
    assert not common.error_over_bound(ours, peer * torch.nan, exact) <= 1


def test_training_benchmark_checks_what_it_times(monkeypatch):
    rows = list(lora_train.bench_train((SMALL,), "cpu", torch.float32, rounds=1))
    assert [(r.case, r.provider) for r in rows] == [
        (f"small {way}", name) for way in ("forward", "backward") for name in ("lora_ext", "loop")
    ]
    p = lora_train.Problem.make(SMALL, "cpu", torch.float32)
    dx, da, db = lora_train.backward(p)
    monkeypatch.setattr(lora_train, "backward", lambda p: (dx, da * (1 + 1e-4), db))
    with pytest.raises(SystemExit, match="small: result is off"):
        lora_train.check(p)


def test_gram_benchmark_checks_what_it_times(monkeypatch):
    monkeypatch.setattr(lora_gram, "BLOCKS", 1)
    rows = list(lora_gram.bench_gram("cpu", rounds=1))
    assert [(r.dtype, r.provider) for r in rows] == [
        (dtype, name)
        for dtype in ("float32", "float32", "bfloat16", "bfloat16")
        for name in ("lora_ext", "loop")
    ]
    a, b, p = lora_gram.factors("cpu", torch.float32)
    for case, found in (
        ("gram", [t * (1 + 1e-3) for t in lora_gram.loop(a, b)]),
        ("pair stats", lora_gram.loop_of_stats(a, b, p) * (1 + 1e-9)),
    ):
        with pytest.raises(SystemExit, match=f"{case}: result is off"):
            lora_gram.error_of(found, case, a, b, p)


def test_batch_of_mixed_modalities_is_checked_before_it_is_timed(monkeypatch):
    rows = list(lora_layers.bench_modalities(rounds=1, samples=3, length=4))
    case = "mixed modalities, 3 samples x 4 tokens, forward"
    ways = [case, case, f"{case} and backward", f"{case} and backward"]
    assert [(r.case, r.provider) for r in rows] == [
        *zip(ways, ["per sample", "lora_ext"] * 2, strict=True)
    ]
    monkeypatch.setattr(VoraLinear, "_rows", LoraLinear._rows)  # This function ignores images.
    with pytest.raises(SystemExit, match=r"modalities: expected error .* found"):
        list(lora_layers.bench_modalities(rounds=1, samples=3, length=4))


def test_mix_benchmark_checks_what_it_times(monkeypatch):
    for name, value in (("WIDTH", 64), ("TOKENS", 16), ("COLD_BYTES", 1)):
        monkeypatch.setattr(depth_mix, name, value)
    rows = list(depth_mix.bench_mix("cpu", rounds=1))
    assert [(r.case.rpartition(": ")[2], r.provider) for r in rows] == [
        (way, name) for way in depth_mix.WAYS for name in depth_mix.PROVIDERS
    ]
    p = depth_mix.Problem.make("cpu", torch.float32)
    with pytest.raises(SystemExit, match="off: result is off"):
        depth_mix.check(p, lambda *args: 1.001 * depth_mix.lora_ext(*args), "off")


def test_calls_alternate_in_rounds_and_ratios_are_per_round():
    log: list[str] = []
    calls = {"a": lambda: log.append("a"), "b": lambda: log.append("b")}
    times = common.interleaved(calls, rounds=2, warm_up=0)
    assert log == ["a", "b", "a", "b", "b", "a"]  # an untimed call of each, then two rounds
    assert len(times["a"].rounds) == 2 and times["a"].p20 <= times["a"].median <= times["a"].p80
    slow, fast = common.Timing.of([2.0, 40.0, 6.0]), common.Timing.of([1.0, 20.0, 3.0])
    assert slow.over(fast) == 2.0


def test_rows_without_processor_get_an_empty_column_and_unknown_columns_raise(tmp_path):
    row = {"device": "H100", "cpu": "Xeon", "a": "3"}
    for name, old in (
        ("old", [{"device": "T4", "a": "1,5"}, {"device": "T4", "a": "2"}]),
        ("new", []),
    ):
        path = tmp_path / f"{name}.csv"
        common.append_rows(path, old)
        common.append_rows(path, [row])
        common.append_rows(path, [row])
        with path.open(newline="") as file:
            assert list(csv.DictReader(file)) == [*({**r, "cpu": ""} for r in old), row, row]
    with pytest.raises(ValueError, match=r"old\.csv: expected the columns"):
        common.append_rows(tmp_path / "old.csv", [{"device": "T4", "a": "1"}])
    path = tmp_path / "x.csv"
    common.append_rows(path, [{"a": 1, "b": 2}])
    common.append_rows(path, [{"a": 3, "b": 4}])
    assert path.read_text().split() == ["a,b", "1,2", "3,4"]
    with pytest.raises(ValueError, match=r"x\.csv: expected the columns"):
        common.append_rows(path, [{"a": 1}])
    assert path.read_text().split() == ["a,b", "1,2", "3,4"]


def test_rows_contain_processor_and_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    common.machine_columns.cache_clear()
    gpu, cpu = common.machine_columns("cuda"), common.machine_columns("cpu")
    common.machine_columns.cache_clear()
    assert list(cpu)[:3] == ["date", "device", "cpu"]
    assert gpu["device"] == "H100" and gpu["cpu"] == cpu["cpu"] == cpu["device"] != ""


def test_report_uses_the_last_row_and_lists_missed_and_open_goals(tmp_path, monkeypatch, capsys):
    path = tmp_path / "lora_cpu.csv"
    case = "decode 16 rows of 16 adapters"
    for over_base, over_peft in ((9.0, 9.0), (1.5, 2.6)):
        row = Row("model", case, "lora_ext", over_base=over_base, over_peft=over_peft)
        common.append_rows(path, [row.columns("cpu")])
    monkeypatch.setattr(sys, "argv", ["report.py", str(path), "--all"])
    report.main()
    lines = capsys.readouterr().out.splitlines()
    (over_base,) = [line for line in lines if "16 adapters, time over" in line]
    (over_peft,) = [line for line in lines if "16 adapters, PEFT's time" in line]
    assert "| 1.5 |" in over_base and "missed" in over_base
    assert "| 2.6 |" in over_peft and "missed" not in over_peft
    assert any("D4" in line and "not measured" in line for line in lines)
    assert not any("| 9 |" in line for line in lines)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return folder, lora_model.build(folder, layers=1)


@pytest.mark.slow
def test_model_benchmark_checks_and_measures_three_engines(engines):
    rows = list(lora_model.bench_model(engines[1], rounds=1))
    assert [r.provider for r in rows] == ["base", "peft", "lora_ext"] * 3
    assert all(r.worst_error <= 1 for r in rows if r.provider == "lora_ext")


def test_logits_of_swapped_adapters_raise(engines):
    tokens = torch.arange(8).view(2, 4)
    names = lora_model.NAMES
    with torch.inference_mode():
        step = {
            "base": lora_model.Step(engines[1].plain, tokens, names[:2], "base", False)(),
            "peft": lora_model.Step(engines[1].peft, tokens, names[:2], "peft", False)(),
            "lora_ext": lora_model.Step(engines[1].ours, tokens, names[1::-1], "lora_ext", False)(),
        }
        wide = copy.deepcopy(engines[1].peft).double()
        exact = lora_model.Step(wide, tokens, names[:2], "peft", False)()
    with pytest.raises(SystemExit, match="within their bound of PEFT"):
        lora_model.check("swapped", step, exact)
    with pytest.raises(SystemExit, match="10 times the bound away in every row"):
        lora_model.check("no adapters", dict.fromkeys(step, step["peft"]), exact)


def test_pool_memory_equals_the_pages_of_its_adapters(engines):
    pool, pages, _ = lora_model.bench_memory(engines[1])
    assert pool.median == pages.median


def test_adapter_is_unchanged_by_the_swap_benchmark(engines):
    assert [r.case for r in lora_model.bench_swap(*engines, rounds=1)] == [
        "load from file",
        "two swaps with the host cache",
    ]


@pytest.mark.slow
def test_peak_counts_tensors_that_exist_at_the_same_time():
    def one_after_the_other():
        first = torch.empty(1 << 18)
        del first
        torch.empty(1 << 19)

    def both():
        first = torch.empty(1 << 18)
        torch.empty(1 << 19)
        del first

    assert common.peak_bytes(one_after_the_other) == 2 << 20
    assert common.peak_bytes(both) == 3 << 20
