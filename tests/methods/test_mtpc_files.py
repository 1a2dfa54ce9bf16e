"""Drafts saved in folders: written files, restored drafts and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.toy import make_draft, make_model, prompts
from safetensors.torch import load_file, save_file

from lora_ext.methods import mtpc

CONFIG, TENSORS = "mtpc_config.json", "mtpc.safetensors"
KINDS = ("ff", "cp", "hmm", "btree")


def saved(folder: Path, **fields: Any) -> mtpc.Draft:
    draft = make_draft(make_model("llama"), **fields)
    draft.save(folder)
    return draft


@pytest.mark.parametrize("draft_layers", [0, 1])
@pytest.mark.parametrize("shortlist", [None, [0, 2, 4]])
@pytest.mark.parametrize("emission", ["full", "expander", "adapter"])
def test_saved_draft_is_restored_with_its_configuration(
    tmp_path: Path, emission: str, shortlist: list[int] | None, draft_layers: int
):
    draft = saved(tmp_path, emission=emission, shortlist=shortlist, draft_layers=draft_layers)
    found = mtpc.Draft.load(make_model("llama"), tmp_path)
    assert found.config == draft.config
    assert found.state_dict().keys() == draft.state_dict().keys()
    assert all(torch.equal(t, found.state_dict()[k]) for k, t in draft.state_dict().items())
    ids, mask = prompts(2)
    assert torch.equal(found.loss(ids)[0], draft.loss(ids)[0])
    runs = [d.decoder().generate(ids, mask, max_new_tokens=9, seed=1) for d in (draft, found)]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    assert sorted(p.name for p in tmp_path.iterdir()) == [TENSORS, CONFIG]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_option_is_restored(tmp_path: Path, kind: str):
    options = {"contextual": False, "share_transitions": True, "gamma": 1.0, "beta": 0.25}
    draft = saved(tmp_path, kind=kind, **options)
    found = mtpc.Draft.load(make_model("llama"), str(tmp_path))
    assert found.config == draft.config and found.config.beta == 0.25
    assert all(torch.equal(t, found.state_dict()[k]) for k, t in draft.state_dict().items())


@pytest.mark.parametrize("shortlist", [None, [0, 2, 4]])
def test_unembedding_of_the_model_is_not_saved(tmp_path: Path, shortlist: list[int] | None):
    draft = saved(tmp_path, emission="adapter", shortlist=shortlist)
    assert "head.unembed" not in load_file(tmp_path / TENSORS)
    model = make_model("llama")
    found = mtpc.Draft.load(model, tmp_path)
    own = model.get_output_embeddings().weight
    assert (found.head.unembed.data_ptr() == own.data_ptr()) == (shortlist is None)
    with torch.no_grad():
        draft.head.leaves.unembed = draft.head.unembed + 1
    draft.save(tmp_path)
    assert "head.unembed" in load_file(tmp_path / TENSORS)
    before = own.clone()
    again = mtpc.Draft.load(model, tmp_path)
    assert torch.equal(again.head.unembed, draft.head.unembed) and torch.equal(own, before)


def test_head_keeps_its_saved_dtype(tmp_path: Path):
    draft = make_draft(make_model("llama"), emission="adapter", draft_layers=1)
    draft.float()
    draft.save(tmp_path)
    found = mtpc.Draft.load(make_model("llama"), tmp_path)
    assert {t.dtype for t in found.state_dict().values()} == {torch.float32}
    assert all(torch.equal(t, found.state_dict()[k]) for k, t in draft.state_dict().items())
    assert next(found.model.parameters()).dtype == torch.float64


def rewrite(folder: Path, change: Any) -> None:
    data = json.loads((folder / CONFIG).read_text())
    change(data)
    (folder / CONFIG).write_text(json.dumps(data))


def set_field(name: str, value: Any) -> Any:
    return lambda data: data["config"].__setitem__(name, value)


def hostile_configs() -> list[Any]:
    cases = [
        ("version", lambda d: d.__setitem__("version", 2), "version: expected 1, found 2"),
        ("keys", lambda d: d.pop("shortlist"), "the keys 'version' and 'config' and 'sh"),
        ("field", set_field("kernel", 1), "expected keys from .*found 'kernel'"),
        ("object", lambda d: d.__setitem__("config", []), r"config: expected a JSON object"),
        ("type", set_field("rank", "3"), "rank: expected an integer, found '3'"),
        ("bool", set_field("rank", True), "rank: expected an integer, found True"),
        ("kind", set_field("kind", "pcfg"), "MtpcConfig: kind: expected one of"),
        ("gamma", set_field("gamma", 7), r"MtpcConfig: gamma: expected a number in \(0, 1\]"),
        ("rank", set_field("rank", 4), r"head\.\w+: expected \(.*, found \("),
        ("positions", set_field("n_token", 5), r"head\.emit: expected \(5, 3, 5, 16\), found"),
        ("huge", set_field("n_token", 2**40), r"head\.emit: expected|overflow|Storage"),
        ("beyond", set_field("n_token", 2**80), r"mtpc\.safetensors: "),
        ("rank2", set_field("rank", 2**31), r"mtpc\.safetensors: "),
        ("kind2", set_field("kind", "cp"), r"head\.trans: expected no such key, found"),
        ("layers", set_field("draft_layers", 1), "expected factors of 1 layers, found 0 tensors"),
        ("list", lambda d: d.__setitem__("shortlist", [0, 1, -2]), "shortlist: expected token ids"),
        ("list2", lambda d: d.__setitem__("shortlist", [0, 1, 1]), "shortlist: .*found 1 twice"),
        ("list3", lambda d: d.__setitem__("shortlist", [0, 9]), r"ids in \[0, 5\)"),
        ("list4", lambda d: d.__setitem__("shortlist", "all"), "shortlist: expected token ids"),
        ("list5", lambda d: d.__setitem__("shortlist", [0, 1]), r"head\.emit: expected .*2, 16"),
    ]
    return [pytest.param(*case[1:], id=case[0]) for case in cases]


@pytest.mark.parametrize(("change", "message"), hostile_configs())
def test_invalid_configurations_are_refused(tmp_path: Path, change: Any, message: str):
    saved(tmp_path)
    rewrite(tmp_path, change)
    refused(tmp_path, message)


def refused(folder: Path, message: str) -> None:
    """Check that loading the folder raises ``message`` and leaves the model unchanged."""
    model = make_model("llama").requires_grad_(True)
    modules = {name: id(m) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        mtpc.Draft.load(model, folder)
    assert {name: id(m) for name, m in model.named_modules()} == modules
    assert all(p.requires_grad for p in model.parameters())


def test_invalid_files_are_refused(tmp_path: Path):
    refused(tmp_path / "nowhere", "cannot be opened")
    saved(tmp_path)
    text = (tmp_path / CONFIG).read_text()
    for wrong in ("[" * 100_000, text + "}", text.replace("0.9", "NaN"), "", "null"):
        (tmp_path / CONFIG).write_text(wrong)
        refused(tmp_path, "mtpc_config.json: expected")
    (tmp_path / CONFIG).write_text(text.replace('"rank": 3', '"rank": 3, "rank": 3'))
    refused(tmp_path, "duplicate key 'rank'")
    (tmp_path / CONFIG).write_text(text)
    (tmp_path / TENSORS).write_bytes(b"pickle")
    refused(tmp_path, "expected an 8-byte header length")
    (tmp_path / TENSORS).unlink()
    (tmp_path / TENSORS).mkdir()
    refused(tmp_path, "expected a regular file")


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path):
    saved(tmp_path, draft_layers=1)
    state = load_file(tmp_path / TENSORS)
    name = "tail.factors.0"
    for change, message in (
        ({"head.emit": state["head.emit"][:2]}, r"head\.emit: expected \(4, 3, 5, 16\), found"),
        ({"head.more": state["head.prior"]}, r"head\.more: expected no such key"),
        ({"body.emit": state["head.prior"]}, r"body\.emit: expected no such key"),
        ({"head.prior": state["head.prior"].float()}, "head: expected one floating-point dtype"),
        ({name: state[name].float()}, "tail: expected one floating-point dtype"),
        ({name: state[name][:3]}, r"tail\.factors\.0: expected shape \(16, .*found \(3, 16\)"),
        ({"tail.factors.2": state["tail.factors.1"][:, :3]}, r"tail\.factors\.2: expected"),
        ({"tail.factors.99": state[name]}, r"tail\.factors\.99: expected no such key"),
    ):
        save_file(
            {
                k: t.clone(memory_format=torch.contiguous_format)
                for k, t in {**state, **change}.items()
            },
            tmp_path / TENSORS,
        )
        refused(tmp_path, message)
    for left_out in ("head.prior", name, "tail.factors.5"):
        save_file({k: t for k, t in state.items() if k != left_out}, tmp_path / TENSORS)
        refused(tmp_path, left_out)
    integers = {k: t.long() if k.startswith("head") else t for k, t in state.items()}
    save_file(integers, tmp_path / TENSORS)
    refused(tmp_path, "head: expected one floating-point dtype, found {torch.int64}")


def test_draft_of_another_model_is_refused(tmp_path: Path):
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"head\.emit: expected \(4, 3, 7, 16\), found"):
        mtpc.Draft.load(make_model("llama", vocab=7), tmp_path)
    with pytest.raises(ValueError, match="output embeddings"):
        mtpc.Draft.load(make_model("llama").base_model, tmp_path)


def test_failed_save_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    draft = saved(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(*_: Any, **__: Any) -> str:
        raise OSError("disk full")

    monkeypatch.setattr("lora_ext._files.json.dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        draft.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("draft_layers", [0, 2])
def test_removing_a_draft_restores_the_model(draft_layers: int):
    model = make_model("gpt2").requires_grad_(True)
    model.get_output_embeddings().requires_grad_(False)
    modules = {name: id(m) for name, m in model.named_modules()}
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    draft = make_draft(model, draft_layers=draft_layers)
    assert not any(p.requires_grad for p in model.base_model.wte.parameters())
    draft.remove()
    assert {name: id(m) for name, m in model.named_modules()} == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
