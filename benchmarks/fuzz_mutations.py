"""Values, files and words as nobody should write them: one or a few things changed, drawn from a seed."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEEP, LONG = "@deep@", "@long@"
# Numbers that are none, too large, negative; texts that are none, or write on terminals and pages; other types.
STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 0.5, 1.5, -0.0, 10**9, -(10**9), 2**31, 2**63, 10**30, 1e308, 5e-324),
    *(math.nan, math.inf, -math.inf, "NaN", "Infinity", "", " ", "x", "1", "-1", "1e9", "dense", "pivoted", "²"),
    *("../x", "/dev/zero", "/etc/passwd", "\x1b[31mred\x1b[0m\x07", "a\nb\r\nc", "<script>alert(1)</script>", "a|b`c"),
    *("\ud800", "\x00", "x" * 5000, [], {}, [[]], [None], {"": None}, {"a": {"b": {"c": 1}}}, [1, 2, 3], ["x"]),
    *(DEEP, LONG),
)


# YAML of every kind, most of it none of a recipe.
YAMLS = (
    *("&a [*a]", "&a {a: *a}", "*a", "!!python/object/apply:os.system [ls]", "!!int ''", "!!float ''", "!!bool x"),
    *("!!timestamp x", "2020-13-45", "!!binary x", "!!set {a}", "!!omap [a]", "<<: 1", "=", "{[1]: 2}"),
    *("{? {a: 1} : 2}", "1:60:99", "0x" + "f" * 400, "9" * 5000, "1e400", ".nan", ".inf", "-.inf", "~", "yes", "on"),
    *("[" * 10**4, "{a: " * 500, "- " * 2000 + "x", "x: y: z", "'", '"\\ud800"', "\x1b[31m", "%YAML 9.9\n--- 1"),
    *("--- 1\n--- 2", "|", ">-", "? x", "&a x", "{a: 1, a: 2}", "[1, 2", "{a", "@x", "`x`", "\tx", "#", ""),
    *("x" * 10**4, "1_000", "0o17", "é", "\x85", "\ufeff"),
)


def laughs() -> str:
    """A list of lists of lists, of 8 to the power of 8 elements by their names alone."""
    inner = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 8)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True))
    return "a: &a [x, x]\n" + inner


def as_json(values: Any) -> str:
    """JSON with what Python writes beyond it: NaN, Infinity, and lists and numbers no parser should follow."""
    text = json.dumps(values, indent=1)
    return text.replace(f'"{DEEP}"', "[" * 10**5 + "]" * 10**5).replace(f'"{LONG}"', "9" * 5000)


def places(values: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value inside nested ones."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inner:
        yield (*where, key)
        yield from places(value, (*where, key))


def mutated(values: Any, draw: random.Random, under: tuple[Any, ...] = ()) -> tuple[Any, str]:
    """Nested values with one to three things changed, and what was changed."""
    result, said = copy.deepcopy(values), []
    for _ in range(draw.choice((1, 1, 1, 1, 2, 3))):
        root = result
        for key in under:
            root = root[key]
        # Any depth as often as another: most places are deep inside.
        depths: dict[int, list[tuple[Any, ...]]] = {}
        for place in places(root):
            depths.setdefault(len(place), []).append(place)
        if not depths:
            break
        *path, last = draw.choice(depths[draw.choice(sorted(depths))])
        parent = root
        for key in path:
            parent = parent[key]
        said.append(f"{'.'.join(map(str, (*under, *path, last)))}: {_change(parent, last, draw)}")
    return result, "; ".join(said)


def _change(parent: Any, key: Any, draw: random.Random) -> str:
    kind = draw.choice(("strange",) * 6 + ("number", "remove", "rename", "wrap", "swap", "more"))
    old = parent[key]
    if kind == "number" and isinstance(old, int | float) and not isinstance(old, bool):
        parent[key] = draw.choice((old + 1, -old, old * 10**6, float(old), str(old), old - 1, 999_999))
    elif kind == "remove":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        new = draw.choice(
            (f"{key}x", str(key).upper(), "", "0", "x.y", "model.layers.999999999.mlp.up_proj", "\x1b[2J")
        )
        parent[new] = parent.pop(key)
        return f"called {new!r}"
    elif kind == "wrap":
        parent[key] = draw.choice(([old], {"x": old}, [[old, old]], list(old) if isinstance(old, dict) else [old, old]))
    elif kind == "swap":
        others = list(parent.values() if isinstance(parent, dict) else parent)
        parent[key] = copy.deepcopy(draw.choice(others))
    elif kind == "more" and isinstance(parent, dict):
        parent["something else"] = copy.deepcopy(old)
        return "once more"
    else:
        parent[key] = copy.deepcopy(draw.choice(STRANGE))
    shown = repr(parent[key] if kind != "remove" else "removed")
    return shown if len(shown) < 60 else shown[:57] + "..."


def damaged(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Bytes flipped, cut off, or those of something else."""
    kind = draw.choice(("flip", "flip", "flip", "cut", "cut", "insert", "replace"))
    if kind == "flip":
        found = bytearray(data)
        spots = sorted(draw.randrange(len(found)) for _ in range(draw.choice((1, 1, 3, 20))))
        for spot in spots:
            found[spot] ^= 1 << draw.randrange(8)
        return bytes(found), f"bits flipped at {spots}"
    if kind == "cut":
        end = draw.choice((0, 1, len(data) - 1, draw.randrange(len(data))))
        return data[:end], f"cut off after {end} bytes"
    if kind == "insert":
        spot, more = (
            draw.randrange(len(data)),
            draw.choice((b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"[" * 10**5)),
        )
        return data[:spot] + more + data[spot:], f"{more[:8]!r} at {spot}"
    other = draw.choice((b"", b"null", b"3", b"[]", b"{}", b'"x"', b"\x89PNG\r\n", b"{" * 10**5, b"[" * 10**5, b"\x00"))
    return other, f"instead {other[:8]!r}"


def changed_json(file: Path, draw: random.Random, under: tuple[Any, ...] = (), raw: float = 0.2) -> str:
    """Mutates a JSON file, mostly by its values; returns what was done."""
    if draw.random() < raw:
        data, said = damaged(file.read_bytes(), draw)
    else:
        values, said = mutated(json.loads(file.read_text(encoding="utf-8")), draw, under)
        data = as_json(values).encode("utf-8", "surrogatepass")
    return replace(file, data, said)


def replace(file: Path, data: bytes, said: str) -> str:
    file.unlink()  # a second name of the input's file
    file.write_bytes(data)
    return f"{file.name}: {said}"
