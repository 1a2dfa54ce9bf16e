"""Tiny random transformers models, and PEFT adapters for them that change the logits."""

import contextlib
import copy
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tokenizers import Tokenizer as WordTokenizer
from tokenizers import models, pre_tokenizers
from torch import Tensor, nn

import lora_ext
from lora_ext.rows._pool_layer import pool_of

VOCAB, WIDTH, LAYERS, HEADS = 97, 32, 2, 4
Maker = Callable[[], Any]


SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "max_position_embeddings": 64,
}  # fmt: skip
MARKS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
TEXT = {**SIZES, **MARKS, "num_key_value_heads": 2}
GPT = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "vocab_size": VOCAB}
T5 = {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


def maker(name: str, head: str = "ForCausalLM", config: str = "", **fields: Any) -> Maker:
    """Return a function that makes a transformers model of the given class and configuration."""

    def make() -> Any:
        kind = getattr(transformers, config or f"{name}Config")
        return getattr(transformers, f"{name}{head}")(kind(**fields))

    return make


def classifier(name: str, **fields: Any) -> Maker:
    """Return a function that makes a classifier of sequences with five classes."""
    return maker(name, "ForSequenceClassification", **{**SIZES, "num_labels": 5, **fields})


FAMILIES: dict[str, Maker] = {
    "llama": maker("Llama", **TEXT),
    "qwen2": maker("Qwen2", **TEXT),
    "gpt2": maker("GPT2", "LMHeadModel", **GPT, **MARKS),
    "bert": classifier("Bert"),
}

# Adapters whose ranks are or are not multiples of the page size (8), with all or some modules as
# targets, and with the scales alpha / r or alpha / sqrt(r).
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "red": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        "green": {"r": 12, "target_modules": "all-linear", "use_rslora": True},
        "blue": {"r": 8, "target_modules": ["o_proj", "down_proj"], "rank_pattern": {"o_proj": 3}},
    },
    "gpt2": {
        "red": {"r": 4, "target_modules": ["c_attn"]},
        "green": {"r": 12, "target_modules": ["c_attn", "c_proj", "c_fc"]},
        "blue": {"r": 8, "target_modules": ["c_fc"], "lora_bias": True},
    },
    "bert": {
        "red": {"r": 4, "target_modules": ["query", "value"]},
        "green": {"r": 12, "target_modules": "all-linear"},
        "blue": {"r": 8, "target_modules": ["pooler.dense", "classifier"]},
    },
}
CONFIGS["qwen2"] = CONFIGS["llama"]


def make_model(family: str) -> nn.Module:
    """Return a model with the same weights at every call.

    Its logits are about 1, so adapters change tokens.
    """
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(10 if "embed" in name or "wte" in name else 5)
    return model


def make_peft(
    model: nn.Module, configs: Mapping[str, Mapping[str, Any]], size: float = 0.15
) -> nn.Module:
    """Return a PeftModel over a copy of ``model``; B is random too, instead of PEFT's zeros."""
    conv1d = any(type(m).__name__ == "Conv1D" for m in model.modules())
    given = {"lora_alpha": 16, "fan_in_fan_out": conv1d}
    return adapted(model, {n: peft.LoraConfig(**given, **f) for n, f in configs.items()}, size)


def adapted(model: nn.Module, configs: Mapping[str, peft.LoraConfig], size: float) -> Any:
    """Return a PeftModel over a copy of ``model``, with random factors of the given size."""
    torch.manual_seed(1)
    wrapped: Any = None
    for name, config in configs.items():
        if wrapped is None:
            wrapped = peft.get_peft_model(copy.deepcopy(model), config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn_like(parameter) * size)
    return wrapped.eval()


def only(reference: Any, name: str | None) -> Any:
    """Activate one adapter of PEFT's model or, for the base model, return a context manager that
    disables all adapters."""
    if name in (None, "__base__"):
        return reference.disable_adapter()
    reference.set_adapter(name)
    return contextlib.nullcontext()


def attach_saved(
    model: Any, folder: Path, names: Iterable[str], slots: int = 4, rank: int = 16, **how: Any
) -> Any:
    """Return the model, attached to a pool with the adapters of a folder."""
    pool = lora_ext.AdapterPool(model, max_slots=slots, max_rank=rank)
    for name in names:
        pool.load(name, folder / name)
    return lora_ext.attach(model, pool, **how)


