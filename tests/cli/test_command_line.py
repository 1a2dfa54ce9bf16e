"""``lora-ext`` on adapters that PEFT saved: its results equal the Python functions' results."""

import json
import re
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from cli.commands import assert_refused
from made_adapters import Q, adapter, delta
from safetensors.torch import load_file, save_file
from test_value import CASES, assert_peft_finds_every_key, llama, peft_model

from lora_ext.adapter import LoraAdapter, compare_adapters, merge_adapters, resize_adapter
from lora_ext.adapter._peft_tensors import natural_order
from lora_ext.methods import splora
from lora_ext.pool import AdapterPool

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("case", CASES)
def test_inspect_shows_every_module(case, run, run_json, tmp_path):
    peft_model(case).save_pretrained(tmp_path)
    value = LoraAdapter.load(tmp_path)
    status, out, err = run("inspect", tmp_path)
    assert (status, err) == (0, "")
    found = run_json("inspect", tmp_path)
    assert [row["module"] for row in found["modules"]] == sorted(value.modules, key=natural_order)
    for row in found["modules"]:
        assert re.search(rf"^{re.escape(row['module'])}\s+{row['r']}\s", out, re.M)
        spectrum = torch.linalg.svdvals(delta(value, row["module"]))
        assert row["norm"] == pytest.approx(float(spectrum.norm()))
        assert row["stable"] == pytest.approx(float((spectrum / spectrum[0]).square().sum()))
        assert row["threshold@0.01"] == int((spectrum > 0.01 * spectrum[0]).sum())
        assert row["bad"] == 0 and row["scaling"] == value.modules[row["module"]].scaling
    assert found["ranks"] == sorted({f.a.shape[0] for f in value.modules.values()})


def test_inspect_prints_the_invocation_of_an_activated_adapter(run, run_json, folders):
    config = Path(folders[0]) / "adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "alora_invocation_tokens": [7, 8]}))
    assert run_json("inspect", folders[0])["invocation"] == [7, 8]
    status, out, _ = run("inspect", folders[0])
    assert status == 0 and re.search(r"^invocation\s+.*7.*8", out, re.M)
    status, _, err = run("merge", *folders[:2], "--out", config.parent.parent / "merged")
    assert status != 0 and "alora_invocation_tokens" in err


def test_inspect_reports_modules_with_non_finite_values_and_fails(run, folders):
    path = folders[0] / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"base_model.model.{Q}.lora_A.weight"][0, :3] = float("nan")
    tensors[f"base_model.model.{Q}.lora_B.weight"][0, 0] = float("inf")
    save_file(tensors, path)
    status, out, err = run("inspect", folders[0], "--json")
    found = json.loads(out)
    sentence = (
        f"lora-ext inspect: {folders[0]}: expected finite values, found NaN or inf in {Q} (4)"
    )
    assert (status, err) == (1, f"{sentence}\n")
    rows = {row["module"]: row for row in found["modules"]}
    assert found["bad_values"] == rows[Q]["bad"] == 4 and rows[Q]["norm"] is None
    others = [row for name, row in rows.items() if name != Q]
    assert all(row["bad"] == 0 and row["norm"] > 0 for row in others)
    status, out, err = run("inspect", folders[0], "--kinds", "participation", "absolute")
    assert (status, err) == (1, f"{sentence}\n")
    assert re.search(r"participation +absolute@0.01 +bad", out)
    assert re.search(rf"{re.escape(Q)} .* - +- +- +4$", out, re.M)


def test_inspect_reports_non_finite_replaced_weights_in_a_short_line(run, tmp_path):
    shapes = {f"layers.{i}.up": (6, 5) for i in range(12)}
    value = adapter(shapes=shapes, modules_to_save=["norm"])
    for factors in value.modules.values():
        factors.b[0, 0] = float("inf")
    whole = {"base_model.model.norm.weight": torch.full((5,), float("nan"))}
    LoraAdapter(value.config, value.modules, {}, whole).save(tmp_path)
    status, _, err = run("inspect", tmp_path)
    assert status == 1 and "layers.0.up (1)" in err and "and 5 more" in err and err.count("\n") == 1
    for factors in value.modules.values():
        factors.b[0, 0] = 0.0
    LoraAdapter(value.config, value.modules, {}, whole).save(tmp_path)
    status, _, err = run("inspect", tmp_path)
    assert status == 1 and "base_model.model.norm.weight (5)" in err


