"""Start of a server from its settings, which are checked before the model is read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvicorn

from lora_ext._checks import instance, integer, require
from lora_ext.layers import packing
from lora_ext.serving import Embedder, Engine, pooling_of, preparation_of

from .app import make_app

_WHERE = "serve"
_SLOW = 1.0  # seconds for clients to read the end of their response when the server stops
_OLDEST = (5, 24)  # oldest version of transformers in the extra `serve`


@dataclass(frozen=True)
class Settings:
    """Settings of a server.

    Args:
        model: a folder with a transformers or sentence-transformers model and its tokenizer.
        adapters: the folder of all adapters, each in a subfolder of its name.
        host, port: address of the server. Port 0 is any free port.
        device: None uses a GPU if torch finds one.
        max_requests: most waiting and running requests.
        max_rank: largest rank of an adapter.
        context: most tokens of prompt and answer of a request.
        max_body: most bytes of a request's body.
        origins: origins of web pages that may send requests (CORS).
        pack: keep a packed copy of the base for decoding on a CPU, if it takes at most a quarter of
            the free memory.
    """

    model: str | os.PathLike[str]
    adapters: str | os.PathLike[str]
    host: str = "127.0.0.1"
    port: int = 8000
    device: str | None = None
    max_requests: int = 64
    max_rank: int = 64
    context: int = 4096
    max_body: int = 1 << 20
    origins: Sequence[str] = ()
    pack: bool = True

    def check(self) -> None:
        """Check the settings before the model is read.

        Raises:
            ValueError: If an argument is invalid; the message names it.
        """
        import transformers

        found = transformers.__version__
        new = tuple(map(int, found.split(".")[:2])) >= _OLDEST
        require(new, _WHERE, "transformers", "5.24 or newer", found)
        for name in ("model", "adapters"):
            instance(_WHERE, f"--{name}", getattr(self, name), (str, os.PathLike))
            folder = Path(getattr(self, name))
            require(folder.is_dir(), _WHERE, f"--{name}", "a folder", f"{str(folder)!r:.200}")
        there = (Path(self.model) / "config.json").is_file()
        found = f"no config.json in {str(self.model)!r:.200}"
        require(there, _WHERE, "--model", "a folder of transformers", found)
        instance(_WHERE, "--host", self.host, str)
        integer(_WHERE, "--port", self.port, 0, 65535, expected="0 to 65535")
        for name in ("max_requests", "max_rank", "context", "max_body"):
            value, words = getattr(self, name), ("an integer, at least 1", "at least 1")
            integer(_WHERE, f"--{name.replace('_', '-')}", value, 1, expected=words)
        instance(_WHERE, "--allow-origin", self.origins, (list, tuple))  # a str is a sequence too
        if self.device is not None:
            try:
                torch.empty(0, device=self.device)
            except (RuntimeError, AssertionError) as error:
                found = f"{self.device!r} ({str(error).splitlines()[0]})"
                expected = "expected a device of this machine"
                raise ValueError(f"{_WHERE}: --device: {expected}, found {found}") from error

    def listen(self) -> socket.socket:
        """Return a socket bound to host and port.

        Raises:
            ValueError: If the address is in use or not allowed.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((self.host, self.port))
        except OSError as error:
            listening.close()
            raise ValueError(
                f"{_WHERE}: --host, --port: expected an address that is free, found "
                f"{self.host}:{self.port} ({error.strerror or error})"
            ) from error
        return listening

    def engine(self, say: Callable[[str], None] = print) -> Engine | Embedder:
        """Read model and tokenizer; an embedding model gives an :class:`Embedder`.

        Args:
            say: function that prints a line about the memory of the packed copy.
        """
        from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

        embeds = embedding_of(self.model)
        kind: Any = AutoModelForCausalLM if embeds is None else AutoModel
        tokenizer = AutoTokenizer.from_pretrained(self.model, local_files_only=True)
        model = kind.from_pretrained(self.model, local_files_only=True).eval()
        default = "cuda" if torch.cuda.is_available() else "cpu"
        model = model.to(default if self.device is None else self.device)
        how: dict[str, Any] = {
            name: getattr(self, name) for name in ("max_requests", "max_rank", "context")
        }
        if embeds is None:
            if self.pack:
                found = packing(model)
                say(f"{found}{'; --no-pack leaves it plain' if found.fits else ''}")
                how["pack_base"] = found.fits
            return Engine(model, tokenizer, self.adapters, **how)
        pooling, normalize = embeds
        how |= {"pooling": pooling, "normalize": normalize}
        how["preparation"] = preparation_of(self.model)
        return Embedder(model, tokenizer, self.adapters, **how)


def embedding_of(folder: str | os.PathLike[str]) -> tuple[str, bool] | None:
    """Return the pooling of an embedding model, and whether its vectors are normalised.

    Returns None for a model that generates. Our choice: the mean, normalised, if the folder does
    not specify the pooling.

    Raises:
        ValueError: As :func:`~lora_ext.serving.pooling_of`.
    """
    said = pooling_of(folder)
    if said is not None:
        return said
    config = json.loads((Path(folder) / "config.json").read_text())
    kinds = config.get("architectures") or ["ForCausalLM"]
    generates = any("ForCausalLM" in k or "ForConditionalGeneration" in k for k in kinds)
    return None if generates else ("mean", True)


class _Server(uvicorn.Server):
    """Server that fails running requests at shutdown before it waits for connections."""

    def __init__(
        self, config: uvicorn.Config, begins: Callable[[], None], interrupt: Callable[[], None]
    ):
        super().__init__(config)
        self._begins, self._interrupt = begins, interrupt

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._begins()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._interrupt()
        hang_up = asyncio.get_running_loop().call_later(_SLOW, self._hang_up)
        await super().shutdown(sockets)
        hang_up.cancel()

    def _hang_up(self) -> None:
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()


def run(
    config: uvicorn.Config,
    listening: socket.socket,
    begins: Callable[[], None],
    interrupt: Callable[[], None] = lambda: None,
) -> None:
    """Serve an application at a socket until Ctrl-C or SIGTERM.

    Args:
        config: the configuration, with the application.
        listening: the socket.
        begins: called once the server accepts requests.
        interrupt: called at shutdown, before the server waits for connections.

    Raises:
        KeyboardInterrupt: After SIGINT, even if the process started with SIGINT ignored. Shells
            start background jobs that way.
    """
    with _sigint_raises():
        _Server(config, begins, interrupt).run([listening])


@contextlib.contextmanager
def _sigint_raises() -> Iterator[None]:
    """Make SIGINT raise KeyboardInterrupt inside the block if the process ignores SIGINT."""
    in_main = threading.current_thread() is threading.main_thread()  # only it can set handlers
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def serve(settings: Settings, say: Callable[[str], None] = print) -> None:
    """Serve until Ctrl-C or SIGTERM; running requests then end with an error in two seconds.

    Args:
        settings: the settings.
        say: function that prints a line about the memory of the packed copy, and one once the
            server accepts requests.

    Raises:
        ValueError: If a setting is invalid.
        KeyboardInterrupt: After Ctrl-C.
    """
    settings.check()
    with settings.listen() as listening, settings.engine(say) as engine:
        base = Path(os.path.abspath(settings.model)).name  # of a link, the name of the link
        app = make_app(engine, base, settings.max_body, settings.origins)
        config = uvicorn.Config(app, timeout_graceful_shutdown=2)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        where = f"http://{host}:{listening.getsockname()[1]}/v1"

        def begins() -> None:
            say(f"{base} with {len(engine.folder.names())} adapters answers at {where}")

        run(config, listening, begins, engine.interrupt)
