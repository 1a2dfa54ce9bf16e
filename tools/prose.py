"""Measure the English of docstrings, messages and pages; exit with 1 if a total misses its limit.

``python tools/prose.py`` prints one line per folder of ``lora_ext``, and the totals of code and of
the pages in ``docs``; ``--json`` prints the totals as one object. ``--file FILE`` lists the
findings of one file, ``--list N`` a random sample, ``--change BASE`` those on lines added since a
commit, and ``--md`` one line per page. Another root folder can be given. Only totals have limits,
since a single finding may be a false alarm. ``docs/contributing.md`` has the rules.

For comparison (2026-11), the share of functions whose docstring opens with a verb, and the number
of docstrings with a doubtful phrase: flwr 91 %, 4; torch.nn 86 %, 2; fastapi 86 %, 0;
huggingface_hub 83 %, 25; numpy 78 %, 38 of 2,096; peft 70 %, 16 of 693.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]

LEAST_VERBS = 0.85  # share of functions whose docstring opens with a verb
MOST_DIALECT = 20  # docstrings with a doubtful phrase
MOST_DIALECT_OF_PAGES = 0.3  # phrases per 1,000 words, over all pages
MOST_WORDS = 30_000  # words on pages outside docs/notes and docs/reference
MOST_MUTE = 200  # messages of `raise` that do not contain a value

VERBS = set(
    """abort accept access accumulate activate adapt add adjust advance aggregate allocate allow
    annotate append apply approximate archive argmax arrange ascend ask assemble assert assign
    associate attach average backpropagate balance bind block bound broadcast build bypass cache
    calculate call cancel capture cast change check choose clamp clean clear clip clone close
    collapse collect combine compare compile complete compose compress compute concatenate
    condition configure confirm connect constrain construct consume contract convert copy
    correct count cover create cut decode decompose decorate decrease deduplicate defer define
    delay delete dequantise dequantize derive describe deserialize detach detect determine
    differentiate disable discard dispatch display distil distill distribute divide do download
    draft draw drive drop dump embed emit enable encode end enforce ensure enter enumerate
    estimate evaluate evict exclude execute exit expand expect explain export expose express
    extend extract factor fail fetch fill filter find finish fit fix flatten fold follow force
    format forward free freeze fuse gather generate get give group guard handle hash hide hold
    identify ignore implement import increase index infer initialise initialize inject insert
    inspect install instantiate integrate interleave interpolate intersect invert invoke iterate
    join keep label launch lay learn leave lift limit link list load lock log look lower make
    map marginalise marginalize mark mask match materialise materialize measure merge mix modify
    monitor move multiply name negate normalise normalize note notify observe obtain offload
    open optimise optimize order override pack pad parse partition pass patch perform permute
    persist pick pin place plan plot point pop postpone predict prefix prepare preserve prevent
    print process produce profile project propagate prove provide prune publish pull push put
    quantise quantize query queue raise rank read rebuild receive recompute reconstruct record
    recover reduce refer refill refine refresh refuse register reject relabel release reload
    remember remove rename render reorder repeat replace replay report represent request require
    rescale reserve reset reshape resize resolve restore restrict resume retrieve retry return
    reuse reverse rewrite roll rotate round route run sample save scale scan scatter schedule
    score search select send separate serialise serialize serve set shard share shift show
    shrink shuffle simplify simulate skip slice snapshot solve sort specialise specify split
    stack start state step stop store stream strip submit subtract sum summarise summarize swap
    switch sync synchronise synchronize take tell terminate test tie time tokenise tokenize
    track train transfer transform translate transpose traverse trim truncate try tune turn
    uncompress undo unfold unfreeze unify uninstall unload unlock unmerge unpack unpin
    unregister unwrap update upgrade upload use validate verify view wait walk warn weigh weight
    widen wrap write yield zero""".split()
)
ADVERBS = {"recursively", "lazily", "atomically", "randomly", "greedily", "safely", "exactly"}
ADVERBS |= {"approximately", "context", "decorator"}

# Phrases that hide who does what; in docstrings, only the first paragraph is searched.
DIALECT = {
    "opens with a relative clause": (
        r"^(What|Who|How|Where|Those|That|Which|As|Of|For|With|Without|Until|Nothing|Nobody|None"
        r"|One)\b"
    ),
    "'Whether' without 'Return'": r"^Whether\b",
    "who": r"\b(who|whom|whose|nobody|somebody|anybody|everybody)\b",
    "told / says / speaks": (
        r"\b(is told|are told|was told|told apart|tells apart|speaks? for|has a say|says so|goes by"
        r"|go by|asks for itself)\b"
    ),
    "that is / that are at the end": r"\b(that|which) (is|are|was|were)[.,;:]?$",
    "of X's own": r"\bof (its|their|his|an?|the \w+) own\b|\bof \w+'s own\b",
    "none that": r"\b(is|are) none\b|\bfound others\b|\bfound as many\b|\bfound larger ones\b",
    "stands in": r"\b(stands? in|stand-in|comes? to stand|lies? in|live[sd]? with)\b",
    "reversed object": r"\b(gives? back what|what (was|is|were|are) \w+ed? (is|are|was|were))\b",
}


class Finding(NamedTuple):
    """One docstring of a function or class."""

    place: str  # file:line: name
    line: int
    opening: str  # first paragraph
    reasons: list[str]  # empty if the docstring reads well
    is_noun: bool  # True for classes and properties, whose docstrings open with a noun


def opens_with_verb(text: str) -> bool:
    words = [w.lower() for w in re.findall(r"[A-Za-z][A-Za-z\-]*", text.split("\n\n")[0])[:3]]
    if words and words[0] in ADVERBS:
        words = words[1:]
    if not words:
        return False
    first = words[0]
    return bool({first, first.removesuffix("s"), first.removesuffix("es")} & VERBS)


def findings(path: Path) -> Iterator[Finding]:
    """Yield every docstring of a Python file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        text = ast.get_docstring(node)
        if not text:
            continue
        decorators = {ast.unparse(d).split(".")[-1] for d in node.decorator_list}
        is_noun = isinstance(node, ast.ClassDef) or bool(
            decorators & {"property", "cached_property", "setter"}
        )
        opening = " ".join(text.split("\n\n")[0].split())
        reasons = [] if is_noun or opens_with_verb(text) else ["no verb"]
        reasons += [label for label, pattern in DIALECT.items() if re.search(pattern, opening)]
        place = f"{path}:{node.lineno}: {node.name}"
        yield Finding(place, node.lineno, opening, reasons, is_noun)


