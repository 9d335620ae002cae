"""Published measurements as the planner's jobs: one CSV row, one job on one cluster."""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bigtrain.config import ModelConfig
from bigtrain.plan.hardware import Cluster, cluster_of
from bigtrain.plan.job import Job

NETWORKS = {
    "NVLink3+1600G RoCE": "roce1600",
    "NVLink3+4xHDR200 (800 Gb/s/node)": "hdr200x4",
    "NVLink3+8xHDR200": "hdr200x8",
    "NVLink4+EFA 3200G/node": "efa3200",
}
OLD: dict[str, Any] = {"overlap": False, "gradient_bytes": 2}
"""Megatron-LM before 2023: one all-reduce of fp16 gradients after the last backward pass."""
OVERLAPPED = ("NeMo", "AsyncTP", "tp-comm-overlap")
"""Tensor communication behind products: of NeMo's configs, and where a row's notes say so."""
MICROBATCHES = (1, 2, 4, 8, 16)
UNTOLD = ("VPP not", "chunks not published")
"""Notes of rows whose column of virtual stages says 1 because a source does not tell."""


@dataclass(frozen=True)
class Row:
    """A measurement and the jobs that it may be of: several where the source does not say all."""

    name: str
    source: str
    group: str
    """Never split between fitting and testing."""
    jobs: tuple[Job, ...]
    cluster: Cluster
    seconds: float | None
    memory_gib: float | None
    choice: str = ""
    """Rows with the same: the same model, cluster and batch in other layouts."""
    last_stage: bool = False
    """Whether the memory is that of the last pipeline stage; else that of the fullest."""

    @property
    def specified(self) -> bool:
        """Whether the source says everything."""
        return len(self.jobs) == 1


def read_rows(path: Path) -> list[Row]:
    """All rows of a CSV in one of the three forms; those that no job describes are left out."""
    with path.open(newline="") as f:
        rows = list(csv.DictReader(f))
    if not rows:
        return []
    if "iter_time_ms" in rows[0]:
        found = map(_vtrain, rows)
    elif "case" in rows[0]:
        found = map(_megatron_ci, rows)
    else:
        found = map(_published, rows)
    return [row for row in found if row is not None]


@functools.cache
def _model(**fields: object) -> ModelConfig:
    return ModelConfig.model_validate(fields)


def _gpt(layers: int, width: int, heads: int, vocab: int, length: int, **more: object) -> ModelConfig:
    usual: dict[str, object] = {"norm": "layernorm", "position": "learned", "activation": "gelu"}
    fixed = {"layers": layers, "width": width, "heads": heads, "vocab_size": vocab, "max_length": length}
    return _model(**(usual | {"bias": True, "tied": True} | fixed | more))


def _vtrain(row: Mapping[str, str]) -> Row:
    """vTrain's single node of A100-80GB: Megatron-DeepSpeed, GPT, fp16, 1F1B."""
    n = {key: int(row[key]) for key in row if key not in ("id", "iter_time_ms")}
    job = Job(
        model=_gpt(n["layers"], n["hidden"], n["heads"], _padded(50257, n["tp"]), n["seq"]),
        sequence_length=n["seq"],
        global_batch=n["global_batch"],
        microbatch=n["micro_batch"],
        tensor=n["tp"],
        pipeline=n["pp"],
        split=_even(n["layers"], n["pp"], 1),
        data=n["dp"],
        sequence=False,
        zero=0,
        recompute="none",
        precision="fp16",
        attention="unfused",
        software="Megatron-DeepSpeed",
        **OLD,
    )
    return Row(
        row["id"],
        "vTrain-single",
        f"vTrain-single {n['hidden']} {n['layers']} {n['tp']} {n['pp']}",
        (job,),
        cluster_of("a100-80gb", n["n_gpus"], "hdr200x4"),
        float(row["iter_time_ms"]) / 1000,
        None,
        f"vTrain-single {n['hidden']} {n['layers']} {n['n_gpus']} {n['global_batch']}",
    )


