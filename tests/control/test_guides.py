"""Guides (HMMs): made from circuits, stored in files, and learned from a model."""

from __future__ import annotations

import importlib
import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from control_toys import V, guide
from torch.utils._python_dispatch import TorchDispatchMode

from lora_ext.circuits import Bernoulli, Categorical, Circuit, RegionGraph
from lora_ext.control import Guide, distil


def test_circuit_and_its_guide_give_every_text_the_same_probability() -> None:
    torch.manual_seed(0)
    circuit = Circuit(RegionGraph.hmm(4, 3, Categorical(V), homogeneous=True)).double()
    found = Guide.from_circuit(circuit)
    texts = torch.tensor(list(itertools.product(range(V), repeat=4)))
    assert torch.allclose(found.log_prob(texts), circuit.log_prob(texts), atol=1e-12)
    shorter = texts.clone()
    shorter[:, 2:] = -1
    assert torch.allclose(found.log_prob(shorter), circuit.log_prob(shorter), atol=1e-12)


@pytest.mark.parametrize(
    "graph",
    [
        RegionGraph.hmm(4, 3, Categorical(V)),
        RegionGraph.hmm(4, 3, Bernoulli(), homogeneous=True),
        RegionGraph.cp(4, 3, Categorical(V)),
        RegionGraph.hmm(1, 3, Categorical(V), homogeneous=True),
    ],
)
def test_circuits_that_are_not_homogeneous_token_chains_raise(graph: RegionGraph) -> None:
    with pytest.raises(ValueError, match=r"from_circuit: circuit: expected RegionGraph\.hmm"):
        Guide.from_circuit(Circuit(graph))


def test_loaded_guide_equals_the_saved_one(tmp_path: Path) -> None:
    one = guide()
    one.measures = {"held_out_nats": 3.5}
    one.prior = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one.save(tmp_path / "guide")
    again = Guide.load(tmp_path / "guide")
    for name in ("initial", "transition", "emission", "prior"):
        assert torch.equal(getattr(again, name), getattr(one, name))
    assert again.measures == one.measures


def test_files_without_a_guide_raise(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(ValueError, match="cannot be opened"):
        Guide.load(tmp_path)
    good = {"initial": torch.ones(2) / 2, "transition": torch.ones(2, 2) / 2}
    for bad in (
        good,
        good | {"emission": torch.ones(3, 4) / 4},
        good | {"emission": torch.ones(2, 4)},
        good | {"emission": torch.full((2, 4), torch.nan)},
        good | {"emission": torch.ones(2, 4) / 4, "more": torch.ones(1)},
        good | {"emission": torch.ones(2, 4) / 4, "prior": torch.ones(3, 5)},
        good | {"emission": torch.ones(2, 4) / 4, "prior": torch.full((2, 5), torch.inf)},
        good | {"emission": torch.ones(2, 4) / 4, "prior": torch.ones(2)},
    ):
        save_file(bad, tmp_path / "guide.safetensors")
        with pytest.raises(ValueError, match="expected"):
            Guide.load(tmp_path)


def test_damaged_files_raise_errors_that_name_them(tmp_path: Path) -> None:
    """Check random changes of bytes and lengths, most of which make the guide invalid."""
    one, rng, refused = guide(), random.Random(4), 0
    one.measures = {"abcdef": 2.5, "more": 10**400}  # larger than any float
    one.save(tmp_path)
    path = tmp_path / "guide.safetensors"
    whole = path.read_bytes()
    dtype = b'"F64","shape":[3]'
    damaged = [whole, whole.replace(b"abcdef", b"\\ud800")]  # an unpaired surrogate
    damaged += [whole.replace(dtype, b'"U64","shape":[3]')]  # not a dtype of guides
    for _ in range(300):
        data = bytearray(whole)
        data[rng.randrange(700)] = rng.randrange(32, 127)
        damaged.append(bytes(data[: rng.choice([len(data)] * 9 + [rng.randrange(len(data))])]))
    for data in damaged:
        path.write_bytes(data)
        try:
            Guide.load(tmp_path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"initial": torch.ones(3)}, "initial: expected probabilities"),
        ({"initial": torch.ones(3, dtype=torch.long)}, "initial: expected float32 or float64"),
        ({"transition": torch.ones(3, 2) / 2}, "transition: expected shape"),
        ({"emission": torch.ones(2, 5) / 5}, "emission: expected shape"),
        ({"emission": torch.ones(3, 0)}, r"emission: expected shape \(3, 1\), found \(3, 0\)"),
        ({"emission": torch.tensor(1.0)}, r"emission: expected shape \(3, 1\), found \(\)"),
        ({"emission": -torch.ones(3, 5, dtype=torch.float64)}, "emission: expected probabilities"),
        ({"emission": torch.ones(3, 5) / 5}, "emission: expected torch.float64"),
    ],
)
def test_parameters_that_are_not_a_valid_guide_raise(change: Any, message: str) -> None:
    whole = guide()
    given = {k: getattr(whole, k) for k in ("initial", "transition", "emission")}
    with pytest.raises(ValueError, match=message):
        Guide(**(given | change))


