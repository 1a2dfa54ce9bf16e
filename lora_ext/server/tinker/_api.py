"""Sessions, models, samplers and checkpoints of Tinker's API. The routes are in :mod:`.app`.

A client program opens a session, and trains models and samples in it. A model of the API is a
tenant of the service: an adapter with its optimizer.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_ext._checks import renamed
from lora_ext.tenants import QueueFullError, Sampler, Service

from ._promises import KEPT, Answer, GoneError, Model, Promises
from ._wire import prompt_of, written_samples

# Maximum number of sessions per API key, of models per API key, and of samplers per session.
_SESSIONS, _MODELS, _SAMPLERS = 64, 64, 64
_NOT_HERE = ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k")


@dataclass(eq=False)
class Session:
    """Session of a client program. It ends if the client stops sending heartbeats.

    Args:
        key: API key of the client.
        beat: time of the last heartbeat.
        models: models by name.
        samplers: samplers by name, the oldest first.
        asked: responses by name of the sampler and number of the request, for repeated requests.
    """

    key: str
    beat: float = field(default_factory=time.monotonic)
    models: dict[str, Model] = field(default_factory=dict)
    samplers: OrderedDict[str, Sampler] = field(default_factory=OrderedDict)
    asked: OrderedDict[Any, Answer] = field(default_factory=OrderedDict)

    def keep(self, name: str, sampler: Sampler) -> None:
        """Add a sampler. If there are too many, remove the oldest, to free its adapter's memory."""
        self.samplers[name] = sampler
        if len(self.samplers) > _SAMPLERS:
            self.samplers.popitem(last=False)


