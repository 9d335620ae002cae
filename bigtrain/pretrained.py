"""A trained model from a run directory or one of its checkpoints: plain, whole, on one device."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bigtrain.config import Config
from bigtrain.configfile import load
from bigtrain.errors import UserError

if TYPE_CHECKING:
    from bigtrain.data.tokenizer import Tokenizer
    from bigtrain.model.lstm import LSTM
    from bigtrain.model.transformer import Transformer


@dataclass(frozen=True)
class Pretrained:
    """What generation and evaluation need."""

    model: Transformer | LSTM
    tokenizer: Tokenizer
    config: Config
    checkpoint: Path
    warnings: list[str]
    """Checkpoints that were passed over because they are damaged, one sentence each."""


def find_checkpoint(path: Path) -> tuple[Path, Path, list[str]]:
    """(run directory, checkpoint, warnings) of a run directory or of a checkpoint inside one.

    Raises UserError when the path is neither, or holds no sound checkpoint.
    """
    from bigtrain.checkpoint.location import folder_of
    from bigtrain.checkpoint.store import newest

    if (path / "manifest.json").is_file():
        return path.resolve().parents[1], path, []
    if re.match(r"\w+:/", str(path)) and not path.exists():  # a URL; Path has made one slash of two
        raise UserError(
            "a checkpoint in a store has neither config.toml nor tokenizer.model beside it",
            where=str(path),
            do="give the run directory: it knows its checkpoint.folder",
        )
    if not (path / "config.toml").is_file():
        raise UserError(
            "is neither a run directory (config.toml) nor a checkpoint (manifest.json)",
            where=str(path),
            do="give the folder that `bigtrain train` wrote, usually runs/NAME",
        )
    folder = folder_of(path, load(path / "config.toml"))
    found, warnings = newest(folder)
    if found is None:
        raise UserError(
            "no sound checkpoint" + "".join(f"\n  {w}" for w in warnings),
            where=str(folder),
            do="train first: the run saves at its end and every checkpoint.every_steps",
        )
    return path, found, warnings


def open_model(path: str | Path) -> Pretrained:
    """Load the newest sound checkpoint of a run, or the given one, for inference (eval mode, fp32).

    Raises UserError when there is none or it does not fit the run's config.
    """
    import torch

    from bigtrain.checkpoint.store import load_weights
    from bigtrain.data.tokenizer import Tokenizer
    from bigtrain.model.build import build_model

    run, checkpoint, warnings = find_checkpoint(Path(path))
    config = load(run / "config.toml")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(config.model, config.loss, device=device, seed=config.train.seed)
    load_weights(checkpoint, model)
    model.eval()
    tokenizer = Tokenizer.load(run / "tokenizer.model")
    return Pretrained(model, tokenizer, config, checkpoint, warnings)
