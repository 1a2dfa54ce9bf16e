"""Commands that run a model: serve, a server of OpenAI's API, and distil-guide.

A guide is a hidden Markov model of a model's text.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from lora_ext.control import distil

from ._output import progress, say, show

_REQUESTS = (
    "Tell me about a small town by the sea.",
    "How does rain form?",
    "Write a short letter to a friend.",
    "What should I cook tonight?",
    "Explain what a computer does.",
    "List three animals and where they live.",
    "Give me advice for a job interview.",
    "Tell me a story about a child and a river.",
)


def distil_guide(arguments: Namespace) -> None:
    """Train a guide for constrained generation on samples of a model.

    Writes DIR/guide.safetensors for lora_ext.control.Guide.load, with the head
    that predicts the guide's state from the model's hidden state. Prints the loss
    on held-out texts in nats per token: of the guide, of the model, and of the
    guide with its head.
    """
    try:
        import transformers
    except ImportError:
        remedy = "run `pip install 'transformers>=4.56'`"
        raise ValueError(f"expected transformers, found none: {remedy}") from None
    if not Path(arguments.model).is_dir():
        raise ValueError(f"MODEL: expected a folder, found {str(arguments.model)!r:.200}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
    kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(arguments.model, local_files_only=True).eval()
    requests: Iterable[str] = _REQUESTS
    if arguments.prompts is not None:
        lines = Path(arguments.prompts).read_text(encoding="utf-8").splitlines()
        requests = [line for line in lines if line.strip()]
    guide = distil(
        model,
        [_tokens(tokenizer, request) for request in requests],
        arguments.states,
        samples=arguments.samples,
        length=arguments.length,
        eos_token_id=tokenizer.eos_token_id,
        seed=arguments.seed,
        progress=partial(progress, unit="it"),
    )
    guide.save(arguments.out)
    summary = {"out": str(arguments.out), "states": guide.num_states, **guide.measures}
    show({key.replace("_", " "): value for key, value in summary.items()}, [], arguments.json)


def _tokens(tokenizer: Any, request: str) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        said = [{"role": "user", "content": request}]
        options = {"add_generation_prompt": True, "return_dict": False}
        return list(tokenizer.apply_chat_template(said, **options))
    return list(tokenizer.encode(request))


def serve(arguments: Namespace) -> None:
    """Serve OpenAI's API over HTTP; `model` selects an adapter.

    Serves chats and completions of a causal LM with continuous batching, or
    embeddings of an embedding model. An adapter is loaded at its first request.
    There is no authentication: listen on the loopback interface, or use a proxy.
    Ctrl-C stops the server.
    """
    try:
        from lora_ext import server
    except ModuleNotFoundError as error:
        remedy = "run `pip install --no-build-isolation '.[serve]'` in a checkout of lora_ext"
        raise ValueError(f"expected {error.name}, found none: {remedy}") from None
    names = server.Settings.__dataclass_fields__
    server.serve(server.Settings(**{name: getattr(arguments, name) for name in names}), say)
