"""Start training from somebody else's weights: `train.init_from`, for any layout.

Each rank fills the boxes it holds of the fp32 masters and reads little more than those; optimizer states stay at
zero, the run at step 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from bigtrain.checkpoint import location
from bigtrain.checkpoint.agree import together
from bigtrain.checkpoint.boxes import Box, Index
from bigtrain.config import Config, ModelConfig
from bigtrain.engine import Engine
from bigtrain.errors import UserError
from bigtrain.interop.dcp import METADATA, DcpWeights
from bigtrain.interop.families import family_of, from_hugging_face
from bigtrain.interop.names import Names, Shapes, best_naming, foreign_shapes
from bigtrain.interop.safetensors_reader import INDEX, SINGLE, SafetensorsWeights, read_json
from bigtrain.logical import Piece
from bigtrain.mesh import Mesh
from bigtrain.model.build import build_model


class Weights(Protocol):
    """A directory of named tensors."""

    shapes: dict[str, Index]

    def problem(self, name: str) -> str:
        """Why a tensor that is there cannot be read; "" when it can."""

    def read(self, name: str, box: Box, target: torch.Tensor) -> None:
        """Copy a box into `target`, a tensor or view of the box's sizes, casting to its dtype."""


def open_weights(folder: Path) -> Weights:
    """The tensors of a safetensors or torch.distributed.checkpoint directory; headers only are read.

    Raises UserError when it is neither, or damaged.
    """
    if location.exists(folder / INDEX) or location.exists(folder / SINGLE):
        return SafetensorsWeights(folder)
    if location.exists(folder / METADATA):
        return DcpWeights(folder)
    pickles = sorted(name for name in location.names(folder) if name.endswith((".bin", ".pt", ".pth")))
    if pickles:
        raise UserError(
            f"holds its weights as pickles ({', '.join(pickles[:3])}), which can run any code when they are loaded",
            where=str(folder),
            do="take the model's safetensors files, or convert them where you trust them: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW, safe_serialization=True)",
        )
    raise UserError(
        f"holds neither {SINGLE} (or {INDEX}) nor a torch.distributed.checkpoint ({METADATA})",
        where=str(folder),
        do="give the directory of a Hugging Face model or of a distributed checkpoint",
    )


@dataclass(frozen=True)
class Found:
    """A directory that holds every parameter of a model."""

    weights: Weights
    names: Names
    word: str
    """In which naming."""
    ignored: list[str]
    """Tensors there that the model has no place for and can do without."""


def find_parameters(folder: Path, model: ModelConfig) -> Found:
    """Match every parameter of `model` with a tensor of the directory.

    Raises UserError listing every tensor that is missing, of another shape or unreadable; in a safetensors
    directory also what the model has no place for, for then it is another model.
    """
    weights = open_weights(folder)
    shapes = parameter_shapes(model)
    word, names = best_naming(_family(model), shapes, weights.shapes.keys())
    wanted = foreign_shapes(names, shapes)
    problems = []
    for name, shape in wanted.items():
        found = weights.shapes.get(name)
        if found is None:
            problems.append(f"{name}: missing")
        elif found != shape:
            problems.append(f"{name}: shape {found} there, {shape} in this model")
        elif problem := weights.problem(name):
            problems.append(f"{name}: {problem}")
    left = [name for name in weights.shapes if name not in wanted]
    # A distributed checkpoint holds optimizer states too; a model directory holds the model and nothing else.
    strange = [] if isinstance(weights, DcpWeights) else [n for n in left if not _harmless(n, model)]
    problems += [f"{name}: not in this model" for name in strange]
    if problems:
        lines = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise UserError(
            f"holds another model ({len(problems)} {'difference' if len(problems) == 1 else 'differences'}, "
            f"compared by {word})\n    " + "\n    ".join(lines),
            where=str(folder),
            do="make [model] the model of these weights (`bigtrain import` does), or give the directory of this model",
        )
    return Found(weights, names, word, left)


def parameter_shapes(model: ModelConfig) -> Shapes:
    """Logical name -> full shape of every parameter, tied ones once, in the order of the model."""
    return {n: tuple(p.shape) for n, p in build_model(model, device="meta").named_parameters()}


def _family(model: ModelConfig) -> str | None:
    try:
        return family_of(model)
    except UserError:
        return None


def _harmless(name: str, model: ModelConfig) -> bool:
    """Buffers that old versions of transformers saved, and the second copy of a tied head."""
    leaf = name.rpartition(".")[2]
    return (
        leaf in ("inv_freq", "masked_bias")
        or name.endswith(".attn.bias")  # GPT-2's causal mask; its biases end in attn.c_attn.bias
        or (model.tied and name.endswith("lm_head.weight"))
    )


def init_from(path: str | Path, pieces: Iterable[Piece], model: ModelConfig, mesh: Mesh) -> list[str]:
    """Fill this rank's "master" pieces from a directory (collective); other kinds are left as they are.

    Returns what the user should be told: which weights these are, and what in the directory's config.json this
    run's [model] has otherwise without changing any tensor. Raises UserError on every rank when the directory
    does not hold this model.
    """
    folder = location.place(path)

    def fill() -> list[str]:
        with location.within_reach(folder):
            found = find_parameters(folder, model)
            deviations = _deviations(folder, model)
        for piece in pieces:
            if piece.kind == "master" and piece.tensor.numel():
                source = found.names[piece.name]
                box = source.box(Box(tuple(piece.offset), tuple(piece.tensor.shape)))
                target = piece.tensor.detach()
                found.weights.read(source.tensor, box, target.t() if source.transposed else target)
        return [f"weights from {folder} ({found.word})", *deviations]

    return together(mesh, fill)[0]


def start_from(path: str, engine: Engine, config: Config, mesh: Mesh) -> list[str]:
    """Give an engine at step 0 the weights of a directory (collective); returns and raises as `init_from`."""
    notes = init_from(path, engine.pieces(owned=False), config.model, mesh)
    engine.loaded({"updates": 0})
    return notes


_NO_MATTER = ("max_length", "init_std")


def _deviations(folder: Path, model: ModelConfig) -> list[str]:
    """Settings that no tensor's shape shows. To differ may be meant: a longer context needs another rope_theta."""
    path = folder / "config.json"
    if not location.exists(path):
        return []
    try:
        theirs = from_hugging_face(read_json(path), str(path))
    except UserError as e:
        return [f"{path} is not compared with [model]: {e.what.splitlines()[0]}"]
    resolved = {"kv_heads": "num_kv_heads", "head_dim": "dim_per_head", "ffn_width": "ffn"}
    lines = []
    for key in ModelConfig.model_fields:
        if key not in _NO_MATTER:
            there, here = (getattr(m, resolved.get(key, key)) for m in (theirs, model))
            if there != here:
                lines.append(f"model.{key}: {there} in {path}, {here} in this run")
    return lines
