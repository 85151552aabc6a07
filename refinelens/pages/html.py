"""A page as one HTML file that asks for nothing: its code, its style and its numbers stand in it.

Numbers travel as one block of little-endian arrays, compressed (zlib) and in base64; what they are called and their
shapes as JSON. Texts of documents and tokens come from strangers: in the file no ``<`` of theirs is left as it is, and
the page's code puts them in as text, never as HTML. A content security policy keeps a page from loading anything.
"""

from __future__ import annotations

import base64
import json
import zlib
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

ASSETS = Path(__file__).with_name("assets")
SCRIPTS = {  # of a page, in this order
    "heatmap": ("page", "heatmap"),
    "drift": ("page", "chart", "drift"),
    "run": ("page", "chart", "claim", "measures", "cues", "questions", "run"),
}
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
TYPES = {"u1": np.uint8, "u2": np.uint16, "u4": np.uint32, "i4": np.int32, "f4": np.float32}
MILLINATS = 1e-3  # step of log-probabilities of lists
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<noscript>This page draws its numbers by a script that stands in it; allow scripts to see them.</noscript>
<main id="app"></main>
<script type="application/json" id="head">{head}</script>
<script type="text/plain" id="data">{data}</script>
<script>
{code}</script>
</body>
</html>
"""


def write_page(kind: str, title: str, head: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    """The text of a page.

    Args:
        kind: One of `SCRIPTS`.
        title: Of the window.
        head: What JSON can hold; the page's code has it as ``head``.
        arrays: Numbers by name, of one of `TYPES`.
    """
    places, block = {}, bytearray()
    for name, array in arrays.items():
        code = next(code for code, dtype in TYPES.items() if array.dtype == dtype)
        block += b"\0" * (-len(block) % 4)  # typed arrays of a browser start at multiples of their size
        places[name] = [code, len(block), list(array.shape)]
        block += np.ascontiguousarray(array).astype(f"<{code}").tobytes()
    return _PAGE.format(
        policy=escape(POLICY),
        title=escape(title),
        style=_asset("page.css"),
        head=as_json(head | {"arrays": places}),
        data=base64.b64encode(zlib.compress(bytes(block), 9)).decode(),
        code="".join(_asset(f"{name}.js") for name in SCRIPTS[kind]) + f"start({kind}Page);\n",
    )


def as_json(value: object) -> str:
    """JSON that may stand within a ``script`` element: nothing in it can end that, or begin a comment."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def framed(page: str, height: int) -> str:
    """A page within a notebook's output: in a frame of its own, which may run its code and nothing else."""
    style = f"width:100%;height:{height}px;border:0"
    return f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{escape(page)}"></iframe>'


def smallest(values: np.ndarray) -> np.ndarray:
    """Whole numbers of 0 or more in the smallest type that holds them."""
    most = int(values.max(initial=0))
    return values.astype(next(t for t in (np.uint8, np.uint16, np.uint32) if most <= np.iinfo(t).max))


def millinats(logprobs: np.ndarray) -> np.ndarray:
    """Log-probabilities in steps of `MILLINATS` below 0, uint16; from -65.5 nats on they are no longer told apart."""
    return np.clip(np.round(logprobs / -MILLINATS), 0, np.iinfo(np.uint16).max).astype(np.uint16)


@cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")
