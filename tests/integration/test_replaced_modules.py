"""Adapters that replace modules (PEFT's ``modules_to_save``): each row uses its adapter's head."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import attach_saved, batching, classifier, enlarged, make_model, make_peft, tokens
from torch import nn

import lora_ext
from lora_ext.adapter import LoraAdapter
from lora_ext.pool import _transfer
from lora_ext.rows._pool_layer import pool_of

BOUND = 1e-4


def tied() -> nn.Module:
    model: Any = make_model("llama")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (lambda: make_model("bert"), {"task_type": "SEQ_CLS", "target_modules": ["query"]}),
    # The classifier is a module of two linear layers.
    "roberta": (
        lambda: enlarged(classifier("Roberta"), 1),
        {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]},
    ),
    "llama": (
        lambda: make_model("llama"),
        {
            "task_type": "CAUSAL_LM",
            "target_modules": "all-linear",
            "modules_to_save": ["lm_head", "embed_tokens"],
        },
    ),
    "tied": (
        tied,
        {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
}
# green replaces only the head of classifiers
NAMES = ["red", None, "blue", "green", "red", "__base__"]


def make_trained(case: str) -> tuple[nn.Module, Any]:
    """Return the base model, and PEFT's model with three adapters that replace its head."""
    make, fields = CASES[case]
    model = make()
    plain = {"r": 4, "target_modules": fields["target_modules"]}
    if case == "llama":
        plain["target_modules"] = ["q_proj"]
    reference = make_peft(model, {"red": {"r": 4, **fields}, "blue": {"r": 3, **fields}})
    reference.add_adapter("green", peft.LoraConfig(lora_alpha=16, **plain))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in reference.named_parameters():
            new = ".modules_to_save." in key or ".green" in key
            if new:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * parameter.std().clamp(min=0.1))
    return model, reference.eval()


