"""A tiny Llama with adapters, and its answers with vLLM and with PEFT."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import peft
import tokenizers
import torch
import transformers
from torch import Tensor

VOCABULARY = 97
RANKS = {"a": 4, "b": 8, "c": 3, "d": 16, "e": 8, "f": 5}
# Adapters with these options have other modules, including the output head and the embedding.
HEAD = {"r": 8, "target_modules": ["q_proj", "down_proj", "lm_head", "embed_tokens"]}
ADAPTERS = {name: {"r": r, "target_modules": "all-linear"} for name, r in RANKS.items()} | {
    "head": HEAD,
    "head2": {**HEAD, "r": 3},
}
ACTIVATED, INVOCATION = {"alora": "a", "alora2": "d"}, [40, 41]
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16], [17, 18], [19, 20, 21], [22, 23, 24]]


def config(**changes: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=0,
        **changes,
    )


def filled(model: torch.nn.Module, seed: int, only: str = "") -> Any:
    """Fill the matrices whose names contain ``only`` with random values, and return the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() > 1 and only in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.15
    return model


def save_adapter(base: Path, to: Path, options: dict[str, Any], seed: int) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(lora_alpha=16, **options))
    # Do not save the base embedding, which PEFT would save and vLLM cannot read.
    filled(adapted, seed, only="lora_").save_pretrained(to, save_embedding_layers=False)


def save_tokenizer(to: Path) -> None:
    words = {w: i for i, w in enumerate(["<pad>", "<unk>"])}
    words |= {f"w{i}": i for i in range(2, VOCABULARY)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}w2 {{ m['content'] }} {% endfor %}w3",
    ).save_pretrained(to)


def make(folder: Path) -> None:
    base = folder / "base"
    filled(transformers.LlamaForCausalLM(config()), seed=0).save_pretrained(base)
    save_tokenizer(base)
    classifier = transformers.LlamaForSequenceClassification(config(num_labels=3))
    filled(classifier, seed=0).save_pretrained(folder / "classifier")
    save_tokenizer(folder / "classifier")
    for seed, (name, options) in enumerate(ADAPTERS.items(), 1):
        save_adapter(base, folder / name, options, seed)
    # An adapter that replaces another one in tests.
    save_adapter(base, folder / "a2", ADAPTERS["b"], seed=50)
    shutil.copytree(folder / "a", folder / "changing")
    for name, source in ACTIVATED.items():
        shutil.copytree(folder / source, folder / name)
        activate(folder / name, INVOCATION)


def activate(folder: Path, invocation: list[int]) -> None:
    """Change an adapter to an activated adapter that starts at the last occurrence of
    ``invocation`` in a prompt."""
    path = folder / "adapter_config.json"
    own = {"alora_invocation_tokens": invocation, "task_type": "CAUSAL_LM"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))


class Reference:
    """Answers of PEFT, one row at a time."""

    def __init__(self, folder: Path, model: Any = None, names: Sequence[str] = (*ADAPTERS, "a2")):
        model = model or transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
        self._model = peft.PeftModel.from_pretrained(model, folder / names[0], names[0])
        for name in names[1:]:
            self._model.load_adapter(folder / name, name)
        self._model.eval()

    @torch.no_grad()
    def logits(self, name: str | None, ids: Sequence[int]) -> Tensor:
        return self._as(name, self._model, ids).logits[0]

    def logprobs(self, name: str | None, ids: Sequence[int]) -> Tensor:
        """Return log-probabilities of the next token at each position, ``(len(ids), V)``."""
        return self.logits(name, ids).log_softmax(-1)

    @torch.no_grad()
    def embedding(self, name: str | None, ids: Sequence[int]) -> Tensor:
        """Return the hidden state of the last token, normalized to length one."""
        found = self._as(name, self._model.base_model.model.model, ids).last_hidden_state[0, -1]
        return found / found.norm()

    def _as(self, name: str | None, module: Any, ids: Sequence[int]) -> Any:
        if name is None:
            with self._model.disable_adapter():
                return module(input_ids=torch.tensor([ids]))
        self._model.set_adapter(name)
        return module(input_ids=torch.tensor([ids]))

    def check(self, answers: Sequence[Answer], names: Sequence[str | None], atol: float) -> None:
        """Check that every row has the log-probabilities and tokens of its adapter."""
        for answer, name in zip(answers, names, strict=True):
            whole = [*answer.prompt, *answer.tokens]
            wanted = self.logprobs(name, whole)[len(answer.prompt) - 1 : -1]
            torch.testing.assert_close(answer.logprobs, wanted, rtol=0, atol=atol)
            assert answer.tokens == wanted.argmax(-1).tolist()


