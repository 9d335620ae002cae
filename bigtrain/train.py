"""The assembly: config -> mesh -> data -> model -> engine -> trainer. One screen shows the whole run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bigtrain.budget import BatchSchedule, Progress, check_layout, rank_samples
from bigtrain.config import Config
from bigtrain.configfile import render
from bigtrain.data.loader import Loader
from bigtrain.data.shards import Corpus
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.engine import Engine, make_engine
from bigtrain.errors import UserError
from bigtrain.heldout import deal
from bigtrain.mesh import Mesh, rendezvous
from bigtrain.model.batch import Batch
from bigtrain.model.build import build_model


@dataclass
class Parts:
    """A run's parts, put together and at step 0."""

    config: Config
    mesh: Mesh
    corpus: Corpus
    tokenizer: Tokenizer
    loader: Loader
    held_out: list[Batch]
    """This rank's held-out microbatches; empty when the dataset has no held-out window."""
    engine: Engine
    schedule: BatchSchedule

    def steps(self, progress: Progress, total_steps: int) -> Iterator[list[Batch]]:
        """This rank's microbatches of every step left, read ahead in the background."""
        plan = rank_samples(
            self.schedule,
            progress,
            total_steps,
            microbatch=self.config.train.microbatch,
            data_rank=self.mesh.data_rank,
            data_size=self.mesh.data_size,
        )
        return self.loader.stream(plan)

    def close(self) -> None:
        """Stop the reader thread and free the engine."""
        self.loader.close()
        self.engine.close()


def assemble(config: Config, mesh: Mesh) -> Parts:
    """Build everything a run needs. Raises UserError for whatever does not fit together."""
    torch.set_num_threads(config.layout.threads or max(1, (os.cpu_count() or 1) // mesh.place.local_world))
    same_on_every_rank(config, mesh)
    schedule = BatchSchedule.of(config)
    check_layout(schedule, config.train.microbatch, mesh.data_size)
    corpus = Corpus.open(config.data.path, split="train")
    tokenizer = Tokenizer.load(corpus.tokenizer_path)
    check_vocabulary(config, tokenizer)
    loader = loader_of(config, corpus, tokenizer)
    model = build_model(
        config.model,
        config.loss,
        kernels=config.layout.kernels,
        recompute=config.layout.recompute,
        device=mesh.device,
        seed=config.train.seed,
    )
    engine = make_engine(model, config, mesh)
    return Parts(
        config, mesh, corpus, tokenizer, loader, held_out_of(config, tokenizer, mesh), engine, schedule
    )
