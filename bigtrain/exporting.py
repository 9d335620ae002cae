"""`bigtrain export`: a trained model as a Hugging Face directory."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.checkpoint.location import place, remote
from bigtrain.checkpoint.reader import open_checkpoint
from bigtrain.config import ModelConfig
from bigtrain.configfile import load
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.errors import UserError
from bigtrain.interop.compare import compare_bits, logits_difference, tokenizer_problem, transformers_version
from bigtrain.interop.draft import drafted
from bigtrain.interop.families import family_of, to_hugging_face
from bigtrain.interop.initial import parameter_shapes
from bigtrain.interop.names import hugging_face_names
from bigtrain.interop.safetensors_writer import Export, write_safetensors
from bigtrain.interop.tokenizer_files import token_ids, write_json, write_tokenizer
from bigtrain.pretrained import find_checkpoint

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Written:
    """What an export came to."""

    family: str
    checkpoint: Path
    files: list[tuple[str, int]]
    """Name and bytes."""
    parameters: int
    checked: str
    """How it was compared with the run."""
    warnings: list[str]


def export(
    run: str | Path,
    out: str | Path,
    *,
    dtype: str = "bf16",
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    compare: bool = True,
) -> Written:
    """Write the newest sound checkpoint of a run (or the given one) as safetensors, config and tokenizer.

    The weights are read and written tensor by tensor. What was written is loaded by transformers and its logits
    compared with the run's before the folder gets its name; without transformers, or without `compare`, it is read
    back bit for bit instead. `out` may be a URL: the model is then written and compared in $TMPDIR and uploaded.
    Raises UserError when no Hugging Face family is this model, or `out` holds something; RunError when the disk is
    full, the store refuses or the comparison fails. A folder `out` is then as before; in a store a model that was to
    be replaced is gone once the upload began, and never mixed with the new one.
    """
    out = place(out)
    folder, checkpoint, warnings = find_checkpoint(Path(run))
    config = load(folder / "config.toml")
    m = config.model
    family = family_of(m)
    shapes = parameter_shapes(m)
    weights = Export(open_checkpoint(checkpoint), hugging_face_names(family, shapes), shapes, dtype)
    _check_parameters(weights, checkpoint)
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    with drafted(out, sum(map(weights.bytes_of, weights.tensors.values())), overwrite) as draft:
        write_safetensors(weights, draft, max_shard_bytes)
        ids = token_ids(tokenizer)
        write_json(draft / "config.json", _config_json(m, family, dtype, ids))
        write_json(draft / "generation_config.json", ids)
        warnings += write_tokenizer(tokenizer, draft, m.max_length)
        checked, more = _compare(draft, checkpoint, m, weights, tokenizer, compare)
        files = sorted((p.name, p.stat().st_size) for p in draft.iterdir())
    parameters = sum(weights.bytes_of(s) for s in weights.tensors.values()) // weights.bytes_of(())
    return Written(family, checkpoint, files, parameters, checked, warnings + more)


def _config_json(m: ModelConfig, family: str, dtype: str, ids: dict[str, int]) -> dict[str, Any]:
    # torch_dtype is what transformers before 4.56 reads, and later ones understand.
    return (
        to_hugging_face(m, family)
        | {"torch_dtype": _DTYPES[dtype]}
        | {f"{name}_token_id": ids.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    )


def _check_parameters(weights: Export, checkpoint: Path) -> None:
    """The checkpoint is of the model in the run's config. Raises UserError."""
    stored = {t.name: t.shape for t in weights.opened.manifest.tensors if t.kind == "master"}
    if stored != dict(weights.shapes):
        differ = sorted(n for n in {*stored, *weights.shapes} if stored.get(n) != weights.shapes.get(n))
        raise UserError(
            f"is a checkpoint of another model than the run's config.toml ({len(differ)} parameters: {differ[0]}, ...)",
            where=str(checkpoint),
            do="restore the config.toml that it was trained with",
        )


def _compare(
    draft: Path, checkpoint: Path, m: ModelConfig, weights: Export, tokenizer: Tokenizer, wanted: bool
) -> tuple[str, list[str]]:
    """How the draft was checked, and warnings. Raises RunError when it is not what the run is."""
    version = transformers_version()
    if not wanted or not version:
        compare_bits(draft, weights)
        why = (
            "--no-compare was given"
            if version
            else "transformers is not installed (pip install transformers)"
        )
        return "every tensor read back bit for bit", [f"LOGITS WERE NOT COMPARED: {why}"]
    difference = logits_difference(draft, checkpoint, m, weights.dtype)
    problem = tokenizer_problem(draft, tokenizer, m)
    checked = f"largest difference of a logit from transformers {version} in fp32: {difference:.1e}"
    return checked, [problem] if problem else []


def export_command(args: argparse.Namespace) -> int:
    """Run the verb."""
    if not args.max_shard_gb > 0:
        raise UserError(f"{args.max_shard_gb} GB hold nothing", where="--max-shard-gb", do="give more than 0")
    written = export(
        args.model,
        args.to,
        dtype=args.dtype,
        max_shard_bytes=int(args.max_shard_gb * 1e9),
        overwrite=args.overwrite,
        compare=not args.no_compare,
    )
    print(
        f"{args.to}: {written.family}, {written.parameters:,} parameters in {args.dtype}, from {written.checkpoint}"
    )
    for name, size in written.files:
        print(f"  {name:<36} {size:>16,} bytes")
    print(f"checked: {written.checked}")
    for warning in written.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    copy = "copy it to a folder and " if remote(place(args.to)) else ""
    print(
        f'{copy}load it with transformers.AutoModelForCausalLM.from_pretrained("{"FOLDER" if copy else args.to}")'
    )
    return 0
