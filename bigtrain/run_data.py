"""From a config's [data] to the samples of a run, and whether a run that goes on would read the same ones as before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bigtrain.budget import united
from bigtrain.config import Config
from bigtrain.data.blend import Stage, quotas, within_limits
from bigtrain.data.cached import is_url
from bigtrain.data.corpus import Corpus
from bigtrain.data.manifest import Split
from bigtrain.data.samples import BestFit, Chunks, Samples
from bigtrain.errors import UserError


def samples_of(config: Config) -> Samples:
    """The samples that a config asks for.

    Raises UserError when a source is not there, damaged, too short for a sequence or of another tokenizer, and when
    weights cannot be kept.
    """
    corpora = _open(config, "train")
    in_stages = config.data.in_stages
    lengths = [length for length, _ in in_stages.values()]
    weights = [[by_name.get(name, 0.0) for name in corpora] for _, by_name in in_stages.values()]
    try:
        stages = [Stage(start, quotas(each)) for start, each in zip(in_stages, weights, strict=True)]
    except ValueError as e:
        raise UserError(str(e), where="data.sources", do="leave out sources that are hardly read") from e
    cut = BestFit if config.data.packing == "best_fit" else Chunks
    samples = Samples(corpora, stages, lengths, config.train.seed, cut=cut)
    samples.check()
    return _reweighted(config, samples, weights) if config.data.at_limit == "reweight" else samples


def held_out_samples(config: Config) -> Samples | None:
    """The held-out texts of all sources, in the proportions of the first stage; None if there are none.

    Raises UserError as `samples_of`.
    """
    corpora = _open(config, "validation")
    if not corpora:
        return None
    weights = [config.data.corpora[name].weight for name in corpora]
    stage = Stage(0, quotas(weights if any(weights) else [1.0] * len(weights)))
    return Samples(corpora, [stage], [config.data.sequence_length], config.train.seed)


def _open(config: Config, split: Split) -> dict[str, Corpus]:
    """Every source, all of one tokenizer."""
    opened: dict[str, Corpus] = {}
    for name, source in config.data.corpora.items():
        if split != "train" and not (is_url(source.path) or Path(source.path).is_dir()):
            continue  # a Megatron corpus has no other split
        corpus = Corpus.open(source.path, split, tokenizer=source.tokenizer, cache=config.data.cache)
        if split == "train" or corpus.num_tokens > 1:
            opened[name] = corpus
    first = next(iter(opened), "")
    for name, corpus in opened.items():
        if corpus.tokenizer_sha256 != opened[first].tokenizer_sha256:
            raise UserError(
                f"source {name} is tokenized by another model ({corpus.tokenizer_path}) than source {first} "
                f"({opened[first].tokenizer_path})",
                where=f"data.sources.{name}",
                do=f"prepare it again with --tokenizer {opened[first].tokenizer_path}",
            )
    return opened


def _reweighted(config: Config, samples: Samples, weights: Sequence[Sequence[float]]) -> Samples:
    """The same with sources that end at their max_epochs."""
    most = [source.max_epochs for source in config.data.corpora.values()]
    stages, lengths = [], {}
    for number, stage in enumerate(samples.blend.stages):
        limits = [
            None if epochs is None else epochs * samples.epoch(i, number) for i, epochs in enumerate(most)
        ]
        stages.append((stage.start, weights[number], limits))
        lengths[stage.start] = samples.lengths[number]
    limited, end = within_limits(stages, config.train.seed)
    of_each = [lengths[max(start for start in lengths if start <= stage.start)] for stage in limited]
    corpora = dict(zip(samples.names, samples.corpora, strict=True))
    return Samples(corpora, limited, of_each, config.train.seed, cut=samples.make_cut, end=end)


def check_limits(config: Config, samples: Samples, last: int) -> None:
    """UserError when a run up to the sample `last` reads a source too often, or there are not so many samples."""
    if samples.end is not None and last >= samples.end:
        raise UserError(
            f"all sources have reached their max_epochs after {samples.end:,} samples, and the run reads {last + 1:,}",
            where="data.sources",
            do="shorten the run, raise a max_epochs, or add a source without one",
        )
    epochs = samples.epochs(last + 1)
    found = [
        f"{name} would be read {times:.2f} times, its max_epochs is {source.max_epochs:g}"
        for (name, source), times in zip(config.data.corpora.items(), epochs, strict=True)
        if source.max_epochs is not None and times > source.max_epochs * (1 + 1e-9)
    ]
    if found:
        raise UserError(
            "; ".join(found),
            where="data.sources",
            do='shorten the run, lower the weight, raise max_epochs, or set data.at_limit = "reweight"',
        )


def shares(samples: Samples, first: int, last: int) -> str:
    """How often samples first .. last - 1 read each source, for people: "web 0.41 times, code 1.83 times"."""
    before, after = samples.epochs(first), samples.epochs(last)
    return ", ".join(
        f"{name} {b - a:.2f} times" for name, a, b in zip(samples.names, before, after, strict=True) if b > a
    )


def facts(config: Config, samples: Samples) -> dict[str, Any]:
    """What decides which tokens sample g holds, as JSON, for a checkpoint."""
    return {
        "data": samples.corpora[0].manifest_hash,
        "seed": config.train.seed,
        "sequence_length": config.data.sequence_length,
        "order": {
            "sources": [
                [name, c.manifest_hash] for name, c in zip(samples.names, samples.corpora, strict=True)
            ],
            "stages": [
                [stage.start, list(stage.quotas), length]
                for stage, length in zip(samples.blend.stages, samples.lengths, strict=True)
            ],
            "packing": config.data.packing,
            "skip": config.data.skip,
        },
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any], samples: int, sample: int) -> list[str]:
    """Why what a run has read, `samples` samples before number `sample`, is not what it would read now.

    `then` are the `facts` of its checkpoint. Sources may be appended, and stages and skipped samples may be added
    where the run has not been. A checkpoint of an older version holds no "order".
    """
    keys = ("data", "seed", "sequence_length")
    found = [
        f"{key}: {then[key]} there, {now[key]} here" for key in keys if then.get(key, now[key]) != now[key]
    ]
    if found or "order" not in then or samples == 0:
        return found
    there, here = then["order"], now["order"]
    for (name, old), (_, new) in zip(there["sources"], here["sources"], strict=False):
        if old != new:
            found.append(f"data.sources.{name}: content {old} there, {new} here")
    if len(there["sources"]) > len(here["sources"]):
        found.append(
            f"data.sources: {len(there['sources'])} there, {len(here['sources'])} here; append new ones only"
        )
    if there["packing"] != here["packing"]:
        found.append(f"data.packing: {there['packing']} there, {here['packing']} here")
    if (old := _past(there, sample)) != (new := _past(here, sample)):
        found.append(
            f"data.stages before sample {sample}: {old} there, {new} here (start, samples in a block, length)"
        )
    if (old := _clipped(there["skip"], sample)) != (new := _clipped(here["skip"], sample)):
        found.append(f"data.skip before sample {sample}: {old} there, {new} here")
    return found


def _past(order: Mapping[str, Any], sample: int) -> list[list[Any]]:
    """Stages that begin before a sample, without sources that they do not read at the end."""
    found = []
    for start, quotas_, length in order["stages"]:
        while quotas_ and quotas_[-1] == 0:
            quotas_ = quotas_[:-1]
        if start < sample:
            found.append([start, quotas_, length])
    return found


def _clipped(ranges: Sequence[Sequence[int]], sample: int) -> list[tuple[int, int]]:
    return united((first, min(last, sample - 1)) for first, last in ranges if first < sample)
