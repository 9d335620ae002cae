"""`bigtrain import`: a directory of somebody else's weights into a config that trains on from them."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path

from bigtrain.checkpoint.location import exists, names, place, remote, within_reach
from bigtrain.config import Config, ModelConfig
from bigtrain.configfile import build, find_config, load, render
from bigtrain.data.files import write_whole
from bigtrain.errors import UserError
from bigtrain.interop.families import from_hugging_face
from bigtrain.interop.initial import find_parameters, parameter_shapes
from bigtrain.interop.safetensors_reader import read_json

_SEQUENCE = 2048
"""Longest sequence of the config that is written; the model may be good for more."""
_BATCH_TOKENS = 2**17
_STEPS, _WARMUP, _LR = 1000, 50, 2e-5
"""A start for continued training: 131 million tokens at a tenth of what a small model's training ends with."""


@dataclass(frozen=True)
class Imported:
    """What an import came to."""

    config: Config
    path: Path
    """Of the config that was written."""
    parameters: int
    naming: str
    ignored: list[str]


def import_weights(
    folder: str | Path,
    *,
    out: str | Path | None = None,
    data: str | None = None,
    config: str | None = None,
    overwrite: bool = False,
) -> Imported:
    """Check that a model of ours holds exactly these weights, and write the config that trains on from them.

    The model is what config.json describes, or with `config` that config's. Reads no weight. Raises UserError
    naming every tensor that is missing, extra or of another shape, when the family is none of ours, and when `out`
    exists.
    """
    folder = place(folder)
    given = load(find_config(config)) if config else None
    with within_reach(folder):
        if not names(folder):
            raise UserError(
                "is no folder, or empty", where=str(folder), do="give the directory that holds the weights"
            )
        model = given.model if given else _described(folder)
        found = find_parameters(folder, model)
    name = given.name if given else _name(folder)
    path = Path(out) if out else Path(f"{name}.toml")
    if path.exists() and not overwrite:
        raise UserError("exists", where=str(path), do="give another --out, or --overwrite")
    written = _with_weights(given, folder, data) if given else _fresh(model, name, folder, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, render(written).encode())
    parameters = sum(math.prod(shape) for shape in parameter_shapes(model).values())
    return Imported(written, path, parameters, found.word, found.ignored)


def _described(folder: Path) -> ModelConfig:
    """The model of config.json. UserError when there is none: tensors do not say how many heads there are."""
    path = folder / "config.json"
    if not exists(path):
        raise UserError(
            "has no config.json to say which model this is",
            where=str(folder),
            do="give the config of this model with --config",
        )
    return from_hugging_face(read_json(path), str(path))


def _name(folder: Path) -> str:
    """The folder's name, as a run may be called."""
    name = folder.name if remote(folder) else folder.resolve().name  # "." has none before it is resolved
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-") or "imported"


def _with_weights(given: Config, folder: Path, data: str | None) -> Config:
    train = given.train.model_copy(update={"init_from": str(folder)})
    found = given.model_copy(update={"train": train})
    return (
        found
        if data is None
        else found.model_copy(update={"data": found.data.model_copy(update={"path": data})})
    )


def _fresh(model: ModelConfig, name: str, folder: Path, data: str | None) -> Config:
    """A config for continued training; everything in it may be changed but [model]."""
    length = min(model.max_length, _SEQUENCE)
    return build(
        {
            "name": name,
            "model": model.model_dump(exclude_none=True),
            "data": {"path": data or f"data/{name}", "sequence_length": length},
            "train": {
                "steps": _STEPS,
                "global_batch": max(1, _BATCH_TOKENS // length),
                "precision": "bf16",
                "init_from": str(folder),
            },
            "optim": {"lr": _LR, "warmup_steps": _WARMUP},
        }
    )


def _say_how_to_prepare(folder: Path, path: str) -> None:
    tokenizer = folder / "tokenizer.model"
    if not exists(tokenizer):
        print(
            f"  write {path} with the model's own tokenizer, for other ids would mean other words to this model\n"
            f"  (there is no SentencePiece tokenizer.model in {folder} for `bigtrain prepare`)"
        )
    elif remote(folder):
        print(f"  copy {tokenizer} here")
        print(f"  bigtrain prepare YOUR_TEXTS --out {path} --tokenizer tokenizer.model")
    else:
        print(f"  bigtrain prepare YOUR_TEXTS --out {path} --tokenizer {tokenizer}")


def import_command(args: argparse.Namespace) -> int:
    """Run the verb."""
    found = import_weights(
        args.folder, out=args.out, data=args.data, config=args.config, overwrite=args.overwrite
    )
    print(f"{args.folder}: {found.parameters:,} parameters, each found with its shape ({found.naming})")
    if found.ignored:
        print(f"not needed: {', '.join(found.ignored[:5])}" + (", ..." if len(found.ignored) > 5 else ""))
    print(f"wrote {found.path}")
    print("next:")
    folder, path = place(args.folder), found.config.data.first_path
    if not (Path(path) / "dataset.json").is_file():
        _say_how_to_prepare(folder, path)
    print(f"  bigtrain train {found.path}")
    return 0
