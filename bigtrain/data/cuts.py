"""Where a text may be cut before a SentencePiece BPE model encodes it, so that the ids stay those of the whole text.

SentencePiece's BPE takes longer for each character of a long string, so documents are encoded in parts.

The rule: between characters a and b a cut changes nothing if no piece of the vocabulary contains "ab". Why:

1. The normaliser is the identity but for space -> U+2581, which is done to each character by itself; so the parts'
   normal forms, one after the other, are the text's.
2. The encoder begins with characters and user-defined pieces, the longest that matches at each place from the left.
   None that matches reaches over the cut, for it would contain "ab"; so the cut is a border between first symbols, and
   what matches left of it is decided by what is left of it.
3. Two symbols merge only if the result is a piece. No merge crosses the cut, so each side sees only its own. Merges are
   done by score, then from left to right: the order among the merges of one side is the same without the other.
4. Ids of symbols are looked up one by one, with one exception: a run of unknown characters is one <unk> where there
   is no byte fallback. There one of a and b has to be a piece by itself: the symbol that it is in is then known.

Not provable, and therefore never cut: unigram (it adds up float32 scores over the text, so a cut can tip a tie), other
normalisers, removal of extra spaces, spaces behind words, unused pieces (how they are taken apart is remembered for
the whole text), pieces that share the name of a control piece.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

SPACE = "\u2581"
"""SentencePiece writes a space as this."""
LEAST = 384
"""Characters of a part, or a few more: shorter ones cost more calls, longer ones more time for each character."""
_BPE = 2  # TrainerSpec.ModelType
_NORMAL, _USER_DEFINED, _UNUSED = 1, 4, 5  # ModelProto.SentencePiece.Type


@dataclass(frozen=True)
class Cuts:
    """How a model's texts are cut, and the model that encodes the parts."""

    model: bytes
    """The model without its dummy prefix."""
    prefix: str
    """What the text begins with instead: a space, or nothing if the model has no dummy prefix."""
    joined: frozenset[str]
    """Pairs of characters that some piece contains; a space in them also as U+2581, which means the same."""
    known: frozenset[str] | None
    """Characters that are pieces; None if unknown ones are written as bytes."""

    def parts(self, text: str, least: int = LEAST) -> list[str]:
        """The text in parts of `least` characters or a few more, the last one shorter; none of an empty text."""
        parts: list[str] = []
        start, size = 0, len(text)
        while start < size:
            end = start + least
            while end < size and self._held(text[end - 1 : end + 1]):
                end += 1
            parts.append(text[start:end])
            start = end
        return parts

    def _held(self, pair: str) -> bool:
        if pair in self.joined:
            return True
        return self.known is not None and pair[0] not in self.known and pair[1] not in self.known


def cuts_of(model: bytes) -> Cuts | None:
    """How the texts of a SentencePiece model (a serialised ModelProto) may be cut; None: not at all."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    pieces = {p.piece for p in proto.pieces if p.type in (_NORMAL, _USER_DEFINED)}
    if not _provable(proto, pieces):
        return None
    joined = {a + b for piece in pieces for a, b in pairwise(piece.replace(" ", SPACE))}
    known = frozenset(_both_ways({piece for piece in pieces if len(piece) == 1}))
    prefix = " " if proto.normalizer_spec.add_dummy_prefix else ""
    proto.normalizer_spec.add_dummy_prefix = False
    return Cuts(
        model=proto.SerializeToString() if prefix else model,
        prefix=prefix,
        joined=frozenset(_both_ways(joined)),
        known=None if proto.trainer_spec.byte_fallback else known,
    )


def _provable(proto: Any, pieces: set[str]) -> bool:
    """Whether the argument above holds for a model (sentencepiece_model.proto)."""
    trainer, normaliser = proto.trainer_spec, proto.normalizer_spec
    reserved = {p.piece for p in proto.pieces if p.type not in (_NORMAL, _USER_DEFINED)}
    return bool(
        trainer.model_type == _BPE
        and not normaliser.precompiled_charsmap
        and not normaliser.remove_extra_whitespaces
        and normaliser.escape_whitespaces
        and not trainer.treat_whitespace_as_suffix
        and not any(p.type == _UNUSED or math.isnan(p.score) for p in proto.pieces)
        and not pieces & reserved
    )


def _both_ways(strings: set[str]) -> set[str]:
    """Strings of one or two characters, also with a space for each U+2581."""
    choices = {SPACE: (SPACE, " ")}
    return {"".join(way) for s in strings for way in product(*(choices.get(c, c) for c in s))}
