"""Settings of a server, which are checked before the model is read, and functions to run it."""

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

from lora_ext._checks import choice, instance, integer, number, require
from lora_ext.layers import exact, packing
from lora_ext.serving import Embedder, Engine, pooling_of, preparation_of

from .app import make_app

_WHERE = "serve"
_SLOW = 1.0  # seconds for which the server waits at shutdown for clients to read their responses
_OLDEST = (5, 24)  # oldest version of transformers in the extra `serve`


@dataclass(frozen=True)
class Settings:
    """Settings of a server.

    Args:
        model: folder of a transformers or sentence-transformers model with its tokenizer.
        adapters: folder of all adapters. Each adapter is in a subfolder with its name.
        host: address on which the server listens.
        port: port on which the server listens; 0 is any free port.
        device: torch device of the model. None is "cuda" if torch finds a GPU, otherwise "cpu".
        max_requests: maximum number of waiting and running requests.
        max_rank: maximum rank of an adapter.
        lora_dtype: dtype of the adapters in memory. "auto": that of the model; "float8_e4m3fn":
            half the bytes of 16 bits, with rounded values, see :class:`~lora_ext.AdapterPool`.
        context: maximum number of tokens of a request's prompt and answer.
        max_body: maximum size of a request's body in bytes.
        origins: origins of web pages that may send requests (CORS).
        pack: packed copy of the base model, with which a CPU may decode faster. "auto": a copy if
            it is faster on this machine; "plain": always a copy; "8", "4": a copy with 8 or 4 bits
            per weight; "none": no copy. No copy is made if it would take more than a quarter of the
            free memory.
        exact: whether to make the model :func:`exact <lora_ext.exact>`, so that log-probabilities
            are bitwise equal to those of a trainer's forward. The model must be on the CPU.
        max_loaded_bytes, host_cache_bytes, max_wait_s: see :class:`~lora_ext.serving.Engine`
            and, for an embedding model, :class:`~lora_ext.serving.Embedder`.
    """

    model: str | os.PathLike[str]
    adapters: str | os.PathLike[str]
    host: str = "127.0.0.1"
    port: int = 8000
    device: str | None = None
    max_requests: int = 64
    max_rank: int = 64
    lora_dtype: str = "auto"
    context: int = 4096
    max_body: int = 1 << 20
    origins: Sequence[str] = ()
    pack: str = "auto"
    exact: bool = False
    max_loaded_bytes: int | None = None
    host_cache_bytes: int = 1 << 30
    max_wait_s: float = 3.0

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
        require(there, _WHERE, "--model", "a folder of a transformers model", found)
        instance(_WHERE, "--host", self.host, str)
        integer(_WHERE, "--port", self.port, 0, 65535, expected="0 to 65535")
        counts = ["max_requests", "max_rank", "context", "max_body", "host_cache_bytes"]
        counts += [] if self.max_loaded_bytes is None else ["max_loaded_bytes"]
        for name in counts:
            least = 0 if name == "host_cache_bytes" else 1
            words = f"an integer, at least {least}", f"at least {least}"
            flag = f"--{name.replace('_', '-')}"
            integer(_WHERE, flag, getattr(self, name), least, expected=words)
        choice(_WHERE, "--pack", self.pack, tuple(PACK))
        # Rounded adapters would not give the bits of a trainer.
        known, words = (("auto",), "auto with --exact") if self.exact else (tuple(DTYPES), None)
        choice(_WHERE, "--lora-dtype", self.lora_dtype, known, expected=words)
        number(_WHERE, "--max-wait-s", self.max_wait_s, 0)
        # A str is not accepted, although it is a sequence: its characters would be the origins.
        instance(_WHERE, "--allow-origin", self.origins, (list, tuple))
        if self.device is not None:
            try:
                torch.empty(0, device=self.device)
            except (RuntimeError, AssertionError) as error:
                found = f"{self.device!r} ({str(error).splitlines()[0]})"
                expected = "expected a device of this machine"
                raise ValueError(f"{_WHERE}: --device: {expected}, found {found}") from error

    def listen(self) -> socket.socket:
        """Return a socket that is bound to the host and port.

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
            found = f"{self.host}:{self.port} ({error.strerror or error})"
            expected = f"expected a free address, found {found}"
            raise ValueError(f"{_WHERE}: --host, --port: {expected}") from error
        return listening

    def engine(self, say: Callable[[str], None] = print) -> Engine | Embedder:
        """Read the model and tokenizer, and return an engine that runs them.

        Args:
            say: function that prints a line about the memory of the packed copy.

        Returns:
            An :class:`Embedder` for an embedding model, otherwise an :class:`Engine`.
        """
        from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

        embeds = embedding_of(self.model)
        kind: Any = AutoModelForCausalLM if embeds is None else AutoModel
        tokenizer = AutoTokenizer.from_pretrained(self.model, local_files_only=True)
        model = kind.from_pretrained(self.model, local_files_only=True).eval()
        model = model.to(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.exact:
            exact(model)
        shared = "max_requests max_rank context max_loaded_bytes host_cache_bytes max_wait_s"
        how: dict[str, Any] = {name: getattr(self, name) for name in shared.split()}
        how["lora_dtype"] = DTYPES[self.lora_dtype]
        if embeds is None:
            pack = PACK[self.pack]
            bits = pack if type(pack) is int else None
            if self.exact or not packing(model, bits=bits).fits:
                pack = False
            engine = Engine(model, tokenizer, self.adapters, pack_base=pack, **how)
            if self.pack != "none" and not self.exact:
                say(f"{packing(model, bits=bits)}; --no-pack disables packing")
            return engine
        how["pooling"], how["normalize"] = embeds
        how["preparation"] = preparation_of(self.model)
        return Embedder(model, tokenizer, self.adapters, **how)


#: Argument ``pack_base`` of :func:`~lora_ext.attach` for each value of ``--pack``.
PACK: dict[str, bool | int | None] = {"auto": None, "none": False, "plain": True, "8": 8, "4": 4}
#: Argument ``dtype`` of :class:`~lora_ext.AdapterPool` for each value of ``--lora-dtype``.
DTYPES = {"auto": None, "float8_e4m3fn": torch.float8_e4m3fn}


def embedding_of(folder: str | os.PathLike[str]) -> tuple[str, bool] | None:
    """Return the pooling of an embedding model, and whether its embeddings are normalised.

    Returns None for a model that generates text. If the folder of an embedding model does not
    specify the pooling, our choice is the normalised mean.

    Raises:
        ValueError: See :func:`~lora_ext.serving.pooling_of`.
    """
    if (said := pooling_of(folder)) is not None:
        return said
    config = json.loads((Path(folder) / "config.json").read_text())
    kinds = config.get("architectures") or ["ForCausalLM"]
    generates = any("ForCausalLM" in k or "ForConditionalGeneration" in k for k in kinds)
    return None if generates else ("mean", True)


class _Server(uvicorn.Server):
    """Uvicorn server that calls ``begins`` after startup and ``interrupt`` before shutdown.

    ``interrupt`` can end the running requests. Connections that are still open ``_SLOW`` seconds
    after the beginning of the shutdown are aborted.
    """

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
    """Serve an application on a socket until Ctrl-C or SIGTERM.

    Args:
        config: uvicorn's configuration, which contains the application.
        listening: bound socket.
        begins: function that is called when the server begins to accept requests.
        interrupt: function that is called at shutdown, before the server waits for connections.

    Raises:
        KeyboardInterrupt: After SIGINT, even if the process was started with SIGINT ignored. Shells
            start background jobs in this way.
    """
    with _sigint_raises():
        _Server(config, begins, interrupt).run([listening])


@contextlib.contextmanager
def _sigint_raises() -> Iterator[None]:
    """Make SIGINT raise KeyboardInterrupt inside the block if the process ignores SIGINT."""
    # Only the main thread can set signal handlers.
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def serve(settings: Settings, say: Callable[[str], None] = print) -> None:
    """Run a server until Ctrl-C or SIGTERM.

    Running requests then end with an error within two seconds.

    Args:
        settings: settings of the server.
        say: function that prints a line. It is called with a line about the memory of the packed
            copy, and with the address when the server begins to accept requests.

    Raises:
        ValueError: If a setting is invalid.
        KeyboardInterrupt: After Ctrl-C.
    """
    settings.check()
    with settings.listen() as listening, settings.engine(say) as engine:
        # Symbolic links are not resolved, so the name of a link can be the name of the model.
        base = Path(os.path.abspath(settings.model)).name
        app = make_app(engine, base, settings.max_body, settings.origins)
        config = uvicorn.Config(app, timeout_graceful_shutdown=2)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        where = f"http://{host}:{listening.getsockname()[1]}/v1"

        def begins() -> None:
            say(f"{base} with {len(engine.folder.names())} adapters answers at {where}")

        run(config, listening, begins, engine.interrupt)
