"""Filters that look at one document: lengths, and signs of poor text that hold in any language and in code.

After the rules of Gopher (Rae et al. 2021, arXiv:2112.11446, table A1) and FineWeb (Penedo et al. 2024,
arXiv:2406.17557) that need neither words nor a language.
"""

from __future__ import annotations

import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache

from bigtrain.errors import UserError

_LONG = 1000
"""Characters from which on compression says something about a text."""


@dataclass(frozen=True)
class Filters:
    """Limits that a document has to keep; the defaults let everything pass."""

    min_chars: int = 0
    max_chars: int = 0
    """0: no limit."""
    max_repeated_lines: float = 1.0
    """Share of the characters that stand in lines which came before in the document."""
    max_symbols: float = 1.0
    """Share of the characters other than white space that are no letters, digits or punctuation."""
    min_compressed: float = 0.0
    """Bytes that zlib (level 1) leaves of a byte of text, in documents of 1,000 characters or more: little is left of
    text that repeats itself."""
    max_compressed: float = 10.0
    """Much is left of text that is none: keys, base64, binary data."""

    def problem(self, text: str) -> tuple[str, str] | None:
        """The counter and the words for the first limit that a text breaks; None if it keeps them all."""
        size = len(text)
        if size < self.min_chars:
            return "too_short", f"{size:,} characters, less than {self.min_chars:,}"
        if self.max_chars and size > self.max_chars:
            return "too_long", f"{size:,} characters, more than {self.max_chars:,}"
        if self.max_repeated_lines < 1 and (share := repeated_lines(text)) > self.max_repeated_lines:
            return (
                "repeated_lines",
                f"{share:.0%} of it in repeated lines, more than {self.max_repeated_lines:.0%}",
            )
        if self.max_symbols < 1 and (share := symbols(text)) > self.max_symbols:
            return "symbols", f"{share:.0%} symbols, more than {self.max_symbols:.0%}"
        if size >= _LONG and (self.min_compressed > 0 or self.max_compressed < 10):
            left = compressed(text)
            if left < self.min_compressed:
                return "repetitive", f"compresses to {left:.0%}, less than {self.min_compressed:.0%}"
            if left > self.max_compressed:
                return "incompressible", f"compresses to {left:.0%} only, more than {self.max_compressed:.0%}"
        return None


NO_LIMITS = Filters()
COUNTERS = ("too_short", "too_long", "repeated_lines", "symbols", "repetitive", "incompressible")
QUALITY = Filters(
    min_chars=50, max_repeated_lines=0.3, max_symbols=0.3, min_compressed=0.1, max_compressed=0.72
)
"""What `--quality` asks for. Prose and code compress to 0.25 to 0.6, base64 to 0.76 of its bytes and more."""


def repeated_lines(text: str) -> float:
    """Share of the characters in lines, without their ends, that stood in the text before; empty lines do not count."""
    seen: set[str] = set()
    again = total = 0
    for line in text.split("\n"):
        if stripped := line.strip():
            total += len(stripped)
            again += len(stripped) if stripped in seen else 0
            seen.add(stripped)
    return again / max(total, 1)


def symbols(text: str) -> float:
    """Share of symbols, controls and unknown characters among those that are no white space."""
    bad = total = 0
    for letter, count in Counter(text).items():
        if not letter.isspace():
            total += count
            bad += count if _is_symbol(letter) else 0
    return bad / max(total, 1)


@cache
def _is_symbol(letter: str) -> bool:
    """Unicode's categories S (symbols) and C (controls, private, unassigned), and the replacement character."""
    return unicodedata.category(letter)[0] in "SC"


def compressed(text: str) -> float:
    """Bytes after zlib at level 1 for each byte of UTF-8."""
    data = text.encode()
    return len(zlib.compress(data, 1)) / max(len(data), 1)


def filters_of(quality: bool, settings: Sequence[str]) -> Filters:
    """QUALITY or no limits, changed by KEY=VALUE strings. UserError that names every one that is wrong."""
    made = QUALITY if quality else NO_LIMITS
    kinds: dict[str, type[int] | type[float]] = {
        f.name: type(getattr(NO_LIMITS, f.name)) for f in fields(Filters)
    }
    wrong = []
    for setting in settings:
        name, _, value = setting.partition("=")
        try:
            made = replace(made, **{name: kinds[name](value)})  # type: ignore[arg-type]
            if getattr(made, name) < 0:
                wrong.append(f"{setting}: must not be negative")
        except KeyError:
            wrong.append(f"{setting}: there is no filter {name!r}")
        except ValueError:
            wrong.append(f"{setting}: {value!r} is no {'number' if kinds[name] is float else 'whole number'}")
    if wrong:
        raise UserError(
            "; ".join(wrong), where="--filter", do="KEY=VALUE with KEY one of " + ", ".join(kinds)
        )
    return made
