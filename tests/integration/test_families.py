"""Generation with many families of models.

Each row of a mixed batch equals the row of a model with the merged adapter, or the call raises.
"""

from typing import Any

import pytest
import torch
from families import DECODERS, NAMES, SEQ2SEQ, make, merged, served
from tiny import batching, side_by_side, tokens
from torch import Tensor

import lora_ext

GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "static cache": {**GREEDY, "cache_implementation": "static"},
    "beams": {**GREEDY, "num_beams": 3, "num_return_sequences": 2},
    "chunked prefill": {**GREEDY, "prefill_chunk_size": 2},
}
# Combinations that transformers rejects even without ``attach``.
LACKS = {
    ("mamba", "chunked prefill"), ("bamba", "embeds"), ("opt", "batch"), ("jamba", "batch"),
}  # fmt: skip


def left_padded() -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([6, 3, 5, 2])
    mask = torch.arange(6) >= 6 - lengths[:, None]
    return tokens(4, 6).masked_fill(~mask, 0), mask.long()


def assert_rows_are_the_judges(model: Any, judges: Any, inputs: Any, **how: Any) -> None:
    """Check that generated rows equal those of the merged models.

    ``inputs`` are keyword arguments of generate with one row per name.
    """
    copies = how.get("num_return_sequences", 1)
    mixed = model.generate(**inputs, adapter_names=NAMES, **how)
    base = model.generate(**inputs, **how)
    for row, name in enumerate(NAMES):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        alone = judges[name].generate(**one, **how)
        found = mixed[row * copies : (row + 1) * copies]
        length = min(alone.shape[1], found.shape[1])
        assert torch.equal(found[:, :length], alone[:, :length]), name
        if name is None:
            assert torch.equal(found, base[row * copies : (row + 1) * copies])
    assert not torch.equal(mixed, base)


@pytest.mark.parametrize("family", DECODERS)
def test_decoders_equal_the_merged_models(family: str) -> None:
    model, judges = served(DECODERS[family])
    ids, mask = left_padded()
    inputs = {"input_ids": ids, "attention_mask": mask}
    for way, how in WAYS.items():
        if (family, way) in LACKS:
            with pytest.raises(ValueError):
                judges[None].generate(**inputs, **how)
            continue
        assert_rows_are_the_judges(model, judges, inputs, **how)
    if (family, "embeds") not in LACKS:
        embeds = judges[None].get_input_embeddings()(ids).detach()
        inputs = {"inputs_embeds": embeds, "attention_mask": mask}
        assert_rows_are_the_judges(model, judges, inputs, **GREEDY)
    _sampled(model, judges)
    _threads_and_default(model, judges)


def _sampled(model: Any, judges: Any) -> None:
    """Check that each step's logits equal the merged model's on the generated sequence."""
    prompt = tokens(4, 4)
    torch.manual_seed(3)
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), adapter_names=NAMES, max_new_tokens=3,
        do_sample=True, top_k=0, num_return_sequences=2, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    steps = torch.stack(out.logits, 1).double()
    with torch.no_grad():
        for row, sequence in enumerate(out.sequences):
            logits = judges[NAMES[row // 2]](sequence[None]).logits[0, 3:-1].double()
            # transformers stores logits in float32: about ten roundings of values up to 100.
            torch.testing.assert_close(steps[row], logits, rtol=0, atol=1e-4)
    assert len(out.sequences.unique(dim=0)) > 4  # Sampling gave different sequences.


def _threads_and_default(model: Any, judges: Any) -> None:
    prompt = tokens(1, 5)
    expected = {name: judges[name].generate(prompt, **GREEDY) for name in NAMES}
    found: dict[str | None, Tensor] = {}

    def serve(name: str | None) -> None:
        found[name] = model.generate(prompt, adapter_names=[name], **GREEDY)

    side_by_side(serve, [(name,) for name in NAMES])
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)
    pool = model._lora_ext_attachment.pool
    lora_ext.attach(lora_ext.detach(model), pool, default="green")
    assert torch.equal(model.generate(prompt, **GREEDY), expected["green"])
    lora_ext.attach(lora_ext.detach(model), pool, default="error")
    with pytest.raises(RuntimeError, match="default='error'"):
        model.generate(prompt, **GREEDY)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "qwen3-moe", "phi3", "opt", "jamba"])
