"""Wrap the prose of Markdown pages at 100 columns: `python tools/wrap_docs.py [PAGE ...]`.

Headings, tables, code, HTML and pictures keep their lines; a list keeps its items. Nothing but
line breaks changes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

WIDTH = 100
_ITEM = re.compile(r"^( *)([*+-]|\d+[.)]) +")
_FENCE = re.compile(r"^ *(```+|~~~+)")
#: Lines that are no prose: headings, tables, pictures, HTML, requests of mkdocstrings, rules.
_WHOLE = re.compile(r"^ *(#|\||!\[|<|:::|---+$|===+$|\[[^\]]+\]: )")


def prose(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are wrapped, with their numbers."""
    fence = ""
    for number, line in enumerate(text.split("\n"), 1):
        mark = _FENCE.match(line)
        if mark and (not fence or mark[1].startswith(fence)):
            fence = "" if fence else mark[1]
        elif not fence and not _WHOLE.match(line):
            yield number, line


def wrapped(text: str) -> str:
    """The text with its paragraphs and items wrapped."""
    out: list[str] = []
    paragraph: list[str] = []
    fence = ""

    def flush() -> None:
        if paragraph:
            out.extend(_wrap(paragraph))
            paragraph.clear()

    for line in text.split("\n"):
        mark = _FENCE.match(line)
        if fence or mark:
            flush()
            if mark and not fence:
                fence = mark[1]
            elif mark and mark[1].startswith(fence):
                fence = ""
            out.append(line)
        elif not line.strip() or _WHOLE.match(line) or line.startswith("    options:"):
            flush()
            out.append(line)
        elif _ITEM.match(line):
            flush()
            paragraph.append(line)
        else:
            paragraph.append(line)
    flush()
    return "\n".join(out)


def _wrap(lines: list[str]) -> list[str]:
    first = lines[0]
    item = _ITEM.match(first)
    start = first[: len(item[0])] if item else first[: len(first) - len(first.lstrip())]
    rest = " " * len(start)
    words = _words(" ".join([first[len(start) :], *lines[1:]]))
    out, line = [], start
    for word in words:
        room = line if line.strip() == start.strip() else line + " "
        if len(room) + len(word) > WIDTH and line.strip() != start.strip():
            out.append(line)
            line = rest + word
        else:
            line = room + word
    return [*out, line]


def _words(text: str) -> list[str]:
    """Words, with code and links kept in one piece where that fits a line."""
    words: list[str] = []
    for word in text.split():
        if words and _open(words[-1]) and len(words[-1]) + len(word) < WIDTH - 10:
            words[-1] += f" {word}"
        else:
            words.append(word)
    return _not_as_marks(words)


def _open(word: str) -> bool:
    return word.count("`") % 2 == 1


def _not_as_marks(words: list[str]) -> list[str]:
    """A word that would begin a list or a table at the start of a line stays with its neighbour."""
    kept: list[str] = []
    for word in words:
        if kept and re.fullmatch(r"[*+-]|\d+[.)]|#+|\||>|=+|-+", word):
            kept[-1] += f" {word}"
        else:
            kept.append(word)
    return kept


def main(names: list[str]) -> int:
    root = Path(__file__).resolve().parents[1]
    pages = [Path(n) for n in names] or [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    for page in pages:
        text = page.read_text()
        if (new := wrapped(text)) != text:
            page.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