def mute_messages(path: Path) -> Iterator[str]:
    """Yield the place of each ``raise`` of a plain text, which cannot contain a value."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            message = node.exc.args[0]
            if isinstance(message, ast.Constant) and isinstance(message.value, str):
                yield f"{path}:{node.lineno}: {message.value}"


def count_code(root: Path) -> dict[str, Counter[str]]:
    """Return the numbers of docstrings and messages in each folder of ``root``."""
    folders: dict[str, Counter[str]] = {}
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root).parts
        count = folders.setdefault(inside[0] if len(inside) > 1 else "(top)", Counter())
        for found in findings(path):
            count["functions"] += not found.is_noun
            count["verbs"] += not found.is_noun and "no verb" not in found.reasons
            count["dialect"] += any(reason != "no verb" for reason in found.reasons)
        count["mute"] += len(list(mute_messages(path)))
    return folders


def count_pages(root: Path) -> dict[str, Counter[str]]:
    """Return the numbers of words, sentences and doubtful phrases of each page, without code and
    tables."""
    pages: dict[str, Counter[str]] = {}
    for path in sorted(root.rglob("*.md")):
        text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
        text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("|"))
        phrases = [p for p in DIALECT.values() if not p.startswith("^")]
        pages[str(path.relative_to(root))] = Counter(
            words=len(text.split()),
            sentences=max(1, len(re.findall(r"[.!?](\s|$)", text))),
            dialect=sum(len(re.findall(phrase, text)) for phrase in phrases),
        )
    return pages


def totals(code: dict[str, Counter[str]], pages: dict[str, Counter[str]]) -> dict[str, float]:
    """Return the numbers that have limits."""
    total = sum(code.values(), Counter())
    every = sum(pages.values(), Counter())
    public = [c for page, c in pages.items() if not page.startswith(("notes/", "reference/"))]
    return {
        "functions": total["functions"],
        "verb_share": total["verbs"] / max(1, total["functions"]),
        "dialect": total["dialect"],
        "messages_without_value": total["mute"],
        "docs_per_1000": 1000 * every["dialect"] / max(1, every["words"]),
        "words": sum(c["words"] for c in public),
    }


def missed(found: dict[str, float]) -> list[str]:
    """Return the totals that miss their limit, in words."""
    limits = {
        "dialect": MOST_DIALECT,
        "messages_without_value": MOST_MUTE,
        "docs_per_1000": MOST_DIALECT_OF_PAGES,
        "words": MOST_WORDS,
    }
    over = [
        f"{k}: expected at most {v}, found {found[k]:g}" for k, v in limits.items() if found[k] > v
    ]
    share = found["verb_share"]
    if share < LEAST_VERBS:
        over.append(f"verb_share: expected at least {LEAST_VERBS}, found {share:.3f}")
    return over


def print_code(code: dict[str, Counter[str]]) -> None:
    print(f"{'':16} functions  open with a verb  docstrings in dialect  messages without a value")
    for folder, c in {**code, "all": sum(code.values(), Counter())}.items():
        share = c["verbs"] / max(1, c["functions"])
        print(f"{folder:16} {c['functions']:9}  {share:15.0%}  {c['dialect']:21}  {c['mute']:24}")


def print_pages(pages: dict[str, Counter[str]]) -> None:
    print(f"{'page':40} words  words per sentence  dialect per 1,000 words")
    for page, c in pages.items():
        per_sentence, share = c["words"] / c["sentences"], 1000 * c["dialect"] / max(1, c["words"])
        print(f"{page:40} {c['words']:5}  {per_sentence:18.1f}  {share:23.1f}")


def print_change(root: Path, base: str) -> None:
    """Print the findings whose definition or docstring begins on a line added since ``base``."""
    command = ["git", "diff", "-U0", base, "--", str(root)]
    diff = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    added: dict[Path, set[int]] = {}
    path = None
    for line in diff.splitlines():
        if line.startswith("+++ "):
            path = Path(line[6:]) if line.endswith(".py") else None
        elif path and (hunk := re.match(r"@@ \S+ \+(\d+)(?:,(\d+))?", line)):
            start, count = int(hunk[1]), int(hunk[2] or 1)
            added.setdefault(path, set()).update(range(start, start + count))
    new = [
        found
        for path, lines in added.items()
        if path.is_file()
        for found in findings(path)
        if lines & {found.line, found.line + 1}
    ]
    print(f"{sum(bool(f.reasons) for f in new)} of {len(new)} docstrings added since {base}:")
    print_findings(new)


def print_findings(found: list[Finding]) -> None:
    for f in found:
        if f.reasons:
            print(f"{f.place}: {f.opening[:140]}   [{', '.join(f.reasons)}]")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, nargs="?", default=ROOT / "lora_ext")
    parser.add_argument("--list", type=int, default=0, metavar="N")
    parser.add_argument("--file", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample of --list")
    parser.add_argument("--md", action="store_true", help="print the pages below the root")
    parser.add_argument("--change", metavar="BASE")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.file:
        print_findings(list(findings(args.file)))
        print(*mute_messages(args.file), sep="\n")
        return 0
    if args.change:
        print_change(args.root, args.change)
        return 0
    if args.md:
        print_pages(count_pages(args.root if any(args.root.rglob("*.md")) else ROOT / "docs"))
        return 0
    code, pages = count_code(args.root), count_pages(ROOT / "docs")
    found = totals(code, pages)
    if args.json:
        print(json.dumps(found))
        return 0
    print_code(code)
    print(*(f"{name} {value:.5g}" for name, value in found.items()), sep=", ")
    if args.list:
        every = [f for path in sorted(args.root.rglob("*.py")) for f in findings(path) if f.reasons]
        print_findings(random.Random(args.seed).sample(every, min(args.list, len(every))))
    over = missed(found) if args.root == ROOT / "lora_ext" else []
    print(*over, sep="\n", end="\n" if over else "")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