def test_continuous_batching_equals_the_merged_models(family: str) -> None:
    model, judges = served(DECODERS[family])
    prompts = [tokens(1, n, n)[0].tolist() for n in (6, 3, 5, 2)]
    how = batching(num_blocks=32, max_batch_tokens=8)
    try:
        results = model.generate_batch(prompts, adapter_names=NAMES, **how).values()
    except ValueError as error:
        assert "Invalid layer type" in str(error) and (family, "batch") in LACKS
        return
    if (family, "batch") in LACKS:
        assert all(result.error and not result.generated_tokens for result in results)
        return
    for name, prompt, result in zip(NAMES, prompts, results, strict=True):
        alone = judges[name].generate(torch.tensor([prompt]), **GREEDY)[0, len(prompt) :]
        assert result.generated_tokens == alone.tolist(), result.error


@pytest.mark.parametrize("family", ["gemma3", "qwen3-moe", "falcon", "t5"])
@pytest.mark.parametrize("way", ["lookup", "assistant"])
def test_speculation_equals_the_merged_models(family: str, way: str) -> None:
    model, judges = served({**DECODERS, **SEQ2SEQ}[family])
    how = {"prompt_lookup_num_tokens": 2} if way == "lookup" else {"assistant_model": judges["red"]}
    prompt = tokens(1, 6)
    for name in ("green", None):
        expected = judges[name].generate(prompt, **GREEDY)
        assert torch.equal(model.generate(prompt, adapter_names=[name], **GREEDY, **how), expected)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_encoder_decoders_equal_the_merged_models(family: str) -> None:
    model, judges = served(SEQ2SEQ[family])
    mask = (torch.arange(6) < torch.tensor([6, 3, 5, 2])[:, None]).long()
    ids = tokens(4, 6).masked_fill(mask == 0, 0)
    for way in ("greedy", "static cache", "beams"):
        inputs = {"input_ids": ids, "attention_mask": mask}
        assert_rows_are_the_judges(model, judges, inputs, **WAYS[way])
    embeds = judges[None].get_input_embeddings()(ids).detach()
    inputs = {"inputs_embeds": embeds, "attention_mask": mask}
    assert_rows_are_the_judges(model, judges, inputs, **GREEDY)
    with torch.no_grad():  # 4 tokens and 4 sequences, in encoder and decoder
        with lora_ext.adapters(NAMES):
            mixed = model(ids[:, :4], decoder_input_ids=ids[:, :4]).logits
        for row, name in enumerate(NAMES):
            one = ids[row : row + 1, :4]
            alone = judges[name](one, decoder_input_ids=one).logits[0]
            assert (mixed[row] - alone).abs().max() < 1e-4  # Eager attention is in float32.


def test_adapter_on_dt_proj_of_mamba_raises() -> None:
    """Check ``dt_proj``: Mamba reads its weight without a call, so an adapter would do nothing."""
    model: Any = make(DECODERS["mamba"])
    pool = lora_ext.AdapterPool(model, max_slots=1, max_rank=4)
    spec = pool.index.linear["backbone.layers.0.mixer.dt_proj"]
    stem = f"base_model.model.{spec.name}"
    state = {
        f"{stem}.lora_A.weight": torch.ones(2, spec.in_features),
        f"{stem}.lora_B.weight": torch.ones(spec.out_features, 2),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [spec.name]}
    with pytest.raises(NotImplementedError, match=r"dt_proj.lora_B.*MambaMixer reads the weight"):
        pool.load("red", (config, state))
    ids, weight = tokens(1, 4), torch.ones(spec.out_features, spec.in_features) * 2
    with torch.no_grad():  # The adapter would change logits.
        assert not torch.equal(
            model(ids).logits, merged(model, {spec.name: weight.double()})(ids).logits
        )


def test_adapter_on_relative_position_biases_needs_one_name_for_all_sequences() -> None:
    """Check the position biases of T5, whose shape (tokens, tokens) can be taken for (sequences,
    tokens)."""
    model: Any = make(SEQ2SEQ["t5"])
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    pool = lora_ext.AdapterPool(model, max_slots=1, max_rank=4, targets=[table])
    state = {
        f"base_model.model.{table}.lora_embedding_A": torch.ones(2, 32).double(),
        f"base_model.model.{table}.lora_embedding_B": torch.randn(4, 2).double(),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [table]}
    pool.load("red", (config, state))
    lora_ext.attach(model, pool)
    ids = tokens(4, 4)
    with torch.no_grad():
        with lora_ext.adapters("red"):
            assert model(ids, decoder_input_ids=ids).logits.isfinite().all()
        with lora_ext.adapters(["red", None, None, None]):
            with pytest.raises(ValueError, match=r"one name for all sequences.*relative_attention"):
                model(ids, decoder_input_ids=ids)