class Api:
    """State and rules of the API. A client can use only the objects of its API key.

    In the methods, ``key`` is the API key of the client, and ``asked`` is the body of its request.

    Args:
        service: service that trains and samples.
        base: name of the base model in requests.
    """

    def __init__(self, service: Service, base: str):
        self.service, self.base = service, base
        self.promises = Promises()
        self.sessions: dict[str, Session] = {}

    def words_of(self, error: BaseException) -> str:
        """Return the message of an error, with the path of the store removed."""
        words, root = str(error), self.service.store.root
        for place in () if root is None else (root.resolve(), root):
            # A path that only begins with the same letters is kept: /database if the root is /data.
            whole = rf"(?<![\w.-]){re.escape(str(place))}"
            words = re.sub(rf"{whole}{re.escape(os.sep)}", "", words)
            words = re.sub(rf"{whole}(?![\w-]|\.\w)", "the store", words)
        return words

    def create_session(self, key: str, asked: Answer) -> Answer:
        """Create a session; raise QueueFullError if the API key has too many sessions."""
        with self.promises.lock:
            if (found := len(self._of(key)) + 1) > _SESSIONS:
                expected = f"at most {_SESSIONS} sessions per API key"
                raise QueueFullError(f"session: expected {expected}, found {found}")
            name = uuid.uuid4().hex
            self.sessions[name] = Session(key)
        return {"type": "create_session", "session_id": name}

    def _of(self, key: str) -> list[Session]:
        return [each for each in list(self.sessions.values()) if each.key == key]

    def alive(self, key: str, session: Any) -> Session:
        """Return the session of an API key; raise GoneError if the key has no such session."""
        found = self.sessions.get(session)
        if found is None or found.key != key:
            raise GoneError(f"session_id: expected an open session, found {session!r:.200}")
        return found

    def end(self, name: str, wait: bool = False) -> None:
        """End a session: drop the waiting calls of its models, and save their adapters.

        With ``wait``, the method returns after the adapters have been saved.
        """
        with self.promises.lock:
            session = self.sessions.pop(name, None)
            models = {} if session is None else dict(session.models)
        for each, model in models.items():
            last = folder(session.key, each, "weights", "last") if session else None
            model.tenant.close(wait, save_as=last)

    def pass_time(self, silence: float) -> list[str]:
        """Start calls that have waited long enough for a missing earlier call.

        Returns the names of the sessions without a heartbeat for more than ``silence`` seconds.
        """
        with self.promises.lock:
            for session in self.sessions.values():
                for model in session.models.values():
                    model.pump()
            now = time.monotonic()
            return [name for name, each in self.sessions.items() if now - each.beat > silence]

    def model(self, key: str, name: Any) -> tuple[Session, Model]:
        """Return a model of an API key and its session; raise GoneError if the key lacks it."""
        with self.promises.lock:
            for session in self._of(key):
                if name in session.models:
                    return session, session.models[name]
        raise GoneError(f"model_id: expected a model of this API key, found {name!r:.200}")

    def in_order(self, key: str, asked: Answer, begin: Any, told: Any) -> Answer:
        """Run a model's call in the order of sequence numbers; return a promise of its response.

        For ``begin`` and ``told``, see :meth:`Promises.in_order`.
        """
        model = self.model(key, asked["model_id"])[1]
        return self.promises.in_order(key, model, asked.get("seq_id"), begin, told)

    def create_model(self, key: str, asked: Answer) -> Answer:
        """Start to create a model, or to load one from a checkpoint; return a promise of the
        response."""
        session = self.alive(key, asked["session_id"])
        name = f"{asked['session_id']}:train:{asked['model_seq_id']}"
        if (count := sum(len(each.models) for each in self._of(key)) + 1) > _MODELS:
            raise ValueError(f"model: expected at most {_MODELS} models per API key, found {count}")
        path = parsed(key, asked["path"]) if "path" in asked else None  # of a load_weights request
        if path is None:
            self.check_base(asked.get("base_model"))
        lora = asked.get("lora_config") or {}

        def make() -> Answer:
            if name not in session.models:
                if path is None:
                    rank, seed = lora.get("rank", 32), lora.get("seed") or 0
                    with renamed("create_model", targets="train_attn, train_mlp"):
                        tenant = self.service.create(rank, seed, targets=self._targets(lora))
                else:
                    tenant = self.service.load(path)
                    if not asked.get("optimizer", True):
                        tenant.restore(path, optimizer=False)
                with self.promises.lock:
                    lives = self.sessions.get(asked["session_id"]) is session
                    kept = session.models.setdefault(name, Model(tenant)) if lives else None
                # The session has ended meanwhile, or a repeated request was faster.
                if kept is None or kept.tenant is not tenant:
                    tenant.close(wait=False)
            kind = "create_model" if path is None else "load_weights"
            return {"type": kind, "model_id": name, "path": asked.get("path")}

        return self.promises.at_once(key, make)

    def _targets(self, lora: Answer) -> list[str]:
        """Return the names of the linear layers to train.

        ``train_attn`` and ``train_mlp`` in the request select layers. The head is never trained.
        """
        found, head = set(), self.service.model.get_output_embeddings()
        for name, module in self.service.model.named_modules():
            inside = name.partition(".base_layer")[0].partition(".lora_")[0]
            if isinstance(module, torch.nn.Linear) and module is not head:
                attention = "att" in inside.rpartition(".")[0].rpartition(".")[2]
                if lora.get("train_attn" if attention else "train_mlp", True):
                    found.add(inside)
        return sorted(found)

    def check_base(self, name: Any) -> None:
        """Raise ValueError unless ``name`` is the base model of this server."""
        there = isinstance(name, str) and os.path.isdir(name) and os.path.isdir(self.base)
        if name != self.base and not (there and os.path.samefile(name, self.base)):
            raise ValueError(f"base_model: expected {self.base!r}, found {name!r:.200}")

    def sampler(self, key: str, asked: Answer) -> Sampler:
        """Return a new sampler of a checkpoint, or of the base model."""
        if asked.get("model_path"):
            return self.service.sampler(parsed(key, asked["model_path"], "model_path"))
        self.check_base(asked.get("base_model"))
        return self.service.sampler()

    def samplers(self, key: str, name: Any) -> tuple[Session, Sampler]:
        """Return a sampler of an API key and its session; raise GoneError if the key lacks it."""
        for session in self._of(key):
            if name in session.samplers:
                return session, session.samplers[name]
        raise GoneError(f"sampling_session_id: expected an id of this API key, found {name!r:.200}")

    def asample(self, key: str, asked: Answer) -> Answer:
        """Return a promise of samples; a repeated ``seq_id`` returns the earlier promise."""
        name, number = asked.get("sampling_session_id"), asked.get("seq_id")
        session, sampler = self.samplers(key, name) if name else (None, self.sampler(key, asked))
        if session is not None and (name, number) in session.asked:
            return session.asked[name, number]
        for field_ in _NOT_HERE:
            if asked.get(field_):
                raise ValueError(f"{field_}: expected 0, found {asked[field_]}")
        how, count = asked.get("sampling_params") or {}, asked.get("num_samples")
        count = 1 if count is None else count
        prompt, stop = prompt_of(asked["prompt"]), how.get("stop")
        names = ("temperature", "top_p", "top_k", "seed")
        settings = {each: how[each] for each in names if how.get(each) is not None}
        most = how.get("max_tokens")
        most = max(1, sampler.context - len(prompt)) if most is None else most
        begun = sampler.begin(prompt, most, count, stop=() if stop is None else stop, **settings)

        def told() -> bytes:
            of_prompt = sampler.logprobs(prompt) if asked.get("prompt_logprobs") else None
            return written_samples([each.result() for each in begun], of_prompt)

        answer = self.promises.at_once(key, told)
        answer["sample_sequence_ids"] = [uuid.uuid4().hex for _ in range(count)]
        if session is not None and number is not None:
            session.asked[name, number] = answer
            if len(session.asked) > KEPT:
                session.asked.popitem(last=False)
        return answer


def folder(key: str, model: str, kind: str, name: str) -> str:
    """Return a checkpoint's path, relative to the store. Each API key has a separate folder."""
    owner = hashlib.sha256(key.encode()).hexdigest()[:24]
    return os.path.join(owner, model.replace(":", "-"), kind, name)


def parsed(key: str, uri: Any, field_: str = "path") -> str:
    """Return the path in the store for a URI ``tinker://MODEL/weights/NAME``.

    The ValueError for an invalid URI contains ``field_``, the name of the request's field.
    """
    parts = uri.removeprefix("tinker://").split("/", 2) if isinstance(uri, str) else []
    known = len(parts) == 3 and parts[1] in ("weights", "sampler_weights")
    if not (known and uri.startswith("tinker://")):
        raise ValueError(f"{field_}: expected tinker://MODEL/weights/NAME, found {uri!r:.200}")
    return folder(key, *parts)
