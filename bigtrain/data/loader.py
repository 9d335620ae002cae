"""Sample numbers in, batches out: sequences of the corpora with their targets and document boundaries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from bigtrain.data.masking import mask_tokens
from bigtrain.data.order import Ints
from bigtrain.data.prefetch import Prefetch
from bigtrain.data.samples import Row, Samples
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.errors import RunError, UserError
from bigtrain.model.batch import IGNORE, Batch

Step = list[list[int]]
"""Sample ids of one optimizer step: one list a microbatch."""


class Loader:
    """Makes batches from corpora. `batch` is a pure function; only `stream` has a thread.

    Causal: S tokens and the S that follow them. The target at the end of a document is IGNORE under `document_mask`,
    for the next token belongs to another document; so is, of a conversation, what is no response. Masked: S tokens
    with some hidden, the hidden ones as targets.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        seed: int,
        document_mask: bool = True,
        objective: Literal["causal", "masked"] = "causal",
        mask_rate: float = 0.15,
        mask_id: int | None = None,
        vocab_size: int | None = None,
        prefetch: int = 4,
    ) -> None:
        """`vocab_size` is the model's; `prefetch` counts steps, 0 reads in the consumer's thread.

        All corpora have one tokenizer. UserError if the model's vocabulary is smaller than the tokenizer's, or the
        masked objective has no `mask_id`.
        """
        corpus = samples.corpora[0]
        if vocab_size is not None and vocab_size < corpus.vocab_size:
            raise UserError(
                f"model.vocab_size {vocab_size} is smaller than the tokenizer's {corpus.vocab_size}",
                where=corpus.where,
                do=f"set model.vocab_size to {corpus.vocab_size} or more",
            )
        if objective == "masked" and mask_id is None:
            raise UserError(
                "the masked objective needs a tokenizer with a control piece <mask>",
                where=str(corpus.tokenizer_path),
                do="prepare the corpus with a tokenizer that bigtrain trains",
            )
        self.samples = samples
        self.corpus = corpus
        self.seed = seed
        self.document_mask = document_mask
        self.mask_rate = mask_rate
        self.mask_id = mask_id if objective == "masked" else None
        self.prefetch = prefetch
        self._pin = torch.cuda.is_available()
        self._reading: Prefetch[list[Batch]] | None = None

    @cached_property
    def _ordinary(self) -> Ints:
        """Ids that may be hidden, or put in place of a hidden one: all but the control ids."""
        special = Tokenizer.load(self.corpus.tokenizer_path).special_ids
        return np.setdiff1d(np.arange(self.corpus.vocab_size), np.array(special, np.int64))

    def batch(self, sample_ids: Sequence[int]) -> Batch:
        """Samples of the run, B = len(sample_ids) rows. The same ids give the same batch, always.

        UserError if a shard is damaged.
        """
        rows = self.samples.rows(sample_ids)
        return self._make(sample_ids, rows, self.samples.length_of(sample_ids[0]))

    def validation_windows(self) -> int:
        """Sequences in the corpora read from front to back, the last one of each possibly cut short."""
        return self.samples.in_order

    def validation_batches(
        self, n_sequences: int, microbatch: int, *, rank: int = 0, ranks: int = 1
    ) -> Iterator[Batch]:
        """The first `n_sequences` sequences from front to back (all, if there are fewer), this rank's share.

        Of several corpora: see Samples.front_to_back. Every batch has `microbatch` rows and every rank equally many
        batches; rows beyond the sequences, and the end of one cut short, are padding with target IGNORE.
        UserError if the corpora have no token to predict.
        """
        rows = self.samples.front_to_back(n_sequences)
        if not rows:
            raise UserError(
                "there is nothing to evaluate on: the split is empty",
                where=self.corpus.where,
                do="prepare the corpus with a larger validation_fraction",
            )
        stride = microbatch * ranks
        for first in range(rank * microbatch, -(-len(rows) // stride) * stride, stride):
            mine = range(first, first + microbatch)
            yield self._make(mine, [rows[r] if r < len(rows) else () for r in mine], self.samples.lengths[0])

    def _make(self, sample_ids: Sequence[int], rows: Sequence[Row], S: int) -> Batch:
        """The pieces of each row one after another; what is left of S tokens is padding."""
        tokens = np.zeros((len(rows), S), np.int64)
        targets = np.full((len(rows), S), IGNORE, np.int64)
        new = np.zeros(tokens.size + 1, bool)  # where a document, or a piece of one, starts
        new[::S] = True
        sizes = []
        for row, pieces in enumerate(rows):
            size = 0
            for corpus, start, count in pieces:
                read = corpus.read(start, min(count + 1, corpus.num_tokens - start))
                tokens[row, size : size + count] = read[:count]
                following = read[1:]
                if corpus.masked:
                    following = np.where(corpus.read_mask(start + 1, len(following)), following, IGNORE)
                targets[row, size : size + len(following)] = following
                new[row * S + size] = True
                size += count
            new[row * S + size] = True
            sizes.append(size)
        is_end = tokens == self.corpus.eos_id
        if self.mask_id is not None:
            tokens, targets = self._hide(tokens, sample_ids)
            for row, size in enumerate(sizes):
                targets[row, size:] = IGNORE
        elif self.document_mask:
            targets[is_end] = IGNORE
        new[1:] |= is_end.ravel()
        cu_seqlens = np.flatnonzero(new).astype(np.int32) if self.document_mask else None
        return self._tensors(tokens, targets, cu_seqlens, sample_ids)

    def _hide(self, tokens: Ints, sample_ids: Sequence[int]) -> tuple[Ints, Ints]:
        assert self.mask_id is not None
        return mask_tokens(
            tokens,
            sample_ids,
            seed=self.seed,
            rate=self.mask_rate,
            mask_id=self.mask_id,
            ordinary=self._ordinary,
        )

    def _tensors(
        self, tokens: Ints, targets: Ints, cu_seqlens: np.ndarray | None, sample_ids: Sequence[int]
    ) -> Batch:
        def tensor(array: np.ndarray) -> torch.Tensor:
            made = torch.from_numpy(np.ascontiguousarray(array))
            return made.pin_memory() if self._pin else made

        return Batch(
            tokens=tensor(tokens),
            targets=tensor(targets),
            cu_seqlens=None if cu_seqlens is None else tensor(cu_seqlens),
            sample_ids=tensor(np.array(sample_ids, np.int64)),
        )

    def stream(self, plan: Iterable[Step]) -> Iterator[list[Batch]]:
        """For each step of `plan` its microbatches, read ahead; an earlier stream is closed.

        An error of the reading thread is raised here and names the samples: UserError for a damaged corpus,
        RunError for anything else.
        """
        self.close()
        self.samples.check()  # too few tokens: say so now, not in the thread
        device = torch.cuda.current_device() if self._pin else None
        steps = self._steps(plan, device)
        if self.prefetch == 0:
            return steps
        self._reading = Prefetch(steps, self.prefetch)
        return self._reading

    def _steps(self, plan: Iterable[Step], device: int | None) -> Iterator[list[Batch]]:
        if device is not None:
            torch.cuda.set_device(device)  # or pinning would open a context on GPU 0 in every process
        for step in plan:
            yield [self._named(sample_ids) for sample_ids in step]

    def _named(self, sample_ids: Sequence[int]) -> Batch:
        try:
            return self.batch(sample_ids)
        except Exception as error:
            shown = ", ".join(map(str, sample_ids[:8])) + (", ..." if len(sample_ids) > 8 else "")
            if isinstance(error, UserError):
                raise UserError(f"{error.what} (samples {shown})", where=error.where, do=error.do) from error
            raise RunError(
                f"could not read samples {shown}: {type(error).__name__}: {error}",
                where=self.corpus.where,
                do="check the disk, then run the same command again: it resumes",
            ) from error

    def close(self) -> None:
        """Stop reading ahead; harmless if nothing is."""
        if self._reading is not None:
            self._reading.close()
            self._reading = None