@pytest.mark.parametrize("case", ["plain", "patterns", "bias", "regex"])
@pytest.mark.parametrize("mode", ["delta", "factors", "delta_svd"])
def test_merge_writes_the_result_of_merge_adapters(case, mode, run_json, tmp_path):
    folders = []
    for name in ("one", "two"):
        torch.manual_seed(len(folders))
        peft_model(case).save_pretrained(tmp_path / name)
        folders.append(tmp_path / name)
    out = tmp_path / "deep" / "out"
    found = run_json("merge", *folders, "--weights", 0.7, -0.2, "--mode", mode, "--out", out)
    assert LoraAdapter.load(out) == merge_adapters(folders, [0.7, -0.2], mode)
    assert found["weights"] == [0.7, -0.2] and found["out"] == str(out)
    base = CASES[case][0]()
    assert_peft_finds_every_key(base, out)
    AdapterPool(base, max_slots=1, max_rank=16).load("merged", out)


def test_merge_without_weights_is_the_mean_of_any_number_of_adapters(run_json, folders, tmp_path):
    three = (*folders, folders[0])
    run_json("merge", *three, "--out", tmp_path / "out")
    assert LoraAdapter.load(tmp_path / "out") == merge_adapters(three, [1 / 3] * 3)
    run_json("merge", *three, "--weights", "0.5,0.25,1", "--out", tmp_path / "out")
    assert LoraAdapter.load(tmp_path / "out") == merge_adapters(three, [0.5, 0.25, 1])


def test_resize_writes_the_adapter_and_prints_the_error(run, run_json, folders, tmp_path):
    out = tmp_path / "out"
    found = run_json("resize", folders[0], "--rank", 2, "--out", out)
    wanted, errors = resize_adapter(folders[0], 2)
    assert LoraAdapter.load(out) == wanted
    for row in found["modules"]:
        assert row["error"] == pytest.approx(errors[row["module"]])
        assert row["relative"] == pytest.approx(row["error"] / row["norm"])
        assert (row["r_before"], row["r"]) == (4, 2)
    status, text, _ = run("resize", folders[0], "--rank", 9, "--out", folders[0])
    assert status == 0 and LoraAdapter.load(folders[0]) != wanted, "resizing in place"
    assert re.search(rf"{re.escape(Q)} +4 +9 +\S+ +0 +0$", text, re.M)


def test_diff_equals_compare_adapters_and_is_zero_for_equal_adapters(run, run_json, folders):
    found = run_json("diff", *folders)
    wanted = {each.module: each for each in compare_adapters(*folders)}
    for row in found["modules"]:
        each = wanted[row["module"]]
        assert row["distance"] == pytest.approx(each.distance)
        assert row["cosine"] == pytest.approx(each.cosine)
        assert torch.allclose(torch.tensor(row["angles"]).deg2rad(), torch.tensor(each.angles))
    total = sum(each.distance**2 for each in wanted.values()) ** 0.5
    assert found["distance"] == pytest.approx(total)
    same = run_json("diff", folders[0], folders[0])
    assert same["distance"] == 0.0 and same["cosine"] == pytest.approx(1.0)
    status, out, _ = run("diff", *folders)
    assert status == 0 and re.search(rf"{re.escape(Q)} +4/4 .* \d+\.\d \.\. \d+\.\d$", out, re.M)


