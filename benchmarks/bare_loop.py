"""What bigtrain is compared with: a bare PyTorch loop of the same model on the same shards, nothing else.

Prints one JSON object: seconds from the parent's clock to the end of the first step, and the time of every step.
Run by overhead.py; on several processes under torchrun, then with DistributedDataParallel.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bigtrain.config import Config
from bigtrain.model.batch import IGNORE
from bigtrain.model.build import build_model


def main() -> None:
    """argv: dataset folder, config as JSON, steps."""
    folder, config, steps = Path(sys.argv[1]), Config.model_validate_json(sys.argv[2]), int(sys.argv[3])
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    if world > 1:
        dist.init_process_group("gloo")
    manifest = json.loads((folder / "dataset.json").read_text())
    eos, dtype = manifest["tokenizer"]["eos_id"], manifest["splits"]["train"][0]["dtype"]
    data = np.memmap(folder / "train-00000.bin", dtype=dtype, mode="r")
    model = build_model(config.model, config.loss, device=torch.device("cpu"), seed=config.train.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optim.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    forward = DistributedDataParallel(model) if world > 1 else model
    S, B = config.data.sequence_length, config.train.microbatch
    local = (config.train.global_batch or 0) // world // B
    order = np.random.default_rng(0).permutation((len(data) - 1) // S)
    ends = []
    for step in range(steps):
        for micro in range(local):
            at = ((step * local + micro) * world + rank) * B
            windows = np.stack(
                [data[w * S : w * S + S + 1] for w in order[np.arange(at, at + B) % len(order)]]
            )
            tokens, targets = windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)
            targets[tokens == eos] = IGNORE
            starts = np.flatnonzero(tokens.ravel() == eos) + 1
            edges = np.union1d(starts, np.arange(0, B * S + 1, S)).astype(np.int32)
            count = int((targets != IGNORE).sum()) * local
            out = forward(
                torch.from_numpy(tokens),
                cu_seqlens=torch.from_numpy(edges),
                targets=torch.from_numpy(targets),
                sample_ids=torch.arange(at, at + B),
            )
            (out.objective / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.time())
    if rank == 0:
        print(json.dumps({"first_step": ends[0] - float(os.environ["BENCH_START"]), "ends": ends}))
    if world > 1:
        dist.destroy_process_group()


main()