def _padded(vocab: int, tensor: int) -> int:
    """vTrain's step times say so: one rank's head of 50257 rows takes more than twice its share."""
    return vocab if tensor == 1 else -(-vocab // (128 * tensor)) * 128 * tensor


def _published(row: Mapping[str, str]) -> Row | None:
    if not row["iter_time_s"]:
        return None
    gated, rope = row["gated"] == "1", row["pos_emb"] == "rope"
    vtrain = row["source"] == "vTrain-multi"
    model = _model(
        layers=int(row["layers"]),
        width=int(row["hidden"]),
        heads=int(row["heads"]),
        kv_heads=int(row["kv_heads"]),
        ffn_width=int(row["ffn"]),
        vocab_size=_padded(int(row["vocab"]), int(row["tp"])) if vtrain else int(row["vocab"]),
        max_length=max(2048, int(row["seq"])),
        activation="swiglu" if gated else "gelu",
        norm="rmsnorm" if gated else "layernorm",
        position="rope" if rope else "learned",
        bias=row["bias"] == "1",
        tied=row["tied"] == "1",
    )
    batch, data = int(row["global_batch"]), int(row["dp"])
    recompute = {"full": "full", "none": "none"}.get(row["recompute"], "selective")
    base = Job(
        model=model,
        sequence_length=int(row["seq"]),
        global_batch=batch,
        microbatch=1,
        tensor=int(row["tp"]),
        sequence=row["sp"] == "1",
        pipeline=int(row["pp"]),
        context=int(row["cp"]),
        data=data,
        zero=int(row["zero"]),
        recompute=recompute,  # type: ignore[arg-type]
        precision=row["precision"],  # type: ignore[arg-type]
        attention="flash" if row["attn"] == "flash" else "unfused",
        compiled=row["compile"] == "1",
        software=row["framework"],
        tensor_overlap=any(word in row["framework"] + row["notes"] for word in OVERLAPPED),
        **(OLD if row["source"] in ("vTrain-multi", "SC21-T1", "SC21-T2", "RAR-T5", "RAR-txt") else {}),
    )
    told = not any(words in row["notes"] for words in UNTOLD)
    jobs = tuple(_possible(base, row["micro_batch"], row["vpp"] if told else ""))
    network = NETWORKS.get(row["interconnect"], "ndr400x8")
    return Row(
        row["id"],
        row["source"],
        row["group"],
        jobs,
        cluster_of(row["gpu"], int(row["n_gpus"]), network),
        float(row["iter_time_s"]),
        float(row["mem_gib"]) if row["mem_gib"] else None,
        " ".join(
            row[key] for key in ("source", "model_name", "seq", "gpu", "n_gpus", "global_batch", "precision")
        ),
    )


def _possible(base: Job, microbatch: str, chunks: str) -> Iterator[Job]:
    """The job, or all that it may be where microbatch or chunks are not told."""
    each = base.global_batch // base.data
    sizes = [int(float(microbatch))] if microbatch else [b for b in MICROBATCHES if each % b == 0] or [1]
    most = base.model.layers // base.pipeline
    likely = [v for v in range(1, most + 1) if _even(base.model.layers, base.pipeline, v)]
    counts = [int(chunks)] if chunks else likely or [1]
    for size in sizes:
        for count in counts if base.pipeline > 1 else [1]:
            batch = max(1, each // size) * size * base.data  # some sources round
            schedule = "interleaved" if count > 1 else "1f1b"
            # nanotron balances its stages by cost, head included, as bigtrain does; the others have equal ones.
            split = None if base.software == "nanotron" else _even(base.model.layers, base.pipeline, count)
            layout = {"microbatch": size, "chunks": count, "schedule": schedule, "split": split}
            yield replace(base, global_batch=batch, **layout)  # type: ignore[arg-type]


def _even(layers: int, pipeline: int, chunks: int) -> tuple[int, ...] | None:
    """Megatron's split: equal pieces, or with embedding and head counted as layers; None where neither works."""
    count = pipeline * chunks
    if pipeline > 1 and layers % count == 0:
        return (layers // count,) * count
    if pipeline > 1 and (layers + 2) % count == 0:
        each = (layers + 2) // count
        return (each - 1, *((each,) * (count - 2)), each - 1)
    return None


_CI_GPU = {"a100": "a100-80gb", "h100": "h100-80gb", "gb200": "gb200"}


def _megatron_ci(row: Mapping[str, str]) -> Row | None:
    """NVIDIA's CI: exact bytes allocated, and iteration time, of small models and two real ones."""
    if not row["global_batch_size"] or not row["pipeline_model_parallel_size"]:
        return None
    gpu = next((name for word, name in _CI_GPU.items() if word in row["platform"]), None)
    if gpu is None:
        return None
    t, p = int(row["tensor_model_parallel_size"]), int(row["pipeline_model_parallel_size"])
    c, layers = int(row["context_parallel_size"] or 1), int(row["num_layers"])
    each = row["num_layers_per_virtual_pipeline_stage"]
    v = layers // p // int(each) if each else 1
    swiglu, width = row["swiglu"] == "True", int(row["hidden_size"])
    vocab = int(row["vocab_size"] or (256000 if "SentencePiece" in row["tokenizer_type"] else 50304))
    model = _gpt(
        layers,
        width,
        int(row["num_attention_heads"]),
        -(-vocab // (128 * t)) * 128 * t,
        int(row["max_position_embeddings"]),
        kv_heads=int(row["num_query_groups"] or row["num_attention_heads"]),
        # Megatron's own default: as many weights with a gate as without.
        ffn_width=int(row["ffn_hidden_size"] or (width * 8 // 3 // 64 * 64 if swiglu else 4 * width)),
        activation="swiglu" if swiglu else "gelu",
        position="rope" if row["position_embedding_type"] == "rope" else "learned",
        bias=row["disable_bias_linear"] != "True",
        tied=row["untie_embeddings_and_output_weights"] != "True",
    )
    batch, size = int(row["global_batch_size"]), int(row["micro_batch_size"])
    data = 8 // (t * p * c)
    if data < 1 or batch % (size * data):
        return None
    job = Job(
        model=model,
        sequence_length=int(row["seq_length"]),
        global_batch=batch,
        microbatch=size,
        tensor=t,
        sequence=row["sequence_parallel"] == "True",
        pipeline=p,
        schedule="interleaved" if v > 1 else "1f1b",
        chunks=v,
        split=_even(layers, p, v),
        context=c,
        data=data,
        zero=1 if row["use_distributed_optimizer"] == "True" else 0,
        recompute="full" if row["recompute_granularity"] == "full" else "none",
        precision="fp16" if row["fp16"] == "True" else "bf16",
        attention="unfused"
        if "unfused" in row["attention_backend"] or row["transformer_impl"] == "local"
        else "flash",
        software="Megatron-LM" + " (fused loss)" * (row["cross_entropy_loss_fusion"] == "True"),
    )
    # In the containers of "lts" Transformer Engine chooses now one kernel, now the other, by what no column says.
    open_choice = (
        "lts" in row["platform"] and row["transformer_impl"] != "local" and not row["attention_backend"]
    )
    jobs = (job, replace(job, attention="unfused")) if open_choice else (job,)
    seconds, memory = row["iter_time_s_median"], row["max_allocated_bytes"]
    return Row(
        f"{row['case']} {row['platform']}",
        "Megatron-CI",
        f"Megatron-CI {row['case']}",
        jobs,
        cluster_of(gpu, job.ranks),
        float(seconds)
        if seconds and width > 1024
        else None,  # the small ones measure launches of another day's code
        float(memory) / 2**30 if memory else None,
        last_stage=True,  # Megatron's last rank writes the log
    )
