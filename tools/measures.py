"""Count what ``tools/house.py`` limits: lines of code and of checks, names, parameters."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef

NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
NOT_CODE.add(tokenize.ENDMARKER)
CHECKERS = set(
    """require integer number choice flag instance check_fields supported renamed""".split()
)  # functions of lora_ext._checks; the prefixes of _is_checker count as well
WIDE = 8  # parameters of one function


@dataclass
class Measures:
    """Counts of one file."""

    code: set[int]  # lines without blanks, comments and docstrings
    checks: set[int]  # lines of code that check arguments
    bodies: list[int]  # lines of code of each function's body
    public: list[str]  # functions and classes without an underscore
    shown: list[str]  # __all__
    wide: dict[str, int] = field(default_factory=dict)  # more than WIDE parameters, by function


def span(node: ast.stmt | ast.expr) -> set[int]:
    """Return the numbers of the lines of a node."""
    return set(range(node.lineno, (node.end_lineno or node.lineno) + 1))


@cache
def nodes(text: str) -> list[ast.AST]:
    """Return all nodes of a file; the first one is the module."""
    return list(ast.walk(ast.parse(text)))


@cache
def code_lines(text: str) -> set[int]:
    """Return the numbers of the lines that are not blank, comment or docstring."""
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NOT_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in nodes(text):
        if isinstance(node, Function | ast.ClassDef | ast.Module) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                code -= span(first) if isinstance(first.value.value, str) else set()
    return code


def _is_checker(name: str) -> bool:
    """Return whether a function checks arguments. ``requires_grad_`` does not."""
    return name.lstrip("_").startswith(("check_", "refuse", "require")) and name[-1] != "_"


def _checks(node: ast.AST) -> bool:
    """Return whether a node is a raise, an ``if`` that only raises, or a checker or its call."""
    if isinstance(node, Function):
        return _is_checker(node.name)
    if isinstance(node, ast.If):
        kinds = {type(statement) for statement in node.body}
        return ast.Raise in kinds and kinds <= {ast.Raise, ast.Assign} and not node.orelse
    if isinstance(node, ast.Expr | ast.Assign) and isinstance(node.value, ast.Call):
        called = node.value.func
        name = getattr(called, "id", getattr(called, "attr", ""))
        return name in CHECKERS or _is_checker(name)
    return isinstance(node, ast.Raise)


def _parameters(function: Function) -> int:
    """Return the number of parameters, including keyword-only ones but not ``self`` and ``cls``."""
    names = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
    return len([n for n in names if n not in ("self", "cls")]) + len(function.args.kwonlyargs)


def measure(path: Path) -> Measures:
    """Return the counts of one file."""
    text = path.read_text()
    code = code_lines(text)
    functions = [node for node in nodes(text) if isinstance(node, Function)]
    bodies = [code & set(range(f.body[0].lineno, (f.end_lineno or 0) + 1)) for f in functions]
    checks = [span(n) for n in nodes(text) if isinstance(n, ast.stmt) and _checks(n)]
    defined = [n.name for n in ast.parse(text).body if isinstance(n, Function | ast.ClassDef)]
    return Measures(
        code=code,
        checks=code if path.name == "_checks.py" else code.intersection(set().union(*checks)),
        bodies=[len(body) for body in bodies],
        public=[name for name in defined if not name.startswith("_")],
        shown=list(_shown(text)),
        wide={f.name: n for f in functions if (n := _parameters(f)) > WIDE},
    )


def _shown(text: str) -> Iterator[str]:
    for node in nodes(text):
        if isinstance(node, ast.Assign):
            if any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
                yield from ast.literal_eval(node.value)


def is_private(module: str) -> bool:
    """Return whether a module, or a package around it, has a name with an underscore."""
    return any(part.startswith("_") for part in module.split(".") if part != "__main__")
