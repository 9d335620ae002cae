"""`bigtrain inspect` and `train --dry`: say what a path is, what is in it, and what follows from it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.budget import BatchSchedule, Progress
from bigtrain.config import Config
from bigtrain.configfile import find_config, load, load_undecided, render
from bigtrain.errors import UserError
from bigtrain.grid import grid_of, layout_notes, model_ranks
from bigtrain.metrics import read_records
from bigtrain.plan.flops import flops_per_token, non_embedding_parameters, parameters
from bigtrain.plan.scaling import chinchilla_tokens, peak_learning_rate


def explain(path: str, *, verify: bool = False, overrides: Sequence[str] = ()) -> tuple[str, bool]:
    """A few lines about a run, a checkpoint, a dataset, a shard, a tokenizer or a config; whether it is sound.

    `verify` reads all data and compares checksums. Raises UserError when it is none of these, or is a damaged
    dataset or shard.
    """
    if (stored := _checkpoints_at(path)) is not None:
        return _checkpoints(stored, verify=verify, tensors=len(stored) == 1)
    where = Path(path)
    if (where / "dataset.json").is_file():
        return _dataset(where, verify=verify), True
    if (where / "config.toml").is_file():
        return _run(where, verify=verify)
    if where.suffix in (".bin", ".idx"):
        return _shard(where), True
    if where.suffix == ".model" and where.is_file():
        return _tokenizer(where), True
    if where.exists() and where.suffix != ".toml":
        raise UserError(
            "is no run, checkpoint, dataset, shard, tokenizer or config",
            where=path,
            do="runs hold config.toml, checkpoints manifest.json, datasets dataset.json",
        )
    config, undecided = load_undecided(find_config(path), overrides)
    return explain_config(config, undecided=undecided), True


def explain_checkpoints(path: str, *, verify: bool = False) -> tuple[str, bool]:
    """One JSON object about a checkpoint, a list of them for a run, and whether all are sound.

    Raises UserError when the path is neither.
    """
    from bigtrain.checkpoint.describe import describe
    from bigtrain.checkpoint.format import DamagedError
    from bigtrain.checkpoint.location import place

    told: list[dict[str, Any]] = []
    found = _checkpoints_of(path)
    for checkpoint in found:
        try:
            told.append(describe(checkpoint, verify=verify).to_json())
        except DamagedError as e:  # without a manifest there is nothing else to tell
            told.append({"path": str(checkpoint), "sound": False, "problems": [str(e)]})
    shown = told[0] if found == [place(path)] else told
    return json.dumps(shown, indent=1), all(d["sound"] for d in told)


def explain_difference(first: str, second: str, *, as_json: bool = False) -> tuple[str, bool]:
    """What differs between two checkpoints (of a run: its newest), and whether they are equal.

    Raises UserError when a path is neither, DamagedError when a checkpoint is.
    """
    from bigtrain.checkpoint.compare import compare

    found = compare(*(str(_checkpoints_of(path)[-1]) for path in (first, second)))
    return json.dumps(found.to_json(), indent=1) if as_json else str(found), found.equal


def _checkpoints_at(path: str) -> list[Path] | None:
    """The checkpoint at a path, or those in a folder of nothing else; None when there is something else."""
    from bigtrain.checkpoint.format import step_of
    from bigtrain.checkpoint.location import place, remote
    from bigtrain.checkpoint.store import list_checkpoints

    where = place(path)
    if remote(where):
        found = [where] if step_of(where.name) is not None else list_checkpoints(where)
        if found:
            return found
        raise UserError(
            "holds no checkpoint", where=path, do="give a folder step_NNNNNNNN, or the one they lie in"
        )
    if (where / "manifest.json").is_file() or (step_of(where.name) is not None and where.is_dir()):
        return [where]
    return list_checkpoints(where) or None


def _checkpoints_of(path: str) -> list[Path]:
    """The checkpoint at a path, or those of the run there, oldest first. UserError when there is none."""
    from bigtrain.checkpoint.location import folder_of
    from bigtrain.checkpoint.store import list_checkpoints

    found = _checkpoints_at(path)
    if found is None and (Path(path) / "config.toml").is_file():
        found = list_checkpoints(folder_of(Path(path), load(Path(path) / "config.toml")))
    if found:
        return found
    what = "is neither a checkpoint nor a run" if found is None else "holds no checkpoint"
    do = "--json and a comparison take a folder step_NNNNNNNN, or a run that has saved one"
    raise UserError(what, where=path, do=do)


def explain_pipeline(
    path: str, overrides: Sequence[str] = (), *, ranks: int | None = None, out: str | None = None
) -> str:
    """The timeline of a config's pipeline, drawn as text and as a picture.

    `ranks` decides the data axis and so the microbatches of a step. Raises UserError when the config has no
    pipeline or does not fit so many ranks.
    """
    from bigtrain.parallel.schedule import bubble_formula
    from bigtrain.parallel.split import chunk_costs
    from bigtrain.timeline import explain_schedule

    config, undecided = load_undecided(find_config(path), overrides)
    if undecided:
        raise UserError(
            "the layout is chosen when the ranks start, so there is no schedule yet",
            where='layout = "auto"',
            do="`bigtrain plan CONFIG --gpus N --gpu KIND --layout auto` tells which it will be: write it as [layout]",
        )
    data = grid_of(config, ranks or model_ranks(config)).data
    microbatches = BatchSchedule.of(config).full // (config.train.microbatch * data)
    layout = config.layout
    costs = chunk_costs(config) if layout.pipeline > 1 else None
    picture = Path(out or f"{config.name}-schedule.png")
    shown = min(microbatches, 4 * layout.pipeline)  # more of the same would only make boxes too small to read
    text = explain_schedule(config, picture, microbatches=shown, costs=costs)
    if shown == microbatches:
        return text
    bubble = bubble_formula(layout.schedule, layout.pipeline, layout.chunks, microbatches)
    whole = f"a step has {microbatches} of them, bubble {bubble:.1%} by the formula"
    return f"{text}\ndrawn with {shown} microbatches; {whole}"


def explain_config(config: Config, *, full: bool = False, undecided: bool = False) -> str:
    """What a config means; `full` adds the resolved config itself. Reads the dataset if it is there.

    A layout that is `undecided` is chosen when the ranks start.
    """
    grid_of(config, 1)
    lines = [*_model_lines(config), *_budget_lines(config), *_data_lines(config)]
    if undecided:
        lines.append(
            _line("layout", "auto: chosen when the ranks start; what follows is of one data-parallel rank")
        )
    else:
        lines += _layout_lines(config)
    lines += _state_lines(config)
    return (render(config) + "\n" if full else "") + "\n".join(lines)


def _line(name: str, text: str) -> str:
    return f"{name:17s}{text}"


def _model_lines(config: Config) -> list[str]:
    m, S = config.model, config.data.sequence_length
    total, inner = parameters(m), non_embedding_parameters(m)
    flops = flops_per_token(m, S)
    shape = f"{m.layers} layers, width {m.width}"
    if m.kind == "transformer":
        shape += f", {m.num_heads} heads ({m.num_kv_heads} kv) of {m.dim_per_head}, ffn {m.ffn}"
    return [
        _line("model", f"{m.kind}, {m.objective}: {shape}, vocabulary {m.vocab_size:,}"),
        _line("parameters", f"{total:,} ({inner:,} without embeddings)"),
        _line("FLOPs", f"{flops.forward:.4g} a token forward, {flops.training:.4g} in training (S = {S:,};"),
        _line("", f"{flops.training_visible:.4g} counting only the keys that a query sees)"),
    ]


def _budget_lines(config: Config) -> list[str]:
    schedule = BatchSchedule.of(config)
    steps = schedule.total_steps(config, Progress())
    tokens = schedule.ahead(Progress(), steps).tokens
    flops = flops_per_token(config.model, config.data.sequence_length).training * tokens
    good = chinchilla_tokens(parameters(config.model))
    lr = peak_learning_rate(config, tokens)
    return [
        _line(
            "batch", f"{schedule.full:,} sequences, {schedule.full * config.data.sequence_length:,} tokens"
        ),
        _line("run", f"{steps:,} steps, {tokens:,} tokens, {flops:.3g} FLOPs"),
        _line("", f"{tokens / parameters(config.model):.1f} tokens a parameter ({good.source})"),
        _line(
            "learning rate",
            f"{lr.value:.3g}, {config.optim.kind}, {config.optim.schedule} after "
            f"{config.optim.warmup_steps} warm-up steps; {lr.source}"
            + (" (outside the range it was fitted on)" if lr.extrapolated else ""),
        ),
    ]


def _data_lines(config: Config) -> list[str]:
    """What a run reads, and how often. Nothing is read but manifests and indexes."""
    from bigtrain.run_data import samples_of, shares

    missing = [source.path for source in config.data.corpora.values() if not _is_prepared(source.path)]
    if missing:
        return [_line("data", f"{path} is not prepared yet") for path in missing]
    samples = samples_of(config)
    most = max(corpus.vocab_size for corpus in samples.corpora)
    if most > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size {config.model.vocab_size} is smaller than the tokenizer's {most}",
            where=samples.corpora[0].where,
            do=f"set model.vocab_size to {most} or more",
        )
    schedule = BatchSchedule.of(config)
    end = schedule.ahead(Progress(), schedule.total_steps(config, Progress()))
    lines = [
        _line("data", f"{source.path}: {corpus.num_tokens:,} tokens")
        for source, corpus in zip(config.data.corpora.values(), samples.corpora, strict=True)
    ]
    return [*lines, _line("read", shares(samples, 0, end.samples))]


def _is_prepared(path: str) -> bool:
    from bigtrain.data.cached import is_url

    return is_url(path) or (Path(path) / "dataset.json").is_file() or Path(f"{path}.idx").is_file()


def _layout_lines(config: Config) -> list[str]:
    """The axes that a config asks for and the layers of each pipeline piece; nothing where there is none."""
    from bigtrain.parallel.split import layers_of_chunks

    each = model_ranks(config)
    if each == 1:
        return []
    layout = config.layout
    axes = ("pipeline", "context", "tensor")
    named = " x ".join(f"{axis} {getattr(layout, axis)}" for axis in axes if getattr(layout, axis) > 1)
    lines = [_line("layout", f"{named}: {each} ranks or a multiple of it, data takes the rest")]
    if layout.pipeline > 1:
        sizes = ", ".join(str(len(chunk)) for chunk in layers_of_chunks(config))
        lines.append(_line("", f"{layout.schedule}, layers a piece: {sizes} (head with the last)"))
    return lines + [_line("", note) for note in layout_notes(config, each)]


def _state_lines(config: Config) -> list[str]:
    """Memory of weights, gradients and optimizer state by ZeRO level, and the size of a checkpoint."""
    total = parameters(config.model)
    inner = non_embedding_parameters(config.model) / total  # about the share of muon, which keeps one moment
    moments = {"adamw": 2.0, "muon": 2.0 - inner, "sgd": float(config.optim.momentum > 0)}[config.optim.kind]
    weight = 4 if config.train.precision == "fp32" else 2
    master = 0 if config.train.precision == "fp32" else 4
    optimizer = 4 * moments + master
    levels = {
        0: lambda n: weight + 4 + optimizer,
        1: lambda n: weight + 4 + optimizer / n,
        2: lambda n: weight + (4 + optimizer) / n,
        3: lambda n: (weight + 4 + optimizer) / n,
    }
    zero = config.layout.zero
    shared = config.layout.tensor * config.layout.pipeline  # about: norms are not cut, stages not quite equal
    figures = ", ".join(f"{_bytes(total / shared * levels[zero](n))} on {n}" for n in (1, 8, 64))
    each = "ranks" if model_ranks(config) == 1 else "data x context ranks"
    return [
        _line("states a rank", f"ZeRO {zero}, {config.train.precision}: {figures} {each} (no activations)"),
        _line("a checkpoint", f"{_bytes(total * 4 * (1 + moments))} on disk"),
    ]


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def _run(folder: Path, *, verify: bool) -> tuple[str, bool]:
    from bigtrain.checkpoint.location import folder_of
    from bigtrain.checkpoint.store import list_checkpoints

    config = load(folder / "config.toml")
    lines = [_line("run", str(folder)), *_model_lines(config), *_budget_lines(config), ""]
    outcome = folder / "outcome.json"
    if outcome.is_file():
        o = json.loads(outcome.read_text())
        lines.append(
            _line(
                "outcome",
                f"{o['state']} at step {o['step']:,}" + (f": {o['reason']}" if o.get("reason") else ""),
            )
        )
    else:
        lines.append(_line("outcome", "none yet: running, or killed (the same train command resumes)"))
    last = {record["kind"]: record for record in read_records(folder / "metrics.jsonl")}
    if step := last.get("step"):
        text = f"{step['step']:,}, loss {_figure(step['loss'])}, {step['tokens']:,} tokens"
        lines.append(_line("last step", text))
    if evaluation := last.get("eval"):
        figures = f"loss {_figure(evaluation['loss'])}, {_figure(evaluation['bits_per_byte'])} bits per byte"
        lines.append(_line("held out", f"step {evaluation['step']:,}: {figures}"))
    found = list_checkpoints(folder_of(folder, config))
    lines.append(_line("checkpoints", str(len(found))))
    text, sound = _checkpoints(found, verify=verify)
    lines += ["", text]
    lines.append(_line("on disk", _bytes(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()))))
    return "\n".join(lines), sound


def _figure(value: float | None) -> str:
    """Four digits; metrics.jsonl has null where a number was not finite."""
    return "not finite" if value is None else f"{value:.4f}"


def _checkpoints(found: Sequence[Path], *, verify: bool, tensors: bool = False) -> tuple[str, bool]:
    """A paragraph for each checkpoint, and whether all are sound."""
    explained = [_checkpoint(p, verify=verify, tensors=tensors) for p in found]
    return "\n".join(text for text, _ in explained), all(sound for _, sound in explained)


def _checkpoint(folder: Path, *, verify: bool, tensors: bool = False) -> tuple[str, bool]:
    from bigtrain.checkpoint.describe import describe, tensor_lines
    from bigtrain.checkpoint.format import DamagedError

    try:
        found = describe(folder, verify=verify)
    except DamagedError as e:
        return f"checkpoint  {folder}\nDAMAGED     {e}", False
    text = "\n".join([str(found), *(["", *tensor_lines(found)] if tensors else []), ""])
    return text, not found.problems


def _dataset(folder: Path, *, verify: bool) -> str:
    from bigtrain.data.corpus import Corpus
    from bigtrain.data.corpus import verify as verify_dataset
    from bigtrain.data.manifest import read_manifest

    manifest = read_manifest(folder)
    lines = [_line("dataset", str(folder))]
    for name, shards in manifest.splits.items():
        Corpus.open(folder, name)  # type: ignore[arg-type]  # names come from the manifest
        tokens, size = sum(s.tokens for s in shards), sum(s.text_bytes for s in shards)
        lines.append(
            _line(
                name,
                f"{tokens:,} tokens in {len(shards)} shards, {sum(s.documents for s in shards):,} documents, "
                f"{size:,} bytes of text ({size / max(tokens, 1):.2f} bytes a token)",
            )
        )
    lines.append(_line("tokenizer", _tokenizer_text(folder / "tokenizer.model")))
    lines.append(_line("on disk", _bytes(sum(f.stat().st_size for f in folder.iterdir()))))
    state = (
        f"sound: {_bytes(verify_dataset(folder))} read and compared"
        if verify
        else "sizes fit (--verify reads all)"
    )
    lines.append(_line("health", state))
    return "\n".join(lines)


def _shard(path: Path) -> str:
    from bigtrain.data.shards import read_index

    index = read_index(path.with_suffix(".idx"))
    tokens = int(index.lengths.sum())
    data = path.with_suffix(".bin")
    try:
        size = os.path.getsize(data)
    except OSError as e:
        raise UserError(f"cannot read the shard: {e.strerror}", where=str(data), do="check the path") from e
    expected = tokens * np.dtype(index.dtype).itemsize
    if size != expected:
        raise UserError(
            f"has {size} bytes, its index says {expected}: truncated or altered",
            where=str(data),
            do="copy the file again from its source, or prepare the corpus again",
        )
    return "\n".join(
        [
            _line("shard", str(data)),
            _line("tokens", f"{tokens:,} {index.dtype} in {len(index.lengths):,} documents"),
            _line("on disk", _bytes(size)),
        ]
    )


def _tokenizer(path: Path) -> str:
    return _line("tokenizer", f"{path}: {_tokenizer_text(path)}")


def _tokenizer_text(path: Path) -> str:
    from bigtrain.data.tokenizer import Tokenizer

    t = Tokenizer.load(path)
    return f"SentencePiece, {t.vocab_size:,} pieces, BOS {t.bos_id}, EOS {t.eos_id}, sha256 {t.sha256[:12]}"
