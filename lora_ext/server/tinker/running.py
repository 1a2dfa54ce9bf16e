"""Command-line program that runs the server of Tinker's API."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from lora_ext.tenants import Service

from .._running import Settings, run
from .app import make_app


def main(argv: Sequence[str] | None = None) -> None:
    """Run the server until Ctrl-C or SIGTERM.

    The address is printed when the server begins to accept requests.

    Args:
        argv: command-line arguments; None uses the arguments of the process.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description="A server of Tinker's API on one machine.")
    parser.add_argument("--model", type=Path, required=True, help="folder of a transformers model")
    parser.add_argument("--store", type=Path, required=True, help="folder for all saved adapters")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 uses a free port")
    parser.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    parser.add_argument("--keys", type=Path, help="file of API keys, one per line (default: any)")
    args = parser.parse_args(argv)
    settings, keys = Settings(args.model, args.store, args.host, args.port), None
    try:
        args.store.mkdir(parents=True, exist_ok=True)
        settings.check()
        if args.keys is not None:
            keys = {line.strip() for line in args.keys.read_text().splitlines()} - {""}
        listening = settings.listen()
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    except ValueError as error:
        parser.error(str(error).replace("--adapters", "--store"))
    with listening:
        model = AutoModelForCausalLM.from_pretrained(args.model).eval()
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.model)
        except (OSError, ValueError, KeyError):
            tokenizer = None  # Requests with a stop text are then rejected.
        with Service(model, store=args.store, tokenizer=tokenizer) as service:
            app = make_app(service, str(args.model), keys)
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
            host, port = listening.getsockname()[:2]

            def begins() -> None:
                print(f"listening on http://{host}:{port}", flush=True)

            run(config, listening, begins)
