"""What sample g of a run holds: which tokens of which source. A pure function of the sources, the stages and the seed.

A blend (blend.py) says which source it is and which of that source's samples; the source's windows (order.py) or packs
(packing.py) say where its tokens are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from bigtrain.data.blend import Blend, Stage, quotas
from bigtrain.data.corpus import Corpus
from bigtrain.data.order import SampleOrder, Windows, key
from bigtrain.data.packing import Packs
from bigtrain.errors import UserError


class Piece(NamedTuple):
    """Consecutive tokens of a corpus that are a part of one sequence; the target of the last is the token behind."""

    corpus: Corpus
    start: int
    size: int


Row = tuple[Piece, ...]
"""One sequence: pieces one after another, together at most the sequence length."""


class Cut(Protocol):
    """How a corpus becomes sequences: which there are, and in which order."""

    @property
    def order(self) -> SampleOrder:
        """Its sequences in every epoch."""

    def row(self, epoch: int, window: int) -> Row:
        """What sequence number `window` holds in an epoch."""


class Chunks:
    """Documents one after another, cut every S tokens."""

    def __init__(self, corpus: Corpus, size: int, seed: int) -> None:
        """UserError if the corpus is shorter than one sequence."""
        self._corpus = corpus
        self._windows = Windows(corpus.num_tokens, size, seed, where=corpus.where)
        self.order = self._windows.order

    def row(self, epoch: int, window: int) -> Row:
        """See `Cut`."""
        size = self._windows.sequence_length
        return (Piece(self._corpus, self._windows.offset(epoch) + window * size, size),)


class BestFit:
    """Whole documents, packed by `bigtrain pack`."""

    def __init__(self, corpus: Corpus, size: int, seed: int) -> None:
        """UserError if the corpus was not packed, or is empty."""
        if corpus.folder is None:
            raise UserError(
                'data.packing = "best_fit" needs a corpus that bigtrain prepared, and this is a Megatron one',
                where=corpus.where,
                do='set data.packing = "chunk"',
            )
        self._corpus, self._packs = corpus, Packs.open(corpus.folder, corpus.split, size, corpus.local)
        if not self._packs.count:
            raise UserError("has no documents", where=corpus.where, do="prepare more text")
        self.order = SampleOrder(self._packs.count, seed)

    def row(self, epoch: int, window: int) -> Row:
        """See `Cut`: the same documents in every epoch."""
        return tuple(Piece(self._corpus, start, size) for start, size in self._packs.parts(window))


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
        cut: Callable[[Corpus, int, int], Cut] = Chunks,
        end: int | None = None,
    ) -> None:
        """`sources` by name, in the order of the stages' quotas; `lengths`: sequence length S of every stage.

        `cut`: how a corpus becomes sequences of S tokens, by a seed.
        `end`: there are no samples from this one on (None: there always are).
        """
        assert len(stages) == len(lengths)
        self.end = end
        self.make_cut = cut
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
        self._cuts: dict[tuple[int, int], Cut] = {}

    @classmethod
    def single(cls, corpus: Corpus, sequence_length: int, seed: int) -> Samples:
        """Of one corpus, in one stage."""
        return cls({"data": corpus}, [Stage(0, quotas([1]))], [sequence_length], seed)

    def length_of(self, sample: int) -> int:
        """Sequence length S of a sample."""
        return self.lengths[self.blend.stage_of(sample)]

    def cut(self, source: int, stage: int) -> Cut:
        """The sequences of a source in a stage. UserError if it has none."""
        anew = self._anew[stage]
        if (source, anew) not in self._cuts:
            # The first source of a run is read as if it were the only one.
            seed = key(self._seed, 4, source, self.blend.stages[anew].start) if source or anew else self._seed
            self._cuts[source, anew] = self.make_cut(self.corpora[source], self.lengths[stage], seed)
        return self._cuts[source, anew]

    def epoch(self, source: int, stage: int) -> int:
        """Samples in one epoch of a source in a stage."""
        return self.cut(source, stage).order.num_windows

    def check(self) -> None:
        """UserError if a source is shorter than one sequence of a stage that reads it."""
        for number, stage in enumerate(self.blend.stages):
            for source, quota in enumerate(stage.quotas):
                if quota:
                    self.cut(source, number)

    def origin(self, sample: int) -> Origin:
        """Where sample g >= 0 comes from."""
        number = self.blend.stage_of(sample)
        source, ordinal = self.blend.place(sample)
        ordinal -= int(self.blend.before(self._anew[number])[source])
        cut = self.cut(source, number)
        epoch, window = cut.order.window_of(ordinal)
        return Origin(source, epoch, window, cut.row(epoch, window))

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
                found[source] += count / self.epoch(source, anew) if count else 0
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
