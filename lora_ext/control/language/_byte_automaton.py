"""Child program that converts a regular expression or a schema to an automaton over bytes.

The program is a child process because outlines-core cannot be interrupted, and a few characters can
require more states than fit into memory. The program does not import this package and receives no
tokens.

Standard input is a JSON object with ``folder`` (of outlines_core), the limits ``seconds`` and
``bytes``, ``pattern`` or ``schema``, and ``inner``: patterns that must only match the inside of a
JSON string. Standard output is a line of JSON, ``{"states": S}`` or ``{"error": text}``. After
``states``, it continues with S times 256 next states and S flags, int32 in the machine's byte
order.
"""

import sys

sys.path = sys.path[1:]  # Remove this folder, because its files could shadow other modules.

import array  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402

# This byte is appended to the expression, because outlines-core drops tokens that end one byte
# after a position where a match may end. With the byte, a match can only end at the end of the
# text, and no token ends later.
SENTINEL = 0
# Bytes that end a JSON string or must be escaped in it.
UNSAFE = [*range(1, 32), 34, 92, 127]


def automaton(index_of, pattern):
    """Return the next states of every state, and flags for states in which a text may end.

    ``index_of(expression)`` builds an index of outlines-core.
    """
    index = index_of(f"(?:{pattern})\\x00")
    moves, ends = index.get_transitions(), set(index.get_final_states())
    start = index.get_initial_state()
    order, number = [start], {start: 0}
    table, final = array.array("i"), array.array("i")
    for state in order:
        after = moves.get(state, {})
        final.append(int(after.get(SENTINEL) in ends))
        row = [-1] * 256
        for byte, target in after.items():
            if byte == SENTINEL or byte > 255:
                continue
            if target not in number:
                number[target] = len(order)
                order.append(target)
            row[byte] = number[target]
        table.extend(row)
    return table, final


def main():
    """Read a request from standard input and write the result to standard output."""
    request = json.load(sys.stdin)
    seconds = max(1, int(request["seconds"]) + 1)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (request["bytes"], request["bytes"]))
    sys.path.insert(0, request["folder"])
    from outlines_core import Index, Vocabulary

    every = Vocabulary(256, {bytes([b]): [b] for b in range(256)})
    try:
        pattern = request.get("pattern")
        if pattern is None:
            # outlines_core creates this module at import; pyright finds no file for it.
            from outlines_core.json_schema import (  # pyright: ignore[reportMissingImports]
                build_regex_from_schema,
            )

            pattern = build_regex_from_schema(request["schema"])
        elif ")" in pattern:
            # Raises for an unmatched bracket, which the group that `automaton` adds would close.
            Index(pattern + "\\x00", every)
        for inner in request.get("inner", ()):
            Index(inner + "\\x00", every)
            table, final = automaton(lambda rx: Index(rx, every), inner)
            if any(table[256 * s + b] >= 0 for s in range(len(final)) for b in UNSAFE):
                raise ValueError(f"unsafe: {inner}")
        table, final = automaton(lambda rx: Index(rx, every), pattern)
    except (TypeError, ValueError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return
    print(json.dumps({"states": len(final)}), flush=True)
    sys.stdout.buffer.write(table.tobytes() + final.tobytes())


if __name__ == "__main__":
    main()