def make_pair(
    family: str, directory: Path, configs: Mapping[str, Mapping[str, Any]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, Any, lora_ext.AdapterPool]:  # fmt: skip
    """Return the attached model, PEFT's, and the pool loaded from PEFT's files."""
    configs = configs or CONFIGS[family]
    model = make_model(family).to(dtype)
    reference = make_peft(model, configs).to(dtype)
    with torch.no_grad():
        for key, parameter in reference.named_parameters():
            # Magnitudes have both signs and are far from PEFT's initial norms.
            if "magnitude" in key:
                parameter.copy_(torch.randn_like(parameter))
    reference.save_pretrained(directory)
    model = attach_saved(model, directory, configs)
    return model, reference, pool_of(model)


def load_random(pool: lora_ext.AdapterPool, *names: str) -> None:
    """Load adapters of rank 2 on all linear layers of a pool."""
    modules = list(pool.index.linear)
    for name in names:
        state = {}
        for module, spec in pool.index.linear.items():
            stem = f"base_model.model.{module}"
            state[f"{stem}.lora_A.weight"] = torch.randn(2, spec.in_features) / 3
            state[f"{stem}.lora_B.weight"] = torch.randn(spec.out_features, 2) / 3
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": modules}
        pool.load(name, (config, state))


def enlarged(make: Maker, factor: float) -> Any:
    """Return a model with the same weights at every call.

    The matrices are multiplied by ``factor``, so that adapters change tokens.
    """
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(factor)
    return model


def trainer_of(model: Any, folder: Path, rows: Any, how: Any = None, **settings: Any) -> Any:
    """Return transformers' Trainer.

    ``how`` are its arguments, and ``settings`` those of its TrainingArguments.
    """
    usual: dict[str, Any] = {
        "learning_rate": 1e-2,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
    }
    arguments = {"output_dir": str(folder), "use_cpu": True, **usual, **settings}
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**arguments),
        train_dataset=rows,
        eval_dataset=rows,
        **(how or {}),
    )


def batching(new: int = 4, **fields: Any) -> dict[str, Any]:
    """Return settings of continuous batching for greedy answers of ``new`` tokens."""
    how = {"max_new_tokens": new, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    sizes = {"num_blocks": 64, "page_size": 4, **fields}
    return {
        "generation_config": transformers.GenerationConfig(**how),
        "continuous_batching_config": transformers.ContinuousBatchingConfig(**sizes),
    }


def word_tokenizer(words: Mapping[str, int], unknown: str | None, **marks: Any) -> Any:
    """Return a tokenizer with one token for each word."""
    inner = WordTokenizer(models.WordLevel(dict(words), unk_token=unknown))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **marks)


def numbered_words(**how: Any) -> Any:
    """Return a tokenizer in which the word w5 is token 5."""
    words = {f"w{i}": i for i in range(VOCAB)}
    return word_tokenizer(words, "w2", pad_token="w0", eos_token="w1", **how)


def assert_answers_as_alone(model: Any, ids: Tensor, names: list[str | None], **how: Any) -> None:
    """Check that each row of a mixed batch equals that row in a batch with only its adapter."""
    with lora_ext.adapters(names):
        mixed = model.generate(ids, **how)
    for row, name in enumerate(names):
        with lora_ext.adapters(name):
            alone = model.generate(ids, **how)[row]
        length = min(len(alone), mixed.shape[1])  # Each batch is padded to its longest row.
        assert torch.equal(alone[:length], mixed[row, :length])
        for rest in (alone[length:], mixed[row, length:]):
            assert (rest == model.config.pad_token_id).all()


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Return random tokens without the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (batch, length), generator=generator)


def assert_alone_and_mixed_equal_peft(
    model: Any, reference: Any, names: list[str | None], bound: float
) -> Tensor:
    """Check one adapter for all rows, and one per row, against PEFT with one active adapter.

    Returns ``(adapters, rows * tokens)``: the largest change of a logit by each adapter.
    """
    ids, moved = tokens(len(names), 6), []
    with torch.no_grad():
        base = model(ids).logits
        with lora_ext.adapters(names):
            mixed = model(ids).logits
        for name in dict.fromkeys(names):
            rows = [i for i, n in enumerate(names) if n == name]
            if name in (None, "__base__"):
                assert (mixed[rows] - base[rows]).abs().max() < bound
                continue
            reference.set_adapter(name)
            theirs = reference(input_ids=ids).logits
            with lora_ext.adapters(name):
                assert (model(ids).logits - theirs).abs().max() < bound
            assert (mixed[rows] - theirs[rows]).abs().max() < bound
            moved.append((theirs - base).abs().amax(-1).flatten())
    return torch.stack(moved)


def side_by_side(work: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> None:
    """Call ``work`` once per tuple of ``arguments``, each in a separate thread, and wait."""
    threads = [threading.Thread(target=work, args=each) for each in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