class ActivatedReference(Reference):
    """Answers of PEFT with the activated adapters and an ordinary adapter."""

    def __init__(self, folder: Path):
        super().__init__(folder, names=[*ACTIVATED, "b"])  # PEFT's hooks use the first adapter.

    def check(self, answers: Sequence[Answer], names: Sequence[str | None], atol: float) -> None:
        """Check the answers, which must not contain the invocation, since PEFT searches in them
        too."""
        for answer in answers:
            written = [answer.prompt[-1], *answer.tokens]
            assert tuple(INVOCATION) not in itertools.pairwise(written)
        super().check(answers, names, atol)


class Answer:
    """New tokens of one row, and log-probabilities ``(tokens, V)`` at their positions."""

    def __init__(self, output: Any):
        self.prompt = list(output.prompt_token_ids)
        self.tokens = list(output.outputs[0].token_ids)
        self.logprobs = table(output.outputs[0].logprobs)
        self.cached = output.num_cached_tokens


def table(logprobs: Sequence[Any]) -> Tensor:
    """Return vLLM's dictionaries of log-probabilities as a matrix."""
    out = torch.full((len(logprobs), VOCABULARY), torch.nan)
    for row, found in zip(out, logprobs, strict=True):
        for token, value in found.items():
            row[token] = value.logprob
    return out


class Engine:
    """A vLLM engine, and a ``LoRARequest`` for each adapter in the folder."""

    def __init__(self, llm: Any, folder: Path):
        self.llm, self._folder = llm, folder

    def request(self, name: str | None, **options: Any) -> Any:
        from vllm.lora.request import LoRARequest

        if name is None:
            return None
        number = [*ADAPTERS, "changing", *ACTIVATED].index(name) + 1
        return LoRARequest(name, number, str(self._folder / name), **options)

    def run(
        self, names: Sequence[str | None], prompts: Any = None, new: int = 6, **sampling: Any
    ) -> list[Answer]:
        """Return greedy answers to one prompt per adapter name."""
        from vllm import SamplingParams

        how = {"temperature": 0, "max_tokens": new, "ignore_eos": True, "logprobs": VOCABULARY}
        params = SamplingParams(**{**how, **sampling})
        rows = prompts or itertools.cycle(PROMPTS)
        return [Answer(output) for output in self.ask("generate", names, params, prompts=rows)]

    def ask(
        self, what: str, names: Sequence[str | None], *how: Any, prompts: Any = PROMPTS
    ) -> list[Any]:
        """Return the result of an engine method for one prompt and one adapter per row."""
        rows = [{"prompt_token_ids": list(p)} for p, _ in zip(prompts, names, strict=False)]
        requests = [self.request(name) for name in names]
        return getattr(self.llm, what)(rows, *how, lora_request=requests, use_tqdm=False)

    @property
    def runner(self) -> Any:
        core = self.llm.llm_engine.engine_core.engine_core  # the core runs in this process
        return core.model_executor.driver_worker.worker.model_runner

    @property
    def manager(self) -> Any:
        return self.runner.lora_manager._adapter_manager

    @property
    def wrapper(self) -> Any:
        (wrapper,) = self.manager.punica_wrapper_mapping.values()
        return wrapper

    def forget(self) -> None:
        """Clear all slots and the prefix cache. vLLM does not overwrite removed adapters, and its
        kernels apply the adapter in the last slot to rows of the base model."""
        self.manager.remove_all_adapters()
        for module in self.manager.modules.values():
            for slot in range(self.manager.lora_slots):
                module.reset_lora(slot)
        assert self.llm.reset_prefix_cache()

    @contextlib.contextmanager
    def theirs(self) -> Iterator[None]:
        """Use the kernels of vLLM in this engine inside the ``with`` block."""
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

        own = [name for name in vars(PunicaWrapperCPU) if name.startswith("add_")]
        assert self.llm.reset_prefix_cache()
        for name in own:
            setattr(self.wrapper, name, MethodType(getattr(PunicaWrapperCPU, name), self.wrapper))
        try:
            yield
        finally:
            for name in own:
                delattr(self.wrapper, name)
            assert self.llm.reset_prefix_cache()


@contextlib.contextmanager
def started(folder: Path, model: str = "base", **options: Any) -> Iterator[Engine]:
    """Yield an engine in this process, whose settings are small enough to start within seconds."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    sizes = {"max_model_len": 128, "max_num_seqs": 16, "max_num_batched_tokens": 64}
    sizes["block_size"] = 32
    lora = {"enable_lora": True, "max_loras": 4, "max_lora_rank": 16, "max_cpu_loras": 9}
    usual = {"dtype": "float32", "enforce_eager": True, "max_logprobs": VOCABULARY}
    engine = Engine(LLM(str(folder / model), **{**usual, **sizes, **lora, **options}), folder)
    yield engine
    del engine.llm
    cleanup_dist_env_and_memory()
