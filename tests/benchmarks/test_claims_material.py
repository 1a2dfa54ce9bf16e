"""Inputs of the reproductions: checked files, repeatable texts, small models as documented."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the models are transformers'")
from claims import language, material, peers, private, section_texts
from federated_digits import federate, shared_state

from lora_ext.federated import LayerPlan


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an installed package with one file."""
    folder = tmp_path / "some_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('nobody imports it')")
    (folder / "words.txt").write_text("abc")
    monkeypatch.syspath_prepend(tmp_path)
    return folder / "words.txt"


ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_file_has_the_measured_hash_or_raises(package: Path):
    assert material.path_of(material.File("some_package", "words.txt", "some", ABC)) == package
    other = material.File("some_package", "words.txt", "some", "0" * 64)
    with pytest.raises(ValueError, match=r"expected the SHA-256 0{12}\.\.\., found ba7816bf8f01"):
        material.path_of(other)
    for module, path in (("some_package", "more.txt"), ("no_such_package", "words.txt")):
        with pytest.raises(ModuleNotFoundError, match="run `pip install --no-deps some`"):
            material.path_of(material.File(module, path, "some", ABC))


LISTS = "\n\n".join(
    f"Package: {section}-{i}\nSource: {section}{i // 2} (1.0)\nSection: contrib/{section}\n"
    f"Description: text {section} {i // 4}\n more"
    for section, count in (("games", 40), ("net", 32), ("rare", 2))
    for i in range(count)
)


def test_texts_are_of_the_largest_sections_and_unique(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(material, "_available", lambda: LISTS)
    material.sections.cache_clear()
    texts, names, found = material.sections(2, 8)
    assert names == ["games", "net"] and len(found) == 12
    assert len(texts) == len(set(texts)) == 16  # 8 different texts per section
    assert all(text.startswith(f"text {names[place]} ") for text, place in texts)
    with pytest.raises(RuntimeError, match="run `apt-get update`"):
        material.sections(2, 9)
    material.sections.cache_clear()


def test_padding_does_not_change_the_logits_of_the_text_classifier():
    own = section_texts.load(quick=True)
    world = section_texts.make_world(0, section_texts.QUICK, quick=True)
    assert {int(c) for c in world.testing[1]} == set(range(section_texts.CLASSES))
    assert len(world.training[1]) + len(world.testing[1]) == len(own.labels)
    ids = own.ids[:3]
    padded = torch.nn.functional.pad(ids, (0, 5))
    model = world.adapted()
    torch.nn.init.normal_(model.head.weight)
    with torch.no_grad():
        torch.testing.assert_close(model(padded), model(ids))


def test_head_is_trained_averaged_and_counted_in_bytes():
    world = section_texts.make_world(0, section_texts.QUICK, quick=True)
    model, seen = world.adapted(), []
    head = shared_state(world, model)
    assert set(head) == {"head.weight", "head.bias"}
    run = federate(
        world,
        world.shares("iid"),
        lambda round, clients: {clients[0]: LayerPlan((5,))},
        model=model,
        before=lambda round, state: seen.append(state["head.weight"].clone()),
    )
    assert not torch.equal(seen[0], seen[1])  # The first round trained the head.
    assert not torch.equal(model.get_parameter("head.weight"), head["head.weight"])
    layer = 2 * world.sizes.rank * (16 + 16) * 4
    nbytes = sum(tensor.nbytes for tensor in head.values())
    assert run.comm.rows[0].up == layer + nbytes and run.comm.rows[0].down == 6 * layer + nbytes


def test_rows_of_text_are_equal_in_every_process_and_decode_to_the_text():
    rows = language.rows_of("python", 5, 16, quick=True)
    assert rows.shape == (5, 16)
    text = language.Bytes().decode(rows[0])
    assert text.startswith("def ") and re.fullmatch(r"[\x00-\x7f]{16}", text)


def test_baselines_train_some_parameters_and_keep_those_documented_as_constant():
    world = section_texts.make_world(0, section_texts.QUICK, quick=True)
    shares = world.shares("iid")
    module = "layers.0.attention.self.query"
    keys = [f"base_model.model.{module}.lora_{factor}.weight" for factor in "AB"]
    moved: dict[str, tuple[bool, bool]] = {}
    for name in peers.NAMES:
        peer = peers.Peer(name, world)
        start = dict(peer.state)
        with torch.no_grad():  # makes all factors nonzero
            start[keys[1]] = peer.state[keys[1]] = torch.full_like(start[keys[1]], 0.1)
        update = peer.trained(3, shares[3], round=1)
        moved[name] = (bool(update.tensors[keys[0]].any()), bool(update.tensors[keys[1]].any()))
        assert update.tensors["head.bias"].any()
        assert (3 in peer.own) == (name == "FedSA-LoRA")
        if name == "FedEx-LoRA":
            other = peer.trained(4, shares[4], round=1)
            layer = peer.model.get_submodule(module)
            before = layer.base_layer.weight.clone()
            peer.add_residual([update, other])
            each = [[start[key] + u.tensors[key] for key in keys] for u in (update, other)]
            a, b = ((one + two) / 2 for one, two in zip(*each, strict=True))
            exact = sum(b_i @ a_i for a_i, b_i in each) / 2
            found = layer.base_layer.weight - before + layer.scaling["default"] * b @ a
            torch.testing.assert_close(found, layer.scaling["default"] * exact)
    assert moved == {
        "FedAvg": (True, True),
        "FFA-LoRA": (False, True),
        "RoLoRA": (False, True),
        "FedSA-LoRA": (True, False),
        "FedEx-LoRA": (True, True),
    }


@pytest.mark.slow
def test_private_changes_are_clipped_and_noise_agrees_with_the_accountant():
    world = section_texts.make_world(0, section_texts.QUICK, quick=True)
    clip, noise = 1e-3, 200.0
    found: dict[float, list[torch.Tensor]] = {}
    for each in (0.0, noise):
        states = found[each] = []
        private.run(
            world,
            world.shares("iid"),
            each,
            clip,
            lambda state, states=states: states.append(
                torch.cat([tensor.flatten() for tensor in state.values()])
            ),
        )
    start, first, second = found[0.0]
    assert 0 < (first - start).norm() <= clip * 1.001 and (second - first).norm() <= clip * 1.001
    spread = (found[noise][1] - first).std().item()
    assert abs(spread / (noise * clip / world.sizes.per_round) - 1) < 0.1
    assert private.epsilon(world, 0.0) == float("inf")
    pytest.importorskip(
        "opacus", reason="opacus is not installed: pip install --no-build-isolation '.[claims]'"
    )
    # The privacy bound (epsilon) of the subsampled Gaussian falls as the noise grows, and grows
    # with the number of rounds.
    whole = section_texts.make_world(0, section_texts.SIZES, quick=True)
    assert private.epsilon(world, 1.0) < private.epsilon(whole, 1.0) < 20
    assert private.epsilon(whole, 2.0) < private.epsilon(whole, 1.0) / 2
