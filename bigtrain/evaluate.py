"""`bigtrain evaluate`: held-out loss, perplexity and bits per byte of a trained model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch

from bigtrain.data.corpus import Corpus
from bigtrain.data.manifest import Split
from bigtrain.data.samples import Samples
from bigtrain.errors import UserError
from bigtrain.heldout import HeldOut, held_out
from bigtrain.mesh import Mesh
from bigtrain.model.batch import Batch
from bigtrain.place import Place
from bigtrain.pretrained import Pretrained, open_model
from bigtrain.train import loader_of


def evaluate(trained: Pretrained, *, data: str, split: Split, sequences: int = 0) -> HeldOut:
    """Evaluate on the first `sequences` windows of a split (0: all).

    Raises UserError when the dataset was made with another tokenizer or the split is empty.
    """
    config = trained.config
    if sequences < 0:
        raise UserError(
            f"cannot read {sequences} sequences", where="--sequences", do="give 1 or more, or 0 for all"
        )
    corpus = Corpus.open(data, split=split)
    if corpus.tokenizer_sha256 != trained.tokenizer.sha256:
        raise UserError(
            "was made with another tokenizer than the model's, so its numbers mean other words",
            where=str(data),
            do="prepare it again with --tokenizer RUN/tokenizer.model",
        )
    samples = Samples.single(corpus, config.data.sequence_length, config.train.seed)
    loader = loader_of(config, samples, trained.tokenizer)
    device = next(trained.model.parameters()).device

    def loss_of(batches: Sequence[Batch]) -> float:
        nll = 0.0
        for batch in batches:
            moved = batch.to(device)
            with torch.inference_mode():
                out = trained.model(
                    moved.tokens,
                    cu_seqlens=moved.cu_seqlens,
                    targets=moved.targets,
                    sample_ids=moved.sample_ids,
                )
            nll += float(out.nll)
        return nll

    batches = loader.validation_batches(sequences or loader.validation_windows(), config.train.microbatch)
    mesh = Mesh(Place(0, 1, 0, 1, "single"), device)
    return held_out(loss_of, batches, trained.tokenizer.token_bytes(), mesh)


def evaluate_command(args: argparse.Namespace) -> int:
    """Run the verb."""
    trained = open_model(args.model)
    for warning in trained.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    data = args.data or trained.config.data.first_path
    result = evaluate(trained, data=data, split=args.split, sequences=args.sequences)
    if args.json:
        print(
            json.dumps(
                {"checkpoint": str(trained.checkpoint), "data": data, "split": args.split, **vars(result)}
            )
        )
        return 0
    print(f"checkpoint       {trained.checkpoint}")
    print(f"text             {data}, {args.split}: {result.tokens:,} tokens, {result.bytes:,} bytes")
    print(f"loss             {result.loss:.4f} nats a token")
    print(f"perplexity       {result.perplexity:.2f}")
    if trained.config.model.objective == "causal":
        print(f"bits per byte    {result.bits_per_byte:.4f}")
    return 0
