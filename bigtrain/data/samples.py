"""What sample g of a run holds: which tokens of which source. A pure function of the sources, the stages and the seed.

A blend (blend.py) says which source it is and which of that source's samples; the source's windows (order.py) or packs
(packing.py) say where its tokens are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bigtrain.data.blend import Blend, Stage, quotas
from bigtrain.data.corpus import Corpus
from bigtrain.data.order import Windows, key


class Piece(NamedTuple):
    """Consecutive tokens of a corpus that are a part of one sequence; the target of the last is the token behind."""

    corpus: Corpus
    start: int
    size: int


Row = tuple[Piece, ...]
"""One sequence: pieces one after another, together at most the sequence length."""


class Origin(NamedTuple):
    """Where a sample comes from."""

    source: int
    epoch: int
    window: int
    row: Row


class Samples:
    """Samples of a run over one or several corpora."""

    def __init__(
        self,
        sources: Mapping[str, Corpus],
        stages: Sequence[Stage],
        lengths: Sequence[int],
        seed: int,
        *,
        end: int | None = None,
    ) -> None:
        """`sources` by name, in the order of the stages' quotas; `lengths`: sequence length S of every stage.

        `end`: there are no samples from this one on (None: there always are).
        """
        assert len(stages) == len(lengths)
        self.end = end
        self.names = tuple(sources)
        self.corpora = tuple(sources.values())
        self.lengths = tuple(lengths)
        self.blend = Blend(stages, seed)
        self._seed = seed
        # A change of the sequence length begins every source anew: which tokens the former windows have left
        # cannot be cut into new ones, and a whole new epoch reads each token once.
        self._anew = [0]
        for i in range(1, len(stages)):
            self._anew.append(self._anew[-1] if lengths[i] == lengths[i - 1] else i)
        self._windows: dict[tuple[int, int], Windows] = {}

    @classmethod
    def single(cls, corpus: Corpus, sequence_length: int, seed: int) -> Samples:
        """Of one corpus, in one stage."""
        return cls({"data": corpus}, [Stage(0, quotas([1]))], [sequence_length], seed)

    def length_of(self, sample: int) -> int:
        """Sequence length S of a sample."""
        return self.lengths[self.blend.stage_of(sample)]

    def windows(self, source: int, stage: int) -> Windows:
        """How a source is cut in a stage. UserError if it is shorter than one sequence."""
        anew = self._anew[stage]
        if (source, anew) not in self._windows:
            # The first source of a run is read as if it were the only one.
            seed = key(self._seed, 4, source, self.blend.stages[anew].start) if source or anew else self._seed
            corpus = self.corpora[source]
            windows = Windows(corpus.num_tokens, self.lengths[stage], seed, where=corpus.where)
            self._windows[source, anew] = windows
        return self._windows[source, anew]

    def check(self) -> None:
        """UserError if a source is shorter than one sequence of a stage that reads it."""
        for number, stage in enumerate(self.blend.stages):
            for source, quota in enumerate(stage.quotas):
                if quota:
                    self.windows(source, number)

    def origin(self, sample: int) -> Origin:
        """Where sample g >= 0 comes from."""
        number = self.blend.stage_of(sample)
        source, ordinal = self.blend.place(sample)
        ordinal -= int(self.blend.before(self._anew[number])[source])
        windows, corpus, S = self.windows(source, number), self.corpora[source], self.lengths[number]
        epoch, window = windows.order.window_of(ordinal)
        return Origin(source, epoch, window, (Piece(corpus, windows.offset(epoch) + window * S, S),))

    def epochs(self, samples: int) -> list[float]:
        """How often the first `samples` samples read each source."""
        found = [0.0] * len(self.corpora)
        for anew in sorted(set(self._anew)):
            start = self.blend.stages[anew].start
            until = next((self.blend.stages[i].start for i in self._anew if i > anew), samples)
            if start >= samples:
                break
            read = self.blend.consumed(min(until, samples)) - self.blend.before(anew)
            for source, count in enumerate(read.tolist()):
                found[source] += count / self.windows(source, anew).num_windows if count else 0
        return found

    def rows(self, samples: Sequence[int]) -> list[Row]:
        """The sequences of samples."""
        return [self.origin(sample).row for sample in samples]

    @property
    def in_order(self) -> int:
        """Sequences of the first stage's length when all corpora are read from front to back."""
        return sum(self._rooms)

    @property
    def _rooms(self) -> list[int]:
        return [-(-max(corpus.num_tokens - 1, 0) // self.lengths[0]) for corpus in self.corpora]

    def front_to_back(self, count: int) -> list[Row]:
        """The first sequences of every corpus, together at most `count`, in the proportions of the first stage.

        The last sequence of a corpus may be cut short. One that is too short for its share leaves it to the others.
        """
        found: list[Row] = []
        S = self.lengths[0]
        shares = _shares(count, self.blend.stages[0].quotas, self._rooms)
        for corpus, share in zip(self.corpora, shares, strict=True):
            starts = range(0, share * S, S)
            found += [(Piece(corpus, start, min(S, corpus.num_tokens - start)),) for start in starts]
        return found


def _shares(count: int, weights: Sequence[int], rooms: Sequence[int]) -> list[int]:
    """Up to `count` in proportion to the weights, none above its room (sources of weight 0 come last)."""
    if count >= sum(rooms):
        return list(rooms)
    found = [0] * len(rooms)
    for _ in range(count):
        free = (i for i in range(len(rooms)) if found[i] < rooms[i])
        found[max(free, key=lambda i: (weights[i] / (found[i] + 1), -i))] += 1
    return found
