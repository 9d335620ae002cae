"""`bigtrain data show`: the documents that a step reads, found by formula and binary search."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bigtrain.budget import BatchSchedule, LeftOut, Progress, sample_id, united
from bigtrain.config import Config
from bigtrain.configfile import find_config, load
from bigtrain.data.find import documents_at
from bigtrain.data.samples import Samples
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.errors import UserError
from bigtrain.metrics import read_records
from bigtrain.run_data import samples_of


@dataclass(frozen=True)
class ShownDocument:
    """A document, or a part of one, in a sample."""

    shard: str
    document: int
    """Number in the shard, from 0."""
    begins: int
    """Token of the document that the sample has first."""
    tokens: int
    """Of it in the sample."""
    of: int
    """Of the whole document."""
    text: str
    """Its beginning in the sample."""


@dataclass(frozen=True)
class ShownSample:
    """One sequence of a step."""

    sample: int
    source: str
    epoch: int
    """From 0."""
    window: int
    documents: list[ShownDocument]


@dataclass(frozen=True)
class Reading:
    """What is known of a run, or of one to come: its config, what it leaves out and which steps it has made."""

    config: Config
    left_out: LeftOut = ()
    metrics: Path | None = None

    @staticmethod
    def of(given: str, overrides: Sequence[str] = ()) -> Reading:
        """Of a run directory, a config file or a shipped config. UserError if it is none of these."""
        run = Path(given)
        if not (run / "config.toml").is_file():
            config = load(find_config(given), overrides)
            return Reading(config, united(config.data.skipped))
        config, metrics = load(run / "config.toml", overrides), run / "metrics.jsonl"
        ranges = config.data.skipped
        for record in read_records(metrics):
            if record.get("kind") == "event" and record.get("name") == "rollback":
                ranges.append((record["data"]["first_sample"], record["data"]["last_sample"]))
        return Reading(config, united(ranges), metrics)

    def samples_of_step(self, step: int) -> list[int]:
        """The samples that optimizer step `step` (from 1) reads. UserError for a step that the run does not make."""
        schedule = BatchSchedule.of(self.config)
        before, after = self._made(step)
        total = schedule.total_steps(self.config, before, self.left_out)
        if not 1 <= step <= max(total, after.step):
            raise UserError(f"the run has steps 1 to {total:,}, not {step:,}", where="--step")
        first = schedule.ahead(before, step - 1, self.left_out).samples
        size, _ = schedule.at(step - 1, sample_id(first, self.left_out))
        end = after.samples if after.step == step else first + size
        return [sample_id(n, self.left_out) for n in range(first, end)]

    def _made(self, step: int) -> tuple[Progress, Progress]:
        """Where the run stood at the last recorded step before `step`, and at `step` if that is recorded.

        The global batch may have changed when the run was resumed, which the config of today does not say.
        """
        before = after = Progress()
        for record in read_records(self.metrics) if self.metrics is not None else ():
            if record.get("kind") == "step":
                progress = Progress(record["step"], record["samples"], record["tokens"])
                if progress.step < step:
                    before = progress
                elif progress.step == step:
                    after = progress
        return before, after


def show(samples: Samples, wanted: Sequence[int], *, characters: int = 60) -> Iterator[ShownSample]:
    """Samples with their documents, and so many characters of each. UserError for damaged shards."""
    tokenizer = Tokenizer.load(samples.corpora[0].tokenizer_path)
    for sample in wanted:
        origin = samples.origin(sample)
        documents = []
        for corpus, start, size in origin.row:
            for found in documents_at(corpus, start, size):
                # A character takes a few tokens at most (UTF-8 bytes).
                ids = corpus.read(found.start, min(found.size, 4 * characters))
                text = tokenizer.decode(ids)[:characters]
                name = found.shard.name
                documents.append(
                    ShownDocument(name, found.document, found.begins, found.size, found.tokens, text)
                )
        yield ShownSample(sample, samples.names[origin.source], origin.epoch, origin.window, documents)


def data_command(args: argparse.Namespace) -> int:
    """Run the verb `data show`."""
    reading = Reading.of(args.config, args.overrides)
    if (args.step is None) == (not args.sample):
        raise UserError("give a step or samples", where="bigtrain data show", do="--step N, or --sample G")
    if args.text < 1 or min(args.sample, default=0) < 0:
        raise UserError("--text must be 1 or more, --sample 0 or more")
    wanted = args.sample or reading.samples_of_step(args.step)
    samples = samples_of(reading.config)
    if not args.json and args.step is not None:
        print(f"step {args.step:,}: {len(wanted):,} sequences of {samples.length_of(wanted[0]):,} tokens")
    for shown in show(samples, wanted, characters=args.text):
        print(json.dumps(asdict(shown), ensure_ascii=False) if args.json else _lines(shown))
    return 0


def _lines(shown: ShownSample) -> str:
    head = f"sample {shown.sample}  {shown.source}, epoch {shown.epoch}, window {shown.window}"
    lines = []
    for d in shown.documents:
        part = "" if d.tokens == d.of else f" {d.begins:,} to {d.begins + d.tokens - 1:,} of"
        place = f"{d.shard} document {d.document},{part} {d.of:,} tokens"
        lines.append(f"  {place}  {json.dumps(d.text, ensure_ascii=False)}")
    return "\n".join([head, *lines])
