"""Text to token ids and back with SentencePiece, without losing a byte.

A tokenizer trained here keeps text exactly: no normalisation, no dummy prefix, double spaces kept, runs of
spaces as pieces (indentation), newline and tab as pieces of their own, everything else rare as single bytes.
Text that looks like a control piece ("</s>") stays plain text: control ids never come from `encode`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.data.cuts import LEAST, Cuts, cuts_of
from bigtrain.data.cuts import SPACE as SPACE
from bigtrain.errors import UserError

Tokens = np.ndarray[Any, np.dtype[np.int32]]

_SPACE_BYTES = ("<0xE2>", "<0x96>", "<0x81>")
_SURROGATES = re.compile("[\ud800-\udfff]")


def replace_surrogates(text: str) -> tuple[str, int]:
    """The text with each lone surrogate as U+FFFD, and their number: JSON can hold them, UTF-8 cannot."""
    if text.isascii():
        return text, 0
    try:
        text.encode()
        return text, 0
    except UnicodeEncodeError:
        return _SURROGATES.subn("\ufffd", text)


class Tokenizer:
    """A SentencePiece model. Ids run from 0 to vocab_size - 1; `encode` adds no BOS and no EOS."""

    def __init__(self, model: bytes, path: Path) -> None:
        """`model` is the content of `path`. UserError if it is no SentencePiece model."""
        import sentencepiece

        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, TypeError) as error:
            raise UserError(
                "not a SentencePiece model",
                where=str(path),
                do="give the .model file that `bigtrain prepare` or SentencePiece wrote",
            ) from error
        self.path = path
        self.model = model
        self.encoder: Callable[[Sequence[str], int], list[Tokens]] | None = None
        """Encodes in SentencePiece's place (encoders.use)."""
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._sp.piece_size()

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a .model file, or the tokenizer.model in a folder. UserError if there is none."""
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.model"
        try:
            return cls(file.read_bytes(), file)
        except OSError as error:
            raise UserError(
                "cannot read the tokenizer", where=str(file), do="check the path to the .model file"
            ) from error

    @property
    def bos_id(self) -> int:
        """Id that begins a document; -1 if the model has none."""
        return int(self._sp.bos_id())

    @property
    def eos_id(self) -> int:
        """Id that ends a document; -1 if the model has none."""
        return int(self._sp.eos_id())

    @property
    def pad_id(self) -> int:
        """Id that fills rows up; -1 if the model has none."""
        return int(self._sp.pad_id())

    @property
    def mask_id(self) -> int | None:
        """Id that hides a token in the masked objective; None if the model has no control piece <mask>."""
        found = int(self._sp.piece_to_id("<mask>"))
        return found if self._sp.is_control(found) else None

    @cached_property
    def special_ids(self) -> tuple[int, ...]:
        """Ids that stand for no text: BOS, EOS, padding, mask, unknown."""
        ids = range(self.vocab_size)
        return tuple(i for i in ids if self._sp.is_control(i) or self._sp.is_unknown(i))

    @cached_property
    def exact(self) -> bool:
        """True if text survives unchanged, as with the tokenizers trained here; no piece crosses a newline."""
        probe = "a  b\t\r\n\n \ufb01\u2460 "
        return (
            self._sp.decode(self._sp.encode(probe)) == probe
            and self._sp.encode("\n") == [self._sp.piece_to_id("\n")]
            and not self._sp.encode("a", out_type=str)[0].startswith(SPACE)
            and sum("\n" in self._sp.id_to_piece(i) for i in range(self.vocab_size)) == 1
        )

    @cached_property
    def _cuts(self) -> tuple[Cuts, Any] | None:
        """Where texts may be cut, and the processor of the parts; None if not at all."""
        import sentencepiece

        cuts = cuts_of(self.model)
        if cuts is None:
            return None
        return cuts, sentencepiece.SentencePieceProcessor(model_proto=cuts.model) if cuts.prefix else self._sp

    @cached_property
    def _space_ids(self) -> Tokens | None:
        """The character U+2581 as its three bytes; None if this model cannot say it exactly."""
        ids = [int(self._sp.piece_to_id(piece)) for piece in _SPACE_BYTES]
        known = self.exact and all(self._sp.is_byte(i) for i in ids)
        return np.array(ids, np.int32) if known else None

    def changes_space_symbol(self, text: str) -> bool:
        """Whether the text has the character U+2581 and this model would give it back as a space."""
        return SPACE in text and self._space_ids is None

    def encode(self, text: str) -> Tokens:
        """Token ids of a text, int32 (n,); lone surrogates are encoded as U+FFFD."""
        return self.encode_batch([text], threads=1)[0]

    def encode_batch(self, texts: Sequence[str], *, threads: int = -1) -> list[Tokens]:
        """`encode` of each text, on `threads` threads (-1: every core); the ids do not depend on it."""
        clean = [replace_surrogates(text)[0] for text in texts]
        cuts, encode = None, self.encoder or self.by_sentencepiece
        # Other encoders gain nothing by cutting.
        if self.encoder is None and any(len(text) > LEAST for text in clean) and self._cuts is not None:
            cuts, processor = self._cuts
            encode = partial(_encode, processor)
        parts: list[str] = []
        layout = [self._cut(text, cuts, parts) for text in clean]  # indexes into parts, -1 for U+2581
        encoded = encode(parts, threads)
        if self._space_ids is not None:
            encoded.append(self._space_ids)  # index -1
        nothing = np.empty(0, np.int32)
        return [
            encoded[i[0]] if len(i) == 1 else np.concatenate([nothing, *(encoded[n] for n in i)])
            for i in layout
        ]

    def by_sentencepiece(self, texts: Sequence[str], threads: int) -> list[Tokens]:
        """Ids of whole texts, int32 each, uncut."""
        return _encode(self._sp, texts, threads)

    def piece(self, token: int) -> str:
        """How the model writes a token."""
        return str(self._sp.id_to_piece(token))

    def _cut(self, text: str, cuts: Cuts | None, parts: list[str]) -> list[int]:
        """Append to `parts` what has to be encoded separately; return the parts of this text in order."""
        indexes: list[int] = []
        for number, stretch in enumerate(text.split(SPACE) if self._space_ids is not None else [text]):
            if number:
                indexes.append(-1)
            if stretch:
                found = cuts.parts(cuts.prefix + stretch) if cuts is not None else [stretch]
                indexes += range(len(parts), len(parts) + len(found))
                parts += found
        return indexes

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; control ids give nothing, broken UTF-8 from byte pieces gives U+FFFD."""
        values = [int(i) for i in ids]
        outside = [i for i in values if not 0 <= i < self.vocab_size]
        if outside:
            raise UserError(
                f"token id {outside[0]} is not in the vocabulary of {self.vocab_size}", where=str(self.path)
            )
        return str(self._sp.decode(values))

    def token_bytes(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """UTF-8 bytes of text an id stands for, int64 (vocab_size,): control and unknown 0, byte pieces 1.

        Summed over a text's ids this is its length in bytes, so nats per token become bits per byte.
        """
        sizes = np.zeros(self.vocab_size, np.int64)
        for i in range(self.vocab_size):
            if self._sp.is_byte(i):
                sizes[i] = 1
            elif not (self._sp.is_control(i) or self._sp.is_unknown(i) or self._sp.is_unused(i)):
                sizes[i] = len(self._sp.id_to_piece(i).replace(SPACE, " ").encode())
        return sizes


def _encode(processor: Any, texts: Sequence[str], threads: int) -> list[Tokens]:
    found: list[Tokens] = (
        processor.encode(list(texts), return_type="numpy", num_threads=threads) if texts else []
    )
    return found
