"""Faster encoders for SentencePiece models, taken only where they give the same ids on the user's own text.

kitoken and gigatoken read the same `.model`; neither is SentencePiece. Texts that hold the name of a control piece
("</s>"), which gigatoken would turn into that piece, always go to SentencePiece itself.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from bigtrain.data.tokenizer import SPACE, Tokenizer, Tokens
from bigtrain.errors import UserError

Name = Literal["sentencepiece", "kitoken", "gigatoken"]
FASTEST: tuple[Name, ...] = ("gigatoken", "kitoken")
"""20 and 8 MB/s a core on English and code, where SentencePiece's BPE makes 4 (benchmarks/data.py)."""
Encode = Callable[[Sequence[str], int], list[Tokens]]
"""Texts and threads (-1: every core) to ids."""

_HOSTILE = (
    "",
    " ",
    "  two  spaces ",
    "\t tab\r\nCRLF\r\r\n\n\n",
    "nul \0 bell \a \x1b \ufeff\xa0\u2028\u200d",
    "\ufffd",
    "😀 \U0001f469\u200d\U0001f467 🇩🇪 é e\u0301 \ufb01 \u2460 \u212b \uff46",
    "שלום مرحبا 人工智能改变世界。",
    "12345.678e-9 0x0A <0x0A>",
    "a" * 3000,
)


def use(tokenizer: Tokenizer, name: Name) -> None:
    """Let a tokenizer encode by `name`. UserError if the package is not installed, or cannot read the model."""
    tokenizer.encoder = None if name == "sentencepiece" else _made(tokenizer, name)


def choose(
    wanted: Name | Literal["auto"], tokenizer: Tokenizer, sample: Sequence[str], tell: Callable[[str], None]
) -> Name:
    """The encoder to use: `wanted`, or of those installed the fastest, if it is exact on `sample` and on hostile text.

    `tell` hears why one is not used. UserError if `wanted` is named and not installed.
    """
    if wanted == "sentencepiece":
        return wanted
    names = FASTEST if wanted == "auto" else (wanted,)
    for name in names:
        if wanted == "auto" and importlib.util.find_spec(name) is None:
            continue
        try:
            use(tokenizer, name)
        except UserError as e:
            if wanted != "auto" and isinstance(e.__cause__, ImportError):
                raise
            tell(f"{name} is not used: {e.what}")
            continue
        problem = difference(tokenizer, sample)
        tokenizer.encoder = None
        if problem is None:
            return name
        tell(f"{name} is not used: {problem}")
    return "sentencepiece"


def difference(tokenizer: Tokenizer, sample: Sequence[str]) -> str | None:
    """What the tokenizer's encoder does otherwise than SentencePiece, in words; None if all ids are equal.

    Tried on `sample`, on hostile text, and on every piece as text, alone and among other text: control pieces, bytes
    ("<0x0A>") and pieces that a user defined, which a sample may lack.
    """
    pieces = [tokenizer.piece(i).replace(SPACE, " ") for i in range(tokenizer.vocab_size)]
    within = (f"say {piece} here\n{piece}{piece}" for piece in pieces)
    texts = [*sample, *_HOSTILE, *pieces, *within, SPACE, f"a{SPACE} b"]
    fast = tokenizer.encoder
    try:
        found = tokenizer.encode_batch(texts)
        tokenizer.encoder = None
        expected = tokenizer.encode_batch(texts)
    except Exception as e:  # whatever a foreign package raises
        return f"it fails on this text ({type(e).__name__}: {str(e)[:100]})"
    finally:
        tokenizer.encoder = fast
    for mine, theirs in zip(expected, found, strict=True):
        if not np.array_equal(mine, theirs):
            at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), 0)
            shown = tokenizer.decode(mine[max(0, at - 5) : at + 5])
            return f"it gives other ids than SentencePiece near {shown!r}"
    return None


def _made(tokenizer: Tokenizer, name: Name) -> Encode:
    try:
        whole = _kitoken(tokenizer.model) if name == "kitoken" else _gigatoken(tokenizer.model)
    except ImportError as e:
        raise UserError(
            f"{name} is not installed ({e})", do=f'pip install "bigtrain[{name}]", or --encoder auto'
        ) from e
    except Exception as e:  # whatever a foreign package raises for a model that it does not know
        raise UserError(f"it cannot read this model ({type(e).__name__}: {str(e)[:100]})") from e
    special = re.compile("|".join(re.escape(tokenizer.piece(i)) for i in tokenizer.special_ids) or "(?!)")

    def encode(texts: Sequence[str], threads: int) -> list[Tokens]:
        named = [special.search(text) is not None for text in texts]
        found = whole(["" if by_hand else text for by_hand, text in zip(named, texts, strict=True)], threads)
        for i in (i for i, by_hand in enumerate(named) if by_hand):
            found[i] = tokenizer.by_sentencepiece([texts[i]], threads)[0]
        return found

    return encode


def _kitoken(model: bytes) -> Encode:
    from kitoken import Kitoken

    encoder = Kitoken.from_sentencepiece(model)
    return lambda texts, threads: [np.array(ids, np.int32) for ids in encoder.encode_all(list(texts), False)]


def _gigatoken(model: bytes) -> Encode:
    import awkward  # type: ignore[import-untyped]
    import gigatoken

    encoder: Any = gigatoken.Tokenizer.from_sentencepiece(model)

    def encode(texts: Sequence[str], threads: int) -> list[Tokens]:
        ids = encoder.encode_batch(list(texts), parallel=threads != 1)
        flat = awkward.to_numpy(awkward.flatten(ids)).astype(np.int32)
        return np.split(flat, np.cumsum(awkward.to_numpy(awkward.num(ids)))[:-1]) if len(texts) else []

    return encode
