"""Train a SentencePiece model on a sample of the text."""

from __future__ import annotations

import io
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Literal

from bigtrain.data.files import write_whole
from bigtrain.data.tokenizer import SPACE, Tokenizer, replace_surrogates
from bigtrain.errors import UserError

Kind = Literal["unigram", "bpe"]

_CONTROL = ("<mask>",)
_OWN_PIECES = ("\n", "\t")
_META = 4 + len(_CONTROL) + len(_OWN_PIECES)  # unk, bos, eos, pad and the above
_BYTES = 256
# SentencePiece drops whole lines that hold its internal markers: tab (boundary), U+2047 (unknown), NUL.
_BREAKS = re.compile(f"[\n\t\0\u2047{SPACE}]+")
_LINE = 4000
"""Characters of one training line, at most 16 kB in UTF-8 (SentencePiece drops longer ones)."""
_THREADS = 8
"""Fixed, not the number of cores: unigram training adds up floats by thread, so it would change the model."""


def train_tokenizer(
    texts: Iterable[str],
    out: Path,
    *,
    kind: Kind = "bpe",
    vocab_size: int,
    byte_fallback: bool = True,
) -> Tokenizer:
    """Train on all of `texts` (held in memory), write the model to `out` and return it.

    The same texts in the same order give the same bytes. With `byte_fallback` any text survives exactly;
    without it characters that the sample lacks become the unknown id.
    UserError if there is no text, or `vocab_size` is more than the text supports or less than it needs.
    """
    lines, letters = training_lines(texts)
    if not lines:
        raise UserError(
            "there is no text to train a tokenizer on",
            do="give inputs that hold text, or an existing tokenizer",
        )
    fixed = _META + (_BYTES if byte_fallback else 0)
    if vocab_size <= fixed + 1:
        raise UserError(
            f"vocab_size {vocab_size} is too small: {fixed} entries are control pieces"
            + (" and single bytes" if byte_fallback else ""),
            do=f"use {fixed + 100} or more",
        )

    def model_of(size: int) -> bytes:
        known = without_rare(lines, letters, (size - fixed) // 2) if byte_fallback else lines
        return _train(known, kind, size, byte_fallback)

    try:
        write_whole(out, model_of(vocab_size))
    except _TooLargeError as error:
        largest = _largest(model_of, error.most, fixed)
        raise UserError(
            f"vocab_size {vocab_size} is larger than the text supports: "
            + (f"at most {largest} pieces ({kind})" if largest else f"it is too little for any ({kind})"),
            do=(f"use a vocab_size of {largest} or less, or " if largest else "") + "give more text",
        ) from error
    return Tokenizer.load(out)


class _TooLargeError(Exception):
    """SentencePiece cannot fill the vocabulary from this text."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.most = most


def _largest(model_of: Callable[[int], bytes], most: int, fixed: int) -> int:
    """The vocabulary that does train: a smaller one knows fewer rare characters, so it may support less yet.

    0 if that ends at the `fixed` entries, with no room for a character.
    """
    while most > fixed + 1:
        try:
            model_of(most)
        except _TooLargeError as error:
            most = error.most
        else:
            return most
    return 0


def training_lines(texts: Iterable[str]) -> tuple[list[str], Counter[str]]:
    """Lines to train on, and how often each character occurs in them.

    Newline and tab are pieces of their own, so nothing is learned across them and cutting there is free.
    """
    lines: list[str] = []
    letters: Counter[str] = Counter()
    for text in texts:
        for line in _BREAKS.split(replace_surrogates(text)[0]):
            if line:
                letters.update(line)
                lines.extend(line[i : i + _LINE] for i in range(0, len(line), _LINE))
    return lines, letters


def without_rare(lines: list[str], letters: Counter[str], room: int) -> list[str]:
    """Lines cut at their rare characters, which become bytes: beyond 0.9995 of the text or beyond `room`.

    So half the vocabulary stays for longer pieces even in scripts of thousands of characters; SentencePiece's
    own character_coverage does the same, but not below 0.98.
    """
    ranked = sorted(letters, key=lambda letter: (-letters[letter], letter))
    reached = list(accumulate(letters[letter] for letter in ranked))
    enough = bisect_left(reached, 0.9995 * reached[-1]) + 1
    rare = ranked[min(enough, room) :]
    if not rare:
        return lines
    breaks = re.compile("[" + re.escape("".join(rare)) + "]+")
    return [part for line in lines for part in breaks.split(line) if part]


def _train(lines: list[str], kind: Kind, vocab_size: int, byte_fallback: bool) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            byte_fallback=byte_fallback,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            control_symbols=list(_CONTROL),
            user_defined_symbols=list(_OWN_PIECES),
            max_sentence_length=4 * _LINE + 1,
            num_threads=_THREADS,
            train_extremely_large_corpus=sum(map(len, lines)) > 2**29,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if found := re.search(r"value <= (\d+)", str(error)):
            raise _TooLargeError(int(found[1])) from error
        raise _explained(str(error), vocab_size) from error
    return model.getvalue()


def _explained(message: str, vocab_size: int) -> UserError:
    """SentencePiece's refusal in a sentence that says what would work."""
    if found := re.search(r"required_chars\. (\d+) vs (\d+)", message):
        return UserError(
            f"vocab_size {vocab_size} is smaller than the {found[2]} entries that single characters need",
            do=f"use more than {found[2]}, or turn byte fallback on",
        )
    return UserError(f"the tokenizer could not be trained: {message}", do="give other or more text")
