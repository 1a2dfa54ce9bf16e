"""What mkdocs.yml asks of us: names of a face, names in docstrings, and links that leave docs/.

A reference page says `::: lora_ext.rows` and gets the room's docstring and each name of its
`__all__`: with its own docstring where the room defines it, as a link where another room does.

A docstring names other things with roles, as editors know them: :func:`lora_ext.attach`. A role
becomes a link where the reference shows the thing, and code where it does not. A role that names
nothing stays a reference that nobody can resolve, and a strict build fails.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).absolute().parents[1]
_ASKED = re.compile(r"^::: (?P<name>[\w.]+)\n(?!    )", re.MULTILINE)
_ROLE = re.compile(r":(?:mod|class|func|meth|attr|data):`(?P<short>~?)(?P<name>[\w.]+)`")
_OUTSIDE = re.compile(r"\[(?P<words>[^\]]*)\]\((?P<path>\.\./[^)#\s]+)\)")
#: Packages whose pages are elsewhere: a strict build is offline.
_OTHERS = {"torch", "transformers", "peft", "flwr", "vllm", "numpy"}


@lru_cache
def places(package: str) -> dict[str, str]:
    """Each name that a package's face defines or imports, with the place that defines it."""
    found: dict[str, str] = {}
    for node in _statements(ast.parse(_face_file(package).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level < 2:
            here = f"{package}.{node.module or ''}".rstrip(".") if node.level else node.module or ""
            for alias in node.names:
                place = f"{here}.{alias.name}"
                found[alias.asname or alias.name] = place if here == package else _origin(place)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.setdefault(node.name, f"{package}.{node.name}")
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, f"{package}.{node.targets[0].id}")
    return found


def _statements(tree: ast.Module | ast.If | ast.Try) -> Iterator[ast.stmt]:
    """What runs at the import of a module, and under `if TYPE_CHECKING`."""
    for node in tree.body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements(node)


def face(package: str) -> dict[str, str]:
    """The names of a package's `__all__`, each with the place that defines it."""
    for node in ast.parse(_face_file(package).read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return {name: places(package)[name] for name in ast.literal_eval(node.value)}
    return {}


def _face_file(package: str) -> Path:
    return ROOT / package.replace(".", "/") / "__init__.py"


def _origin(place: str) -> str:
    """Follow a name from face to face to the file that defines it."""
    package, _, name = place.rpartition(".")
    if package.startswith("lora_ext") and _face_file(package).exists():
        return places(package).get(name, place)
    return place


@lru_cache
def shown() -> dict[str, str]:
    """What the reference shows: the place that defines a thing, and the package on whose page."""
    pages = sorted((ROOT / "docs/reference").rglob("*.md"))
    asked = [found["name"] for page in pages for found in _ASKED.finditer(page.read_text())]
    found = {package: package for package in asked}
    faces = {package: face(package) for package in asked if _face_file(package).exists()}
    # The deepest room shows a name; a face of several rooms what none of theirs does.
    for package in sorted(faces, key=lambda package: -package.count(".")):
        for place in faces[package].values():
            if place.startswith(f"{package}."):
                found.setdefault(place, package)
    for package, names in faces.items():
        for place in names.values():
            found.setdefault(place, package)
    return found


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Write out the faces that a page of the reference asks for, and mend its links."""
    here = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def path_of(found: re.Match[str]) -> str:
        """A link out of docs/ becomes the path of the file, which has to be there."""
        path = posixpath.normpath(posixpath.join(here, found["path"]))
        if path.startswith("docs/"):
            return found[0]
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{page.file.src_uri}: {found[0]}: there is no {path}")
        return f"{found['words']} (`{path}`)"

    return _OUTSIDE.sub(path_of, _ASKED.sub(lambda asked: _written_out(asked["name"]), markdown))


def _written_out(package: str) -> str:
    """The mkdocstrings text of a package: its docstring, its names, and links to other rooms'."""
    if not _face_file(package).exists():
        return f"::: {package}\n"
    names = face(package)
    own = [p for p in dict.fromkeys(names.values()) if shown()[p] == package]
    others = {n: p for n, p in names.items() if p not in own}
    links = [f"* [`{package}.{name}`][{place}]\n" for name, place in others.items()]
    head = f"::: {package}\n    options: {{members: [], show_root_heading: false}}\n\n"
    return "".join([head, *links, "\n", *(f"::: {place}\n\n" for place in own)])


class Roles(griffe.Extension):
    """Turn the roles of docstrings into cross-references of mkdocs."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite every docstring of a package that was read."""
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
    known = place in shown() or (owner in shown() and not _face_file(owner).exists())
    return f"[`{short}`][{place}]" if known else f"`{short}`"


def _place(name: str, here: Any, package: griffe.Module) -> str | None:
    """Where the thing is defined that a docstring names: a path, or None where there is none."""
    if name.startswith("."):
        return _path(package, f"{here.module.path}{name}")
    if name.startswith("lora_ext"):
        return _path(package, name)
    scope = here
    while scope is not None:  # a class before its module, as Python looks for names
        if (path := _path(package, f"{scope.path}.{name}")) is not None:
            return path
        scope = scope.parent
    # A name that the module does not import.
    first, dot, rest = name.partition(".")
    everywhere = (o.path for o in _objects(package) if o.is_class or o.is_function)
    homes = [p for p in (*shown(), *everywhere) if p.rpartition(".")[2] == first]
    return _path(package, f"{homes[0]}{dot}{rest}") if homes else None


def _path(package: griffe.Module, name: str) -> str | None:
    """The canonical path of a dotted name, through faces and base classes."""
    here: Any = package
    parts = name.split(".")[1:]
    for i, part in enumerate(parts):
        if here.is_module and _face_file(here.path).exists() and part in places(here.path):
            place = places(here.path)[part]
            module = _face_file(here.path).parent / f"{part}.py"  # that has the same name
            if place != f"{here.path}.{part}" and not (parts[i + 1 :] and module.exists()):
                return _path(package, ".".join([place, *parts[i + 1 :]]))
        try:
            here = (here.all_members if here.is_class else here.members)[part]
            here = here.final_target if here.is_alias else here
        except (KeyError, griffe.AliasResolutionError, griffe.CyclicAliasError):
            return None
    return here.path
