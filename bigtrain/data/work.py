"""What a preparation is about, for everyone who works on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.data.documents import ReadOptions, Report
from bigtrain.data.encoders import Name
from bigtrain.data.tokenizer import Tokenizer

Tell = Callable[[Report, int], None]
"""Hears a few times a second what was read of a unit, and how many tokens came of it."""


@dataclass(frozen=True)
class Work:
    """What is the same for every unit of a corpus."""

    out: Path
    request: str
    """Digest of what was asked for, tokenizer included."""
    units: int
    read: ReadOptions
    validation_fraction: float
    shard_tokens: int
    shuffle_mb: float
    seed: int
    encoder: Name = "sentencepiece"
    """Who encodes (encoders.choose): the result is the same."""
    notes: tuple[str, ...] = ()
    """What the user should be told of it."""
    dedup: bool = False
    """Documents that come again are left out."""
    near: float = 0.0
    """Also those whose MinHash signatures agree to this share; 0: only equal ones."""


def digest(request: dict[str, Any], tokenizer: Tokenizer) -> str:
    """sha256 of a request and the tokenizer that it came to."""
    return hashlib.sha256(json.dumps([request, tokenizer.sha256], sort_keys=True).encode()).hexdigest()
