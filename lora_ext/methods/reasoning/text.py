"""The HashHop and HashChain tasks as text: training batches for a language model, and the accuracy
of its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lora_ext._checks import choice, require
from lora_ext._torch import evaluating
from lora_ext.layers import IGNORE

from .tasks import HashInstance

#: Functions that return whether an answer matches its target.
SCORES: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda answer, target: answer.split()[:1] == [target],
    "prefix3": lambda answer, target: answer.strip()[:3].lower() == target[:3].lower(),
}
_BREAKDOWNS: dict[str, Callable[[HashInstance], int | None]] = {
    "hops": lambda instance: instance.hops,
    "length": lambda instance: min(instance.chain_lengths),
}


def collate(
    tokenizer: Any, instances: Iterable[HashInstance], mask_prompt: bool = True
) -> dict[str, Tensor]:
    """Tokenise a training batch: prompt, answer, end-of-text token, and padding on the right.

    Rows are not truncated, and their lengths are not compared with the model's context (unlike in
    :func:`evaluate`).

    Args:
        tokenizer: transformers tokenizer with an end-of-text token.
        instances: B instances of either task.
        mask_prompt: whether to set the labels of the prompt to ``IGNORE``.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each ``(B, T)`` int64, for a causal
        transformers model; T is the number of tokens of the longest row. Labels of padding are
        ``IGNORE``, even if the padding id is the end-of-text token.

    Raises:
        ValueError: If there are no instances, or the tokenizer has no end-of-text token.
    """
    instances = list(instances)
    require(bool(instances), "collate", "instances", "at least one", 0)
    end = tokenizer.eos_token_id
    require(end is not None, "collate", "tokenizer", "one with an eos_token", "no eos_token")
    prompts = [_prompt_ids(tokenizer, instance) for instance in instances]
    answers = [[*_answer_ids(tokenizer, instance), end] for instance in instances]
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    labels = [
        ([IGNORE] * len(prompt) if mask_prompt else prompt) + answer
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return {
        "input_ids": _padded(rows, _pad_id(tokenizer)),
        "attention_mask": _padded([[1] * len(row) for row in rows], 0),
        "labels": _padded(labels, IGNORE),
    }


def evaluate(
    model: Any,
    tokenizer: Any,
    instances: Iterable[HashInstance],
    score: str = "exact",
    batch_size: int = 32,
    breakdown: str | None = None,
) -> dict[str, Any]:
    """Generate the answers of a model greedily and compute their accuracy.

    In contrast, the published code samples answers, and does not allow an answer to repeat a pair
    of tokens from the prompt, although the prompt contains the answer.

    Args:
        model: model with the ``generate`` method of transformers. The model runs in evaluation
            mode, and its mode is restored afterwards.
        tokenizer: transformers tokenizer.
        instances: instances of either task.
        score: criterion of a correct answer. "exact": the first word of the answer equals the
            target; "prefix3": the first three characters of answer and target are equal in lower
            case, as in the published code of the chain task.
        batch_size: number of prompts per call of ``generate``, padded on the left.
        breakdown: property to group the instances by: "hops", or "length" for the length of the
            shortest chain.

    Returns:
        Dictionary with ``accuracy``. With a breakdown, the entry ``by_hops`` or ``by_length`` maps
        each value of the property, in ascending order, to (accuracy, number of instances).

    Raises:
        ValueError: If ``score`` or ``breakdown`` is unknown, there are no instances, "hops" is used
            for the chain task, or a prompt leaves no room for the answer in the model's context.
    """
    where = "evaluate"
    instances = list(instances)
    choice(where, "score", score, tuple(SCORES))
    require(bool(instances), where, "instances", "at least one", 0)
    require(batch_size >= 1, where, "batch_size", "at least 1", batch_size)
    groups: list[int | None] = [None] * len(instances)
    if breakdown is not None:
        choice(where, "breakdown", breakdown, tuple(_BREAKDOWNS))
        groups = [_BREAKDOWNS[breakdown](instance) for instance in instances]
        expected = "instances of the hop task for 'hops'"
        found = f"{groups.count(None)} instances of the chain task"
        require(None not in groups, where, "breakdown", expected, found)
    prompts = [_prompt_ids(tokenizer, instance) for instance in instances]
    new_tokens = _room(model, tokenizer, instances, prompts)
    answers: list[str] = []
    # `model` may be an object with `generate` that is not a module.
    with evaluating(model) if isinstance(model, torch.nn.Module) else nullcontext():
        for first in range(0, len(prompts), batch_size):
            chosen = prompts[first : first + batch_size]
            answers += _answers(model, tokenizer, chosen, new_tokens)
    pairs = zip(answers, instances, strict=True)
    hits = [SCORES[score](answer, instance.target) for answer, instance in pairs]
    result: dict[str, Any] = {"accuracy": sum(hits) / len(hits)}
    if breakdown is not None:
        parts: dict[Any, list[bool]] = {}
        for group, hit in zip(groups, hits, strict=True):
            parts.setdefault(group, []).append(hit)
        counted = {group: (sum(part) / len(part), len(part)) for group, part in parts.items()}
        result[f"by_{breakdown}"] = dict(sorted(counted.items()))
    return result


def _answers(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], new_tokens: int
) -> list[str]:
    pad = _pad_id(tokenizer)
    ids = _padded(prompts, pad, left=True)
    mask = _padded([[1] * len(row) for row in prompts], 0, left=True)
    device = getattr(model, "device", ids.device)
    with torch.no_grad():
        found = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            no_repeat_ngram_size=0,
            repetition_penalty=1.0,
            pad_token_id=pad,
        )
    tails = found[:, ids.shape[1] :].tolist()
    end = tokenizer.eos_token_id
    tails = [tail[: tail.index(end)] if end in tail else tail for tail in tails]
    return [tokenizer.decode(tail, skip_special_tokens=True) for tail in tails]


def _room(
    model: Any, tokenizer: Any, instances: Sequence[HashInstance], prompts: Sequence[list[int]]
) -> int:
    """Return the maximum number of tokens to generate for an answer.

    This number allows one token per character, one for a space and one for the end of the text,
    unless the rest of the model's context is smaller.
    """
    wanted = max(len(instance.target) for instance in instances) + 2
    config = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    context = getattr(config, "max_position_embeddings", None)  # None if it is unknown
    if context is None:
        return wanted
    needed = max(len(_answer_ids(tokenizer, instance)) for instance in instances)
    longest = max(map(len, prompts))
    expected = f"prompts of at most {context - needed} tokens, so that an answer of {needed} fits "
    expected += f"in the model's context of {context}"
    require(longest + needed <= context, "evaluate", "instances", expected, f"{longest} tokens")
    return min(wanted, context - longest)


def _prompt_ids(tokenizer: Any, instance: HashInstance) -> list[int]:
    ids = list(tokenizer(instance.prompt).input_ids)
    end = tokenizer.eos_token_id
    return ids[:-1] if ids and ids[-1] == end else ids  # Some tokenizers append `end`.


def _answer_ids(tokenizer: Any, instance: HashInstance) -> list[int]:
    return list(tokenizer(f" {instance.target}", add_special_tokens=False).input_ids)


def _pad_id(tokenizer: Any) -> int:
    """Return the id of the padding token or the end-of-text token; if the tokenizer has neither,
    return 0, since padding is masked."""
    known = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((token for token in known if token is not None), 0)


def _padded(rows: Sequence[list[int]], value: int, left: bool = False) -> Tensor:
    padding = [[value] * (max(map(len, rows)) - len(row)) for row in rows]
    pairs = zip(padding, rows, strict=True)
    return torch.tensor([pad + row if left else row + pad for pad, row in pairs])
