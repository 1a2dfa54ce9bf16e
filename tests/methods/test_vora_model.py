"""`VoraForCausalLM`: forward, generate and errors."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import transformers
from methods.vora_support import (
    PATCH,
    PLACEHOLDER,
    batch,
    image,
    language,
    of_sample,
    seeing,
    settings,
    text,
)
from torch import Tensor

import lora_ext
from lora_ext.methods import vora

FAMILIES = ("llama", "qwen2", "gpt2")


def run(model: Any, **given: Any) -> Any:
    with torch.no_grad():
        return model(**given)


# -------------------------------------------------------------------------------------------------
# Forward


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("route", ["all", "vision"])
def test_mixed_batch_equals_its_samples(route: str, family: str, attention: str) -> None:
    model, given = seeing(route, family, attn_implementation=attention), batch()
    found = run(model, **given)
    assert found.logits.isfinite().all()
    lengths = [3 + 4 + 4, 4, 2 + 2]
    for sample, length in enumerate(lengths):
        alone = run(model, **of_sample(given, sample))
        assert alone.logits.shape[1] == length
        torch.testing.assert_close(
            found.logits[sample, :length], alone.logits[0], rtol=1e-4, atol=1e-4
        )
    order = torch.tensor([2, 0, 1])
    turned = {key: [value[i] for i in order] for key, value in given.items()}
    turned = {k: v if k == "images" else torch.stack(v) for k, v in turned.items()}
    torch.testing.assert_close(
        run(model, **turned).logits, found.logits[order], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_text_equals_the_base_model_with_route_vision(family: str) -> None:
    model, given = seeing("vision", family), text()
    expected = run(language(family), **given)
    found = run(model, **given)
    assert torch.equal(found.logits, expected.logits)
    torch.testing.assert_close(found.lm_loss, expected.loss)
    padded = {**batch(), "images": None}
    padded["input_ids"] = padded["input_ids"].clamp(min=0)
    mask = padded["attention_mask"]
    expected = run(language(family), input_ids=padded["input_ids"], attention_mask=mask)
    found = run(model, **padded)
    assert torch.equal(found.logits[mask.bool()], expected.logits[mask.bool()])
    moved = run(seeing("all", family), **given)
    assert not torch.equal(moved.logits, run(language(family), **given).logits)


def test_vision_mask_marks_logits_of_images() -> None:
    model, given = seeing(), batch()
    found = run(model, **given)
    assert found.vision_mask.dtype == torch.bool
    assert found.vision_mask.sum(1).tolist() == [2 * 2 + 1 * 3, 0, 2 * 1]
    assert found.logits.shape[:2] == found.vision_mask.shape


@pytest.mark.parametrize("bidirectional", [True, False])
def test_last_patch_reaches_the_first_only_if_bidirectional(bidirectional: bool) -> None:
    model, given = seeing(bidirectional=bidirectional), batch()
    before = run(model, **given).logits
    changed = copy.deepcopy(given)
    changed["images"][0][0][:, -PATCH:, -PATCH:] += 1  # the last patch of the first image
    after = run(model, **changed).logits
    first = 1  # sample 0: one text token, then the image's four
    assert torch.equal(after[0, first], before[0, first]) is not bidirectional
    assert torch.equal(after[0, 0], before[0, 0])  # text before the image does not attend to it
    assert not torch.equal(after[0, -1], before[0, -1])
    torch.testing.assert_close(after[1:], before[1:], rtol=1e-4, atol=1e-4)


def test_padding_side_does_not_matter() -> None:
    model, given = seeing(), batch()
    left = {key: value for key, value in given.items() if key != "labels"}
    length = given["attention_mask"].sum(1).tolist()
    for name in ("input_ids", "attention_mask"):
        rows = zip(given[name], length, strict=True)
        left[name] = torch.stack([row.roll(6 - count) for row, count in rows])
    found, expected = run(model, **left), run(model, **given)
    torch.testing.assert_close(found.logits, expected.logits)


def test_adapters_blocks_apply_to_the_text_of_a_batch() -> None:
    # Text rows use text adapters, image rows the vision adapter, in one launch per layer.
    model, given = seeing("vision"), batch()
    layers = [m for m in model.modules() if isinstance(m, vora.VoraLinear)]
    for i, layer in enumerate(layers):
        for name in ("red", "blue"):
            layer.add_adapter(name, r=2)
            generator = torch.Generator().manual_seed(i + len(name))
            torch.nn.init.normal_(layer.lora_B[name].weight, generator=generator)
    names = ["red", "blue", None]
    calls: list[Any] = []
    op = lora_ext.ops.lora_linear_apart
    with pytest.MonkeyPatch.context() as patch, lora_ext.adapters(names):
        patch.setattr(
            lora_ext.ops,
            "lora_linear_apart",
            lambda *args, **how: calls.append(args) or op(*args, **how),
        )
        found = run(model, **given)
    assert len(calls) == len(layers)
    plain = run(model, **given)
    for sample, name in enumerate(names):
        with lora_ext.adapters([name]):
            alone = run(model, **of_sample(given, sample)).logits[0]
        torch.testing.assert_close(found.logits[sample, : len(alone)], alone, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.logits[sample], plain.logits[sample]) is (name is None)


# -------------------------------------------------------------------------------------------------
# Generate


def continued(model: Any, given: dict[str, Any], count: int) -> Tensor:
    """Return ``count`` greedy tokens per sample; each token recomputes the whole sample."""
    out = []
    for sample in range(len(given["input_ids"])):
        alone = {k: v for k, v in of_sample(given, sample).items() if k != "labels"}
        for _ in range(count):
            best = run(model, **alone).logits[:, -1].argmax(-1, keepdim=True)
            alone["input_ids"] = torch.cat([alone["input_ids"], best], 1)
        out.append(alone["input_ids"][0, -count:])
    return torch.stack(out)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("route", ["all", "vision"])
def test_greedy_tokens_with_and_without_a_cache_are_equal(
    route: str, family: str, attention: str
) -> None:
    model, given = seeing(route, family, attn_implementation=attention), batch()
    expected = continued(model, given, 6)
    found = model.generate(
        given["input_ids"],
        given["images"],
        given["attention_mask"],
        max_new_tokens=6,
        do_sample=False,
    )
    assert torch.equal(found, expected)
    # The tokens vary, so the comparison is meaningful.
    assert len(set(found.flatten().tolist())) > 3
    beams = model.generate(
        given["input_ids"], given["images"], given["attention_mask"], max_new_tokens=4, num_beams=2
    )
    for sample in range(3):  # Each sample is also generated as a separate batch.
        alone = of_sample(given, sample)
        one = model.generate(alone["input_ids"], alone["images"], max_new_tokens=4, num_beams=2)
        assert torch.equal(beams[sample], one[0])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_layers_with_sliding_attention_keep_their_window(family: str, attention: str) -> None:
    # All layers of Mistral have sliding attention; Qwen3's have it from the second one on, so it
    # needs masks of both kinds.
    window: dict[str, Any] = {"sliding_window": 3, "attn_implementation": attention}
    if family == "qwen3":
        window |= {"use_sliding_window": True, "max_window_layers": 1}
    model, given = seeing("vision", family, **window), batch()
    p, ids = PLACEHOLDER, torch.tensor([[7, 8, 9, 1, 5, 6, 7]])
    alone = run(language(family, **window), input_ids=ids).logits
    mixed = torch.cat([ids, torch.tensor([[p, 2, 3, 4, 5, 6, 7]])])
    beside = run(model, input_ids=mixed, images=[None, [image(2, 2)]]).logits
    torch.testing.assert_close(beside[0, :7], alone[0], rtol=1e-5, atol=1e-5)
    found = model.generate(
        given["input_ids"], given["images"], given["attention_mask"], max_new_tokens=6
    )
    assert torch.equal(found, continued(model, given, 6))


def test_text_is_generated_as_by_the_base_model_with_route_vision() -> None:
    model, given = seeing("vision"), text()
    expected = language().generate(given["input_ids"], max_new_tokens=5, do_sample=False)[:, 6:]
    assert torch.equal(model.generate(given["input_ids"], max_new_tokens=5), expected)


def test_threads_can_generate_concurrently() -> None:
    model, given = seeing("vision"), batch()
    jobs = [of_sample(given, sample) for sample in (0, 2, 1)]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    expected = [model.generate(job["input_ids"], job["images"], **options) for job in jobs]
    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        for _ in range(3):
            found[i] = model.generate(jobs[i]["input_ids"], jobs[i]["images"], **options)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(3))


def test_settings_that_would_split_an_image_are_refused() -> None:
    model, given = seeing("vision"), batch()
    arguments = given["input_ids"], given["images"], given["attention_mask"]
    with pytest.raises(ValueError, match=r"prefill_chunk_size: expected None.*found 4"):
        model.generate(*arguments, max_new_tokens=2, prefill_chunk_size=4)
    for cache in ("static", "offloaded_static", "sliding_window", "hybrid_chunked"):
        with pytest.raises(ValueError, match=rf"cache_implementation: expected .*found '{cache}'"):
            model.generate(*arguments, max_new_tokens=2, cache_implementation=cache)
    with pytest.raises(ValueError, match="position_ids: expected None"):
        model.generate(*arguments, position_ids=torch.zeros(3, 6))


# -------------------------------------------------------------------------------------------------
# Errors


def test_placeholders_and_images_must_match_by_sample() -> None:
    model, given = seeing(), batch()
    given["images"][2] = []
    with pytest.raises(
        ValueError, match=r"sample 2: expected 1 images for 1 placeholders, found 0"
    ):
        run(model, **given)
    with pytest.raises(
        ValueError, match=r"images: sample 0: .*found a tensor of shape \(3, 4, 4\)"
    ):
        run(model, **{**given, "images": [image(2, 2)]})
    with pytest.raises(ValueError, match=r"images: sample 0: .*found a tensor"):
        run(model, **{**given, "images": torch.zeros(3, 3, 4, 4)})
    with pytest.raises(TypeError, match=r"images: sample 1: expected \(3, H, W\) .*found ndarray"):
        run(model, **{**given, "images": [[], [image(2, 2).numpy()], []]})
    given["images"] = [[image(2, 2), torch.zeros(3, 5, 4)], [], [image(2, 2)]]
    with pytest.raises(ValueError, match="multiples of the patch size 2, found 5 x 4"):
        run(model, **given)


def test_attention_without_pairwise_masks_is_refused() -> None:
    model, given = seeing(), batch()
    model.config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"layer_types: expected .*found 'chunked_attention'"):
        run(model, **given)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation: expected 'eager' or 'sdpa'"):
        run(model, **given)


def test_model_keeps_the_configuration_of_apply() -> None:
    model = vora.apply(language(), settings())
    assert vora.VoraForCausalLM(model, settings()).model is model
    with pytest.raises(ValueError, match="VoraForCausalLM: config: expected the config"):
        vora.VoraForCausalLM(model, settings(rank=3))


# -------------------------------------------------------------------------------------------------
# Attention that does not use a mask per pair of tokens


def _other(family: str) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 37, "hidden_size": 16}
    if family == "gpt_neo":
        config: Any = transformers.GPTNeoConfig(
            **sizes, num_layers=2, num_heads=4, max_position_embeddings=64,
            attention_types=[[["global", "local"], 1]],
        )  # fmt: skip
        return transformers.GPTNeoForCausalLM(config).eval(), ("q_proj", "c_fc")
    if family == "bloom":
        config = transformers.BloomConfig(**sizes, n_layer=2, n_head=4)
        return transformers.BloomForCausalLM(config).eval(), ("query_key_value",)
    config = transformers.FalconConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=4, alibi=family == "falcon with alibi"
    )
    return transformers.FalconForCausalLM(config).eval(), ("query_key_value",)


@pytest.mark.parametrize(
    ("family", "found"),
    [
        ("gpt_neo", r"GPTNeo\w+, which masks future tokens with a buffer \(transformer.h.0."),
        ("bloom", r"Bloom\w+, which computes ALiBi from a mask per token"),
        ("falcon with alibi", r"Falcon\w+, which computes ALiBi from a mask per token"),
        ("falcon", None),
    ],
)
def test_error_names_attention_that_ignores_pairwise_masks(family: str, found: str | None) -> None:
    language_model, targets = _other(family)
    how: dict[str, Any] = {"n_blocks": 1, "target_modules": targets}
    model = vora.VoraForCausalLM(language_model, settings(**how))
    given = batch()
    if found is None:
        assert run(model, **given).logits.isfinite().all()
        return
    for call in (run, lambda model, **given: model.generate(**given, max_new_tokens=2)):
        with pytest.raises(ValueError, match=rf"mask for pairs of tokens, found {found}"):
            call(model, **given)
    assert run(model, **text()).logits.isfinite().all()
    vora.remove(language_model)
    one_way = vora.VoraForCausalLM(language_model, settings(bidirectional=False, **how))
    assert run(one_way, **given).logits.isfinite().all()