def test_diff_lists_modules_that_it_does_not_compare(run, run_json, tmp_path):
    adapter(use_dora=True).save(tmp_path / "dora")
    assert run_json("diff", tmp_path / "dora", tmp_path / "dora")["not_compared"] == ["magnitude"]
    assert "not compared  magnitude" in run("diff", tmp_path / "dora", tmp_path / "dora")[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a folder with a PEFT adapter of eight modules and the two models that SPLoRA
    compares."""
    folder = tmp_path_factory.mktemp("models")
    base, aligned = llama(), llama()
    with torch.no_grad():
        for parameter in aligned.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    base.save_pretrained(folder / "base")
    aligned.save_pretrained(folder / "aligned", max_shard_size="20KB")
    config = peft.LoraConfig(
        r=4, init_lora_weights=False, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    peft.get_peft_model(aligned, config).save_pretrained(folder / "adapter")
    return folder


def of(models):
    folders = "--base", models / "base", "--aligned", models / "aligned"
    return models / "adapter", *folders, "--direction", "smallest"


def test_prune_removes_the_modules_that_splora_selects(run, run_json, models, tmp_path):
    out = tmp_path / "out"
    found = run_json("prune", *of(models), "--num", 3, "--out", out)
    config = splora.SploraConfig(direction="smallest", num=3)
    value = LoraAdapter.load(models / "adapter")
    wanted = splora.apply(value, models / "base", models / "aligned", config)
    assert LoraAdapter.load(out) == wanted.adapter and len(wanted.adapter.modules) == 5
    verdicts = {row["module"]: row["verdict"] for row in found["modules"]}
    assert {name for name, what in verdicts.items() if what == "pruned"} == set(wanted.pruned)
    scores = {row["module"]: row["score"] for row in found["modules"]}
    assert scores == pytest.approx({each.name: each.score for each in wanted.stats})
    assert found["pruned"] == 3 and found["direction"] == "smallest"
    assert_peft_finds_every_key(llama(), out)
    more = ("--threshold", 0.2, "--direction", "largest", "--projection", "orthogonal")
    status, text, err = run("prune", *of(models), *more, "--energy", 0.5, "--out", out)
    assert (status, err) == (0, "") and re.search(r"^direction +largest$", text, re.M)
    config = splora.SploraConfig(
        threshold=0.2, direction="largest", projection="orthogonal", energy=0.5
    )
    wanted = splora.apply(value, models / "base", models / "aligned", config)
    assert LoraAdapter.load(out) == wanted.adapter and 0 < len(wanted.pruned) < 8


def test_warning_is_printed_as_one_line(run, models, tmp_path):
    out = ("--num", 1, "--projection", "orthogonal", "--out", tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        status, text, err = run("prune", *of(models), *out)  # All distances are equal (0).
    assert status == 2 and text == ""
    assert [line.startswith("lora-ext prune: ") for line in err.splitlines()] == [True, True]
    assert "warning: " in err.splitlines()[0] and "spread" in err.splitlines()[1]


def test_prune_with_project_projects_modules_instead_of_removing_them(run_json, models, tmp_path):
    found = run_json("prune", *of(models), "--num", 2, "--project", "--out", tmp_path / "out")
    chosen = [row["module"] for row in found["modules"] if row["verdict"] == "projected"]
    folders = models / "adapter", models / "base", models / "aligned"
    wanted = splora.project(*folders, chosen)
    assert len(chosen) == 2 and LoraAdapter.load(tmp_path / "out") == wanted
    assert len(wanted.modules) == 8


def test_missing_direction_is_reported_and_remedies_are_options_of_the_command(
    run, run_json, models, tmp_path
):
    folders = ("--base", models / "base", "--aligned", models / "base", "--num", 0)
    out = ("--out", tmp_path / "out")
    found = run("prune", models / "adapter", *folders, *out)
    assert_refused(found, "lora-ext prune: ", "--direction")
    asked = ("prune", models / "adapter", *folders, *out, "--direction", "smallest")
    assert_refused(run(*asked), "equal weights", "; --on-zero-alignment skip keeps such layers")
    skipping = (*asked, "--on-zero-alignment", "skip", "--score", "alignment")
    assert run_json(*skipping)["modules"] == []
    shutil.rmtree(tmp_path / "out")
    same = ("prune", *of(models), "--num", 0, "--projection", "orthogonal", *out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The command warns that P is the identity.
        status, text, err = run(*same)
        assert status == 2 and text == "" and "; --allow-degenerate sets all scores to 0" in err
        found = run_json(*same, "--allow-degenerate")
    assert {row["score"] for row in found["modules"]} == {0.0}
    assert found["size_correlation"] is None


@pytest.mark.parametrize("score", ["angle", "alignment", "distance"])
def test_prune_needs_no_direction_for_scores_that_determine_it(run_json, models, tmp_path, score):
    out = ("--score", score, "--out", tmp_path / "out")
    found = run_json("prune", *of(models), "--num", 2, *out)
    config = splora.SploraConfig(num=2, direction="smallest", score=score)
    folders = models / "adapter", models / "base", models / "aligned"
    wanted = splora.apply(*folders, config)
    assert LoraAdapter.load(tmp_path / "out") == wanted.adapter
    assert found["score"] == score
    assert found["size_correlation"] == pytest.approx(wanted.size_correlation)
    by_module = {row["module"]: row["alignment"] for row in found["modules"]}
    assert by_module == pytest.approx({row.name: row.alignment for row in wanted.stats})


def test_prune_of_models_that_do_not_fit_prints_one_sentence(run, models, tmp_path):
    out = ("--direction", "largest", "--out", tmp_path / "out")
    other = adapter()
    other.save(tmp_path / "other")
    save_file({"x.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    base = ("--base", models / "base", "--aligned", models / "aligned", "--num", 1)
    same = ("--base", models / "base", "--aligned", models / "base", "--num", 1)
    empty = ("--base", models / "base", "--aligned", tmp_path, "--num", 1)
    nowhere = ("--base", models / "base", "--aligned", tmp_path / "nowhere", "--num", 1)
    for words, arguments in {
        Q: (tmp_path / "other", *base),
        "found 9": (models / "adapter", *base[:-1], 9),
        "q_proj": (models / "adapter", *empty),
        "nowhere": (models / "adapter", *nowhere),
        "self_attn": (models / "adapter", *same),
        "no modules": (models / "adapter", *base[:-1], 8),
    }.items():
        words = "expected an adapter with modules" if words == "no modules" else words
        assert_refused(run("prune", *arguments, *out), "lora-ext prune: ", words)
    assert not (tmp_path / "out").exists()


def test_doctor_prints_json_and_text(run, run_json):
    found = run_json("doctor")
    assert found["ops"]["cpu"]["ok"] and "torch" in found["versions"]
    status, out, _ = run("doctor")
    assert status == 0 and "all good" in out
