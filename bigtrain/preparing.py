"""`bigtrain prepare`: run a preparation, show how far it is, say what came out and what was left out."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from bigtrain.data.filters import filters_of
from bigtrain.data.packing import pack_corpus
from bigtrain.data.prepare import PrepareOptions, PrepareSummary, Progress, prepare
from bigtrain.errors import BigtrainError
from bigtrain.place import discover

_STAGES = {
    "tokenizer": "sampling text",
    "training": "training tokenizer",
    "duplicates": "finding duplicates",
    "encode": "writing shards",
}


class ProgressLine:
    """One line that renews itself on a terminal, or a line every ten seconds in a log."""

    def __init__(self) -> None:
        self._tty = sys.stderr.isatty()
        self._started = self._shown = time.monotonic()
        self._stage = ""

    def __call__(self, progress: Progress) -> None:
        """Show a state, at most five times a second (a log: every ten seconds and at each new stage)."""
        now = time.monotonic()
        begins = progress.stage != self._stage
        if begins:
            self._stage, self._started = progress.stage, now
        elif now - self._shown < (0.2 if self._tty else 10.0):
            return
        self._shown = now
        line = f"{_STAGES[progress.stage]:18s}"
        if progress.stage != "training" and not begins:
            share = progress.done_bytes / max(progress.total_bytes, 1)
            seconds = max(now - self._started, 1e-3)
            speed = progress.done_bytes / seconds
            left = (progress.total_bytes - progress.done_bytes) / speed if speed else 0.0
            line += f" {share:4.0%}  {speed / 1e6:6.1f} MB/s  {progress.documents:,} documents"
            if progress.tokens:
                line += f"  {progress.tokens / seconds / 1e3:,.0f}k tokens/s"
            line += f"  {left:.0f} s left" if seconds > 2 else ""
        print(
            f"\r\x1b[K{line}" if self._tty else line,
            end="" if self._tty else "\n",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        """Clear the line."""
        if self._tty:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def prepare_and_report(options: PrepareOptions) -> PrepareSummary:
    """Prepare with progress on standard error and a summary on standard output, of rank 0 alone."""
    if discover().rank > 0:
        return prepare(options)
    line = ProgressLine()
    try:
        summary = prepare(options, line)
    finally:
        line.close()
    print(describe(summary))
    return summary


def describe(summary: PrepareSummary) -> str:
    """The summary in a few aligned lines."""
    if summary.already_done:
        lines = [f"dataset          {summary.out} is already prepared from exactly this; nothing to do"]
    else:
        lines = [
            f"dataset          {summary.out} in {summary.seconds:.0f} s, vocabulary {summary.vocab_size:,}"
        ]
    if summary.encoder != "sentencepiece":
        lines.append(
            f"encoder          {summary.encoder}, which gave SentencePiece's ids on a sample of the text"
        )
    lines += [f"encoder          {note}" for note in summary.notes]
    for split, total in summary.splits.items():
        lines.append(
            f"{split:16s} {total['tokens']:,} tokens, {total['documents']:,} documents, "
            f"{total['text_bytes'] / 1e6:.1f} MB of text"
        )
    if summary.skipped:
        counts = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in summary.skipped.items())
        lines.append(f"left out, mended {counts}")
        lines += [f"                 {example}" for example in summary.examples[:5]]
    if summary.ignored:
        some = sorted(summary.ignored.items(), key=lambda item: -item[1])[:5]
        lines.append("not text by name " + ", ".join(f"{count:,} x {suffix}" for suffix, count in some))
    return "\n".join(lines)


def prepare_command(args: argparse.Namespace) -> int:
    """Run the verb. Under mpirun rank 0 speaks for all, also of errors."""
    try:
        return _prepare(args)
    except BigtrainError as e:
        if discover().rank == 0:
            raise
        return e.exit_code


def _prepare(args: argparse.Namespace) -> int:
    prepare_and_report(
        PrepareOptions(
            inputs=tuple(args.inputs),
            out=Path(args.out),
            tokenizer=Path(args.tokenizer) if args.tokenizer else None,
            tokenizer_kind=args.tokenizer_kind,
            vocab_size=args.vocab_size,
            byte_fallback=not args.no_byte_fallback,
            tokenizer_sample_mb=args.tokenizer_sample_mb,
            validation_fraction=args.validation_fraction,
            text_key=args.text_key,
            chat_key=args.chat_key,
            prompt_key=args.prompt_key,
            response_key=args.response_key,
            chat_template=args.chat_template,
            filters=filters_of(args.quality, args.filter),
            dedup=args.dedup,
            dedup_threshold=args.dedup_threshold,
            bad_utf8=args.bad_utf8,
            max_bad=args.max_bad,
            exclude=tuple(args.exclude),
            seed=args.seed,
            overwrite=args.overwrite,
            workers=args.workers,
            encoder=args.encoder,
            unit_mb=args.unit_mb,
        )
    )
    return 0


def pack_command(args: argparse.Namespace) -> int:
    """Run the verb `pack`."""
    folder, size = Path(args.corpus), args.sequence_length

    def tell(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[Kpacking {done:,} of {total:,} shards", end="", file=sys.stderr, flush=True)

    packed = pack_corpus(folder, size, workers=args.workers or len(os.sched_getaffinity(0)), tell=tell)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    for split, infos in packed.items():
        sequences, tokens = sum(i.sequences for i in infos), sum(i.tokens for i in infos)
        documents, cut = sum(i.documents for i in infos), sum(i.cut for i in infos)
        padding = 1 - tokens / (sequences * size) if sequences else 0.0
        print(
            f"{split:16s} {sequences:,} sequences of {size:,} tokens, {padding:.3%} padding; {cut:,} of {documents:,} "
            "documents are longer and cut"
        )
    return 0