# --- learning -------------------------------------------------------------------------------------
def cyclic_model(vocab: int = 12) -> Any:
    """Return a model in which the last token almost determines the next token, so few states
    suffice."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=vocab - 1,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for layer in model.model.layers:  # The hidden state depends only on the last token.
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    table = torch.linalg.qr(torch.randn(16, 16))[0][:vocab]
    model.model.embed_tokens.weight.data.copy_(table)
    model.lm_head.weight.data.copy_(1.2 * table.roll(1, 0))
    return model


def test_distilled_guide_is_better_than_one_state_and_reports_its_measures() -> None:
    model, said = cyclic_model(), []

    def bar(items: Any, desc: str, total: int) -> Any:
        said.append((desc, total))
        return items

    before = torch.random.get_rng_state()
    arguments = {"samples": 200, "length": 8, "batch": 50, "em_steps": 4, "prior_steps": 60}
    one = distil(model, [[0], [1, 2]], 1, **arguments)
    many = distil(model, [[0], [1, 2]], 12, **arguments, progress=bar)
    assert torch.equal(before, torch.random.get_rng_state())
    nats = [g.measures["held_out_nats"] for g in (one, many)]
    assert nats[1] < nats[0] - 0.5
    model_nats = many.measures["model_nats"]
    assert nats[1] - model_nats < 0.2 * (nats[0] - model_nats)
    assert {d for d, _ in said} == {"texts", "clusters", "emissions", "EM steps", "prior"}
    # The prior head depends on the position in the text, unlike the initial distribution of the
    # guide.
    assert many.prior is not None and many.prior.shape == (12, 16)
    assert many.measures["prior_nats"] - model_nats < 0.2 * (nats[0] - model_nats)
    again = distil(model, [[0], [1, 2]], 12, **arguments)
    assert torch.equal(again.transition, many.transition)
    assert torch.equal(again.emission, many.emission)
    assert torch.equal(again.prior, many.prior)


@pytest.mark.parametrize("seed", range(3))
def test_contexts_get_separate_states_if_there_are_enough(seed: int) -> None:
    """Check a model whose next token depends only on the last token, one of eleven."""
    settings = {"samples": 100, "length": 8, "batch": 50, "em_steps": 0, "prior_steps": 0}
    found = distil(cyclic_model(), [[0], [1, 2]], 11, seed=seed, **settings)
    assert len(set(found.emission.argmax(1).tolist())) == 11


class LargestResult(TorchDispatchMode):
    """Mode that records the number of elements of the largest tensor returned by an op."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.most = max(self.most, result.numel())
        return result


def test_initial_centres_are_different_points_and_found_without_a_copy_of_all_points() -> None:
    torch.manual_seed(0)
    contexts = torch.randn(9, 64)
    points = contexts.repeat(20, 1)
    spread = importlib.import_module("lora_ext.control.distil")._spread
    with LargestResult() as seen:
        centres = spread(points, 9)
    assert seen.most < points.numel()
    assert len(centres.unique(dim=0)) == 9


def test_guide_of_one_state_emits_the_mean_of_the_model_distributions() -> None:
    model = cyclic_model()
    one = distil(model, torch.tensor([[3]]), 1, samples=40, length=2, em_steps=0, prior_steps=0)
    assert one.prior is None
    with torch.no_grad():
        start = model(torch.tensor([[3]])).logits[0, -1].softmax(-1)
    # Half of the positions are directly after the prompt, with the distribution `start`.
    assert torch.all(one.emission[0] >= 0.45 * start)
    assert math.isclose(float(one.emission.sum()), 1, abs_tol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"states": 0}, "states: expected a whole number, at least 1, found 0"),
        ({"states": 999}, "states: expected at most"),
        ({"prompts": []}, "prompts: expected a non-empty list"),
        ({"held_out": 1.0}, "held_out: expected a share"),
        ({"length": 1}, "length: expected a whole number, at least 2"),
    ],
)
def test_invalid_arguments_of_distil_raise(settings: Any, message: str) -> None:
    given = {"prompts": [[1]], "states": 2, "samples": 4, "length": 2} | settings
    with pytest.raises(ValueError, match=message):
        distil(cyclic_model(), **given)
