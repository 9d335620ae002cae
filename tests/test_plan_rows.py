"""Published rows become the jobs that their sources ran."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks.plan import START, Known, fit, held_out, table
from benchmarks.plan_rows import Row, read_rows
from bigtrain.plan.memory import memory_of

VTRAIN = {
    "id": "v-1", "n_gpus": 8, "global_batch": 32, "micro_batch": 4, "hidden": 1024, "heads": 16, "layers": 24,
    "seq": 1024, "tp": 2, "dp": 2, "pp": 2, "iter_time_ms": 219.7,
}  # fmt: skip
PUBLISHED = {
    "id": "p-1", "source": "somewhere", "framework": "Megatron-Core/NeMo", "model_name": "Llama3-405B", "layers": 126,
    "hidden": 16384, "heads": 128, "kv_heads": 8, "ffn": 53248, "gated": 1, "vocab": 128256, "tied": 0,
    "pos_emb": "rope", "bias": 0, "seq": 8192, "gpu": "H100-80GB", "n_gpus": 1024, "interconnect": "x", "tp": 8,
    "pp": 8, "vpp": 8, "cp": 2, "dp": 8, "zero": 1, "sp": 1, "micro_batch": 1, "global_batch": 512,
    "recompute": "none", "precision": "fp8", "attn": "flash", "compile": 0, "iter_time_s": 13.0, "mem_gib": "",
    "notes": "", "group": "g",
}  # fmt: skip


CI = {
    "case": "gpt/some", "platform": "dev_dgx_h100", "num_layers": 12, "hidden_size": 512, "num_attention_heads": 8,
    "num_query_groups": "", "ffn_hidden_size": "", "seq_length": 1024, "max_position_embeddings": 1024,
    "micro_batch_size": 4, "global_batch_size": 32, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 4,
    "num_layers_per_virtual_pipeline_stage": "", "context_parallel_size": "", "use_distributed_optimizer": "",
    "sequence_parallel": "", "recompute_granularity": "", "swiglu": "", "untie_embeddings_and_output_weights": "",
    "disable_bias_linear": "", "position_embedding_type": "", "transformer_impl": "transformer_engine",
    "attention_backend": "", "fp16": "", "vocab_size": "", "tokenizer_type": "GPT2BPETokenizer",
    "cross_entropy_loss_fusion": "", "max_allocated_bytes": 2**31, "iter_time_s_median": "",
}  # fmt: skip


def read(tmp_path: Path, *rows: dict[str, object]) -> list[Row]:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return read_rows(path)


def test_a_vtrain_row(tmp_path: Path) -> None:
    (row,) = read(tmp_path, VTRAIN)
    (job,) = row.jobs
    assert (job.ranks, job.microbatches, job.split) == (8, 4, (12, 12))
    assert row.seconds == pytest.approx(0.2197)
    assert job.model.vocab_size % (128 * 2) == 0
    (one,) = read(tmp_path, VTRAIN | {"tp": 1, "dp": 4})
    assert one.jobs[0].model.vocab_size == 50257, "not padded for one rank"
    assert one.group != row.group
    assert one.choice == row.choice, "another layout of the same"


def test_a_published_row_with_everything_is_one_job(tmp_path: Path) -> None:
    (row,) = read(tmp_path, PUBLISHED)
    (job,) = row.jobs
    assert row.specified
    assert job.ranks == 1024
    assert job.split is not None
    assert (len(job.split), sum(job.split), job.split[0], job.split[-1]) == (64, 126, 1, 1), (
        "ends count as layers"
    )
    assert job.tensor_overlap


def test_what_is_not_told_becomes_all_that_it_may_be(tmp_path: Path) -> None:
    (row,) = read(tmp_path, PUBLISHED | {"micro_batch": "", "vpp": ""})
    assert not row.specified
    assert {j.microbatch for j in row.jobs} == {1, 2, 4, 8, 16}
    assert len({j.chunks for j in row.jobs}) > 1
    assert all(j.tokens_per_step == 512 * 8192 for j in row.jobs)
    (noted,) = read(tmp_path, PUBLISHED | {"vpp": 1, "notes": "micro-batch, VPP not in the table"})
    assert {j.chunks for j in noted.jobs} == {j.chunks for j in row.jobs}, (
        "the column's 1 is not the source's"
    )


def test_a_row_of_megatrons_tests(tmp_path: Path) -> None:
    (row,) = read(tmp_path, CI)
    (job,) = row.jobs
    assert row.last_stage, "whose rank writes the log"
    assert (job.model.ffn, job.attention, row.memory_gib) == (2048, "flash", 2.0)
    told = (
        {"swiglu": "True"},
        {"ffn_hidden_size": 1536},
        {"cross_entropy_loss_fusion": "True"},
        {"platform": "lts_dgx_a100"},
    )
    gated, given, fused, lts = (read(tmp_path, CI | more)[0] for more in told)
    assert gated.jobs[0].model.ffn == 1344, "512 x 8 / 3 down to a multiple of 64"
    assert given.jobs[0].model.ffn == 1536
    assert memory_of(fused.jobs[0])[-1].logits > 1.5 * memory_of(job)[-1].logits
    assert [j.attention for j in lts.jobs] == ["flash", "unfused"], "no column says which"


def test_a_group_is_never_judged_with_what_was_fitted_to_it(tmp_path: Path) -> None:
    rows = read(
        tmp_path,
        *(VTRAIN | {"id": f"v-{n}", "layers": n, "iter_time_ms": 219.7 * n / 24} for n in (12, 16, 20, 24)),
    )
    by_group = held_out(rows, 2)
    assert set(by_group) == {r.group for r in rows}
    assert len({id(k) for k in by_group.values()}) == 2
    for row in rows:
        others = {f.source for f in by_group[row.group].calibration.findings}
        assert others, "the other fold's runs correct"
        assert row.name not in others
    fitted = fit(rows)
    assert fitted != START
    assert (
        table(rows, lambda _: Known(fitted))["step_time"]["all"]["mape"]
        < table(rows, lambda _: Known(START))["step_time"]["all"]["mape"]
    )
    assert 0 < fitted.matmul <= 0.95
    assert fitted.update >= 1
