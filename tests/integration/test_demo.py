"""examples/demo.py and examples/serving_curve.py: comparison with PEFT, output and errors."""

import sys
from pathlib import Path

import pytest
import torch
from scripts import load_script, needs
from tiny import make_pair, tokens

pytestmark = pytest.mark.hosts

NAMES = ["red", "blue", "green"]


def test_error_is_compared_with_that_of_peft_on_the_same_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    curve = load_script(monkeypatch, "examples", "serving_curve")
    exact = torch.tensor([31.0, -2.0], dtype=torch.float64)
    off = torch.tensor([0.0, 0.6], dtype=torch.float64)  # errors of PEFT's logits
    assert curve.complain("rows", exact + 2 * off, exact - off, exact) == []
    (message,) = curve.complain("rows", exact + 4 * off, exact - off, exact)
    assert message.startswith("rows: largest error of a logit against float64: expected at most ")
    assert "1.8e+00, found 2.4e+00 (PEFT's error is 6.0e-01" in message
    assert "report this" in message and "lora-ext doctor" in message


def test_correct_logits_pass_and_those_of_another_adapter_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curve = load_script(monkeypatch, "examples", "serving_curve")
    ours, peers, _ = make_pair("llama", tmp_path)
    ids, before = tokens(3, curve.PROMPT), {k: v.clone() for k, v in peers.state_dict().items()}
    assert curve.compare([ours, ours], peers, ids, NAMES) == []
    after = peers.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())

    def other(**given: object) -> object:
        return ours(**{**given, "adapter_names": NAMES[::-1]})

    complaints = curve.compare([ours, other], peers, ids, NAMES)
    starts = [f"lora_ext, base packed, 3 adapters, {n} tokens per row: " for n in (curve.PROMPT, 1)]
    assert [each[: len(start)] for each, start in zip(complaints, starts, strict=True)] == starts


@needs("matplotlib", "rich")
def test_demo_prints_its_tables_before_it_reports_wrong_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = load_script(monkeypatch, "examples", "demo")
    for name in ("load_smollm2", "converted_folder", "train_adapter", "lay_out", "draw_curve"):
        result = (None, None) if name == "load_smollm2" else tmp_path
        monkeypatch.setattr(demo, name, lambda *_, result=result: result)
    monkeypatch.setattr(demo, "serve", lambda *_: ["a batch is wrong"])
    curve = demo.Curve((1, 2), {"lora_ext": [12.5, 25.0]}, ("a curve is wrong",))
    monkeypatch.setattr(demo, "measure_curve", lambda counts: curve)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^a batch is wrong\na curve is wrong$"):
        demo.main()
    assert "12.5" in capsys.readouterr().out