@pytest.fixture(scope="module", params=list(CASES))
def trained(request: Any, tmp_path_factory: Any) -> tuple[str, nn.Module, Any, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    model, reference = make_trained(request.param)
    reference.save_pretrained(folder)
    return request.param, model, reference, folder


def serve(model: nn.Module, folder: Path) -> tuple[Any, lora_ext.AdapterPool]:
    served = attach_saved(copy.deepcopy(model), folder, ("red", "blue", "green"), rank=8)
    return served, pool_of(served)


def theirs(reference: Any, name: str, ids: torch.Tensor) -> torch.Tensor:
    reference.set_adapter(name)
    return reference(input_ids=ids).logits


def test_rows_of_an_adapter_use_its_head(trained: Any) -> None:
    case, plain, reference, folder = trained
    model, pool = serve(plain, folder)
    ids = tokens(len(NAMES), 6)
    with torch.no_grad():
        base = plain(ids).logits
        assert torch.equal(model(ids).logits, base)
        mixed = model(ids, adapter_names=NAMES).logits
        alone = {name: model(ids, adapter_names=[name] * 6).logits for name in set(NAMES)}
        for row, name in enumerate(NAMES):
            if name in (None, "__base__"):
                assert torch.equal(mixed[row], base[row])
                continue
            assert (alone[name] - theirs(reference, name, ids)).abs().max() < BOUND, (case, name)
            assert (mixed[row] - alone[name][row]).abs().max() < BOUND
            assert (mixed[row] - base[row]).abs().max() > 100 * BOUND
        with lora_ext.adapters([[name] * 6 for name in NAMES]):
            if case in ("llama", "tied"):  # A classifier head has no row per token.
                assert (model(ids).logits - mixed).abs().max() < BOUND
    lora_ext.detach(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base)
    assert pool.stats()["replaced_bytes"] > 0


def test_heads_are_loaded_and_evicted_with_their_adapters(trained: Any) -> None:
    case, plain, reference, folder = trained
    model, _ = serve(plain, folder)
    lora_ext.detach(model)
    pool = lora_ext.AdapterPool(model, max_slots=1, max_rank=8)
    lora_ext.attach(model, pool)
    ids = tokens(3, 5)
    with torch.no_grad():
        base = model(ids).logits
        for name in ("red", "blue", "green", "red", "green", "blue"):
            if name not in pool:
                pool.load(name, folder / name)
            with lora_ext.adapters(name):
                assert (model(ids).logits - theirs(reference, name, ids)).abs().max() < BOUND
                held = pool.stats()["replaced_bytes"]
                assert (held > 0) == (name != "green" or case in ("bert", "roberta"))
        pool.update("blue", folder / "red")
        with lora_ext.adapters("blue"):
            found = model(ids).logits
            pool.unload("blue")
            assert torch.equal(model(ids).logits, found)  # The block keeps it loaded.
        assert (found - theirs(reference, "red", ids)).abs().max() < BOUND
        assert pool.stats()["replaced_bytes"] == 0
        assert torch.equal(model(ids).logits, base)


def test_sources_in_memory_and_in_files_are_equal(trained: Any) -> None:
    _, plain, reference, folder = trained
    model, pool = serve(plain, folder)
    pool.unload("green")
    pool.load("live", reference, adapter_name="red")
    with torch.no_grad():
        ids = tokens(2, 5)
        expected = model(ids, adapter_names=["red", "red"]).logits
        assert torch.equal(model(ids, adapter_names=["live", "live"]).logits, expected)
        pool.update("live", LoraAdapter.load(folder / "red"))
        assert torch.equal(model(ids, adapter_names=["live", "live"]).logits, expected)


@pytest.mark.slow
def test_compiled_model_follows_heads_that_are_loaded_later(trained: Any) -> None:
    torch._dynamo.reset()
    _, plain, _, folder = trained
    model, pool = serve(plain, folder)
    lora_ext.detach(model)
    pool = lora_ext.AdapterPool(model, max_slots=4, max_rank=8)
    pool.load("green", folder / "green")
    lora_ext.attach(model, pool)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = tokens(3, 5)
    with torch.no_grad():
        with lora_ext.adapters(["green", None, "green"]):
            torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
        for name in ("red", "blue"):
            pool.load(name, folder / name)
        for names in (["red", None, "blue"], ["green", "blue", None], None):
            with lora_ext.adapters(names):
                torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


@pytest.mark.slow
def test_compiled_backward_through_a_head_raises(tmp_path: Path) -> None:
    torch._dynamo.reset()
    plain, reference = make_trained("bert")
    reference.save_pretrained(tmp_path)
    model, _ = serve(plain, tmp_path)
    compiled = torch.compile(model, backend="aot_eager")
    error = torch._dynamo.exc.BackendCompilerFailed  # torch.compile wraps our error in this one.
    with lora_ext.adapters("red"), pytest.raises(error, match="compiled graph is not supported"):
        compiled(tokens(2, 5)).logits.sum().backward()


def test_gradients_reach_the_layers_below_a_head(trained: Any) -> None:
    _, plain, reference, folder = trained
    model, _ = serve(plain, folder)
    model.requires_grad_(False)
    embeddings = model.get_input_embeddings()(tokens(2, 5)).requires_grad_()
    reference.set_adapter("red")
    loss = reference(inputs_embeds=embeddings).logits.square().sum()
    (wanted,) = torch.autograd.grad(loss, embeddings)
    with lora_ext.adapters("red"):
        loss = model(inputs_embeds=embeddings).logits.square().sum()
    (found,) = torch.autograd.grad(loss, embeddings)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.slow
def test_generation_uses_the_heads(tmp_path: Path) -> None:
    plain, reference = make_trained("llama")
    reference.save_pretrained(tmp_path)
    model, _ = serve(plain, tmp_path)
    ids, names = tokens(4, 6), ["red", None, "blue", "green"]
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    mask = torch.ones_like(ids)
    mixed = model.generate(ids, attention_mask=mask, adapter_names=names, **how)
    how["num_beams"] = 1
    greedy = []
    for row, name in enumerate(names):
        one = {"attention_mask": mask[:1], **how}
        alone = model.generate(
            ids[row : row + 1],
            adapter_names=[name],
            num_beams=2,
            **{k: v for k, v in one.items() if k != "num_beams"},
        )
        assert torch.equal(mixed[row], alone[0])
        if name is None:
            expected = plain.generate(ids[row : row + 1], **one)  # pyright: ignore
        else:
            reference.set_adapter(name)
            expected = reference.generate(input_ids=ids[row : row + 1], **one)
        greedy.append(expected[0, 6:].tolist())
    found = model.generate_batch(ids.tolist(), adapter_names=names, **batching(8))
    assert [result.generated_tokens for result in found.values()] == greedy


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make, fields = CASES["bert"]
    make_peft(make(), {"default": {"r": 4, **fields}}).save_pretrained(tmp_path)
    return tmp_path


def test_head_that_does_not_fit_raises_and_the_pool_is_unchanged(saved: Path) -> None:
    pool = lora_ext.AdapterPool(make_model("bert"), max_slots=2, max_rank=8)
    file, stem = saved / "adapter_model.safetensors", "base_model.model.classifier"
    good = load_file(file)

    def refused(error: type[Exception], message: str, **changes: torch.Tensor | None) -> None:
        state = {**good, **{f"{stem}.{role}": value for role, value in changes.items()}}
        save_file({key: value for key, value in state.items() if value is not None}, file)
        with pytest.raises(error, match=message):
            pool.load("bad", saved)
        assert pool.names == [] and pool.stats()["replaced_bytes"] == 0

    refused(
        ValueError,
        r"weight: shape: expected \(5, 32\) .* found \(7, 32\); a head with a different number",
        weight=torch.ones(7, 32),
    )
    refused(ValueError, r"modules_to_save, found none for classifier.bias", bias=None)
    refused(ValueError, "dtype: expected float16", bias=torch.ones(5, dtype=torch.int64))
    refused(ValueError, "classifier: expected finite values", bias=torch.full((5,), torch.nan))
    state = {**good, f"{stem}.scale": torch.ones(5)}
    save_file(state, file)
    for strict in (True, False):
        with pytest.raises(NotImplementedError, match=r"scale: modules_to_save is not supported"):
            pool.load("bad", saved, strict=strict)
    save_file(good, file)
    narrow = lora_ext.AdapterPool(make_model("bert"), max_slots=2, max_rank=8, targets=["query"])
    with pytest.raises(NotImplementedError, match=r"modules_to_save.* classifier: .*targets"):
        narrow.load("bad", saved)
    pool.load("good", saved)


def test_failed_copy_keeps_the_head_of_the_adapter_to_evict(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("bert")
    pool = lora_ext.AdapterPool(model, max_slots=1, max_rank=8)
    pool.load("good", saved)
    lora_ext.attach(model, pool)
    ids, copied, copy_ = tokens(2, 5), [], _transfer.copy_

    def fails_at_the_head(destination: torch.Tensor, source: torch.Tensor) -> None:
        if destination.shape == (5, 32) and not copied:
            copied.append(destination)
            raise MemoryError("the device is full")
        copy_(destination, source)

    with torch.no_grad():
        expected = model(ids, adapter_names="good").logits
        monkeypatch.setattr(_transfer, "copy_", fails_at_the_head)
        with pytest.raises(MemoryError, match="the device is full"):
            pool.load("next", saved)
        assert copied and pool.names == ["good"]
        assert torch.equal(model(ids, adapter_names="good").logits, expected)


@pytest.mark.parametrize("saved_whole", [["norm"], ["layers.0"]])
def test_modules_other_than_linear_and_embedding_raise(saved_whole: list[str]) -> None:
    model = make_model("llama")
    fields = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": saved_whole}
    if saved_whole == ["layers.0"]:
        fields["layers_to_transform"] = [1]
    reference = make_peft(model, {"default": fields})
    pool = lora_ext.AdapterPool(model, max_slots=2, max_rank=8)
    with pytest.raises(NotImplementedError, match=r"modules_to_save is .* on .*: expected a plain"):
        pool.load("bad", reference)


def test_base_weights_that_differ_raise() -> None:
    """Check the base weight of a head, which PEFT saves too; it must equal the model's weight."""
    model = make_model("llama")
    fields = {"r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}
    reference = make_peft(model, {"default": fields})
    pool = lora_ext.AdapterPool(model, max_slots=2, max_rank=8)
    value = LoraAdapter.from_model(reference)
    assert sorted(value.base_weights) == [
        "base_model.model.lm_head.base_layer.weight",
        "base_model.model.model.embed_tokens.base_layer.weight",
    ]
    pool.load("good", value)
    with torch.no_grad():
        reference.get_input_embeddings().weight[3, 4] += 1
    with pytest.raises(ValueError, match=r"embed_tokens.base_layer.weight: expected the val"):
        pool.load("bad", reference)
