"""Wrap the prose of Markdown pages at 100 columns: `python tools/wrap_docs.py [PAGE ...]`.

Headings, tables, code, HTML and pictures keep their lines; a list keeps its items. Only line breaks
change; mdformat would also rewrite lists, tables and escapes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

WIDTH = 100
_ITEM = re.compile(r"^( *)([*+-]|\d+[.)]) +")
_FENCE = re.compile(r"^ *(```+|~~~+)")
#: Lines that are not prose: headings, tables, pictures, HTML, requests of mkdocstrings, rules.
_WHOLE = re.compile(r"^ *(#|\||!\[|<|:::|---+$|===+$|\[[^\]]+\]: )")


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that are wrapped, with their numbers."""
    for number, (line, wraps) in enumerate(_lines(text), 1):
        if wraps:
            yield number, line


def _lines(text: str) -> Iterator[tuple[str, bool]]:
    """Yield every line, and whether it is prose."""
    fence, before, in_list = "", "", False
    for line in text.split("\n"):
        mark = _FENCE.match(line)
        if fence or mark:
            yield line, False
            if mark and (not fence or mark[1].startswith(fence)):
                fence = "" if fence else mark[1]
        else:
            in_list = bool(_ITEM.match(line)) or (in_list and (not line or line[0] == " "))
            code = line.startswith("    ") and not in_list and not before
            yield line, bool(line.strip()) and not code and not _WHOLE.match(line)
            if code:
                continue  # a following indented line is code as well
        before = line.strip()


def paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs, and the items of lists, each on one line."""
    for lines, is_prose in _blocks(text):
        if is_prose:
            yield " ".join(line.strip() for line in lines)


def wrapped(text: str) -> str:
    """Return the text with its paragraphs and items wrapped."""
    blocks = (_wrap(lines) if is_prose else lines for lines, is_prose in _blocks(text))
    return "\n".join(line for lines in blocks for line in lines)


def _blocks(text: str) -> Iterator[tuple[list[str], bool]]:
    """Yield each paragraph or list item as a list of lines, and every other line by itself.

    The second element of a pair is whether the lines are prose.
    """
    paragraph: list[str] = []
    for line, wraps in _lines(text):
        if paragraph and (not wraps or _ITEM.match(line)):
            yield paragraph, True
            paragraph = []
        if wraps:
            paragraph.append(line)
        else:
            yield [line], False
    if paragraph:
        yield paragraph, True


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
    """Return the words of a text; code is kept in one piece if it fits a line."""
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
    """Return the words; one that would begin a list or table is joined to the word before it."""
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
