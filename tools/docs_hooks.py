"""Hooks of mkdocs.yml for a package's names, names in docstrings, and links to files outside docs/.

A reference page contains `::: lora_ext.rows`. It shows the docstring of that package and each name
of its `__all__`: with its docstring if the package defines the name, otherwise as a link.

A docstring names other objects with roles, as editors know them: :func:`lora_ext.attach`. A role
becomes a link if the reference shows the object, otherwise code. A role that names nothing stays an
unresolved reference, and a strict build fails.
"""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

sys.path.append(str(Path(__file__).absolute().parent))  # tools/ is not a package
from examples_run import in_use
from faces import ASKED, ROOT, face, face_file, places, shown

_ROLE = re.compile(r":(?:mod|class|func|meth|attr|data):`(?P<short>~?)(?P<name>[\w.]+)`")
_OUTSIDE = re.compile(r"\[(?P<words>[^\]]*)\]\((?P<path>\.\./[^)#\s]+)\)")
_EXAMPLES = "\n## By example\n"
#: Packages of other projects; they get no links, because a strict build is offline.
_OTHERS = {"torch", "transformers", "peft", "flwr", "vllm", "numpy"}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Expand the ``::: package`` lines of a page; write links to files outside docs/ as text."""
    here = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def path_of(found: re.Match[str]) -> str:
        """Return the words of a link to a file outside docs/, followed by the file's path."""
        path = posixpath.normpath(posixpath.join(here, found["path"]))
        if path.startswith("docs/"):
            return found[0]
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{page.file.src_uri}: {found[0]}: there is no {path}")
        return f"{found['words']} (`{path}`)"

    def written(asked: re.Match[str]) -> str:
        return _written_out(asked["name"], here)

    head, examples, rest = markdown.partition(_EXAMPLES)
    if examples:  # the names that follow get a separate section
        markdown = head + examples + rest.replace("\n::: ", "\n## Names\n\n::: ", 1)
    return _OUTSIDE.sub(path_of, ASKED.sub(written, markdown))


# Classes whose methods are partly in base classes of the same room.
_SPLIT = ("lora_ext.circuits.circuit.Circuit", "lora_ext.circuits.region_graph.RegionGraph")
_INHERITED = "    options: {inherited_members: true}\n"


def _written_out(package: str, here: str) -> str:
    """Return the mkdocstrings text of a package for a page in the folder ``here``."""
    if not face_file(package).exists():
        return f"::: {package}\n"
    names = face(package)
    own = [p for p in dict.fromkeys(names.values()) if shown()[p] == package]
    others = {n: p for n, p in names.items() if p not in own}
    links = [f"* [`{package}.{name}`][{place}]\n" for name, place in others.items()]
    head = f"::: {package}\n    options: {{members: [], show_root_heading: false}}\n\n"
    options = {place: _INHERITED if place in _SPLIT else "" for place in own}
    shown_here = [f"::: {place}\n{options[place]}\n{_example(place, here)}" for place in own]
    return "".join([head, *links, "\n", *shown_here])


def _example(place: str, here: str) -> str:
    """Return a line that links to code in which a name is used, preferably outside the reference.

    Returns an empty text if no tested code uses the name.
    """
    if place not in in_use():
        return ""
    path = min(in_use()[place], key=lambda path: path.startswith("docs/reference/"))
    link = f"`{path}`"
    if path.startswith("docs/"):
        stem = posixpath.splitext(posixpath.basename(path))[0]
        there = "#by-example" if _EXAMPLES in (ROOT / path).read_text() else ""
        link = f"[{stem}]({posixpath.relpath(path, here)}{there})"
    return f"*In use, as a test runs it:* {link}\n\n"


class Roles(griffe.Extension):
    """Extension that turns the roles of docstrings into cross-references of mkdocs."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite every docstring of a loaded package."""
        for here in _objects(pkg):
            if here.docstring is not None:
                here.docstring.value = _ROLE.sub(
                    lambda found, here=here: _reference(found, here, pkg), here.docstring.value
                )


def _objects(here: griffe.Object) -> Iterator[Any]:
    yield here
    for member in here.members.values():
        if not member.is_alias:
            yield from _objects(member)  # pyright: ignore[reportArgumentType]


def _reference(found: re.Match[str], here: Any, package: griffe.Module) -> str:
    name = found["name"]
    short = name.strip(".").rpartition(".")[2] if found["short"] or name[0] == "." else name
    if name.split(".")[0] in _OTHERS:
        return f"`{short}`"
    place = _place(name, here, package)
    if place is None:
        return f"[`{short}`][{name}]"
    owner = place.rpartition(".")[0]
    known = place in shown() or (owner in shown() and not face_file(owner).exists())
    return f"[`{short}`][{place}]" if known else f"`{short}`"


def _place(name: str, here: Any, package: griffe.Module) -> str | None:
    """Return the path of the object that a docstring names, or None."""
    if name.startswith("."):
        return _path(package, f"{here.module.path}{name}")
    if name.startswith("lora_ext"):
        return _path(package, name)
    scope = here
    while scope is not None:  # a class before its module, as Python looks for names
        if (path := _path(package, f"{scope.path}.{name}")) is not None:
            return path
        scope = scope.parent
    # The module does not import the name: search the whole package.
    first, dot, rest = name.partition(".")
    everywhere = (o.path for o in _objects(package) if o.is_class or o.is_function)
    homes = [p for p in (*shown(), *everywhere) if p.rpartition(".")[2] == first]
    return _path(package, f"{homes[0]}{dot}{rest}") if homes else None


def _path(package: griffe.Module, name: str) -> str | None:
    """Return the canonical path of a dotted name, through re-exports and base classes."""
    here: Any = package
    parts = name.split(".")[1:]
    for i, part in enumerate(parts):
        if here.is_module and face_file(here.path).exists() and part in places(here.path):
            place = places(here.path)[part]
            module = face_file(here.path).parent / f"{part}.py"  # a module named like the object
            if place != f"{here.path}.{part}" and not (parts[i + 1 :] and module.exists()):
                return _path(package, ".".join([place, *parts[i + 1 :]]))
        try:
            here = (here.all_members if here.is_class else here.members)[part]
            here = here.final_target if here.is_alias else here
        except (KeyError, griffe.AliasResolutionError, griffe.CyclicAliasError):
            return None
    return here.path
