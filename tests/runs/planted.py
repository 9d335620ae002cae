"""Errors to plant, each of a kind that parallel training has shipped with: the parity checks must see all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bigtrain.mesh import Mesh


@contextlib.contextmanager
def error(name: str, mesh: Mesh) -> Iterator[None]:
    """Run with the error `name` planted ("" plants none)."""
    assert not name, f"no such error: {name}"
    yield
