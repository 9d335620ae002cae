"""What `bigtrain export` writes is what transformers computes with, or it is not written."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bigtrain import exporting
from bigtrain.cli import main
from bigtrain.config import ModelConfig
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.errors import RunError, UserError
from bigtrain.exporting import export
from bigtrain.interop import compare, safetensors_writer
from bigtrain.interop.families import family_of
from bigtrain.interop.safetensors_reader import SafetensorsWeights
from bigtrain.interop.tokenizer_files import write_json, write_tokenizer
from bigtrain.model.build import build_model
from tests.data_parts import HOSTILE, small_tokenizer, texts
from tests.foreign_parts import GPT2, MODELS, SMALL, make_run, model_config, weights_of

transformers = pytest.importorskip("transformers")


def tokens(model: ModelConfig) -> torch.Tensor:
    return torch.randint(model.vocab_size, (2, 100), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def our_logits(model: ModelConfig, weights: dict[str, torch.Tensor]) -> Any:
    ours = build_model(model)
    for name, parameter in ours.named_parameters():
        parameter.copy_(weights[name])
    return ours.eval()(tokens(model))


@torch.no_grad()
def their_logits(folder: Path, model: ModelConfig) -> Any:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return theirs.eval()(tokens(model)).logits


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_our_logits(name: str, dtype: str, tmp_path: Path) -> None:
    """Compared here by other code than the export's own, with norms and biases that are not 1 and 0."""
    family, _ = MODELS[name]
    model = model_config(name)
    run = make_run(tmp_path / "run", model)
    written = export(run, tmp_path / "out", dtype=dtype)
    assert written.family == family
    assert "largest difference of a logit" in written.checked
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == family
    weights = weights_of(model)
    if dtype == "bf16":
        weights = {n: t.bfloat16().float() for n, t in weights.items()}
    ours, theirs = our_logits(model, weights), their_logits(tmp_path / "out", model)
    assert theirs.shape[-1] == 515, "the vocabulary has its true size"
    assert ours.std() > 0.5
    assert (ours - theirs).abs().max() <= 1e-4


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "lstm": ({"kind": "lstm", "heads": None, "kv_heads": None}, ["model.kind"]),
    "masked": ({"objective": "masked"}, ["model.objective"]),
    "mixed": ({"qk_norm": True, "qkv_bias": True, "bias": True}, ["the nearest is llama", "model.qk_norm"]),
    "gpt2 and more": (
        {**GPT2, "kv_heads": 2, "sliding_window": 5, "head_dim": 16},
        ["nearest is gpt2", "model.kv_heads", "model.sliding_window", "model.head_dim"],
    ),
    "gelu": ({"activation": "gelu"}, ["model.activation: llama has 'swiglu', this model 'gelu'"]),
    "no bias": ({**GPT2, "bias": False}, ["model.bias: gpt2 has true, this model false"]),
    "window and biases": ({"bias": True, "sliding_window": 5}, ["model."]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_family_is_is_refused_with_every_reason(case: str) -> None:
    changes, words = REFUSED[case]
    with pytest.raises(UserError) as refused:
        family_of(ModelConfig(**{**SMALL, **changes}))
    for word in [*words, "export needs one of llama, mistral, qwen2, qwen3, gpt2"]:
        assert word in str(refused.value)


def test_nothing_is_written_for_a_model_that_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ModelConfig(**{**SMALL, "activation": "gelu"}))
    with pytest.raises(UserError, match="no Hugging Face family"):
        export(run, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_large_export_is_sharded_with_an_index(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With slabs of a few rows too: the files hold the same tensors as a single one."""
    run = make_run(tmp_path / "run", model_config(name))
    export(run, tmp_path / "one", dtype="fp32")
    monkeypatch.setattr(safetensors_writer, "SLAB", 1000)
    written = export(run, tmp_path / "many", dtype="fp32", max_shard_bytes=20_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert [p.name for p in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert index["weight_map"].keys() == one.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in one.values())
    for path in files:
        part = load_file(path)
        sizes = [t.numel() * 4 for t in part.values()]
        assert sum(sizes) <= 20_000 or len(sizes) == 1
        for tensor, values in part.items():
            assert index["weight_map"][tensor] == path.name
            assert torch.equal(values, one[tensor])
    assert [n for n, _ in written.files] == sorted(p.name for p in (tmp_path / "many").iterdir())


def test_files_are_what_the_library_reads(tmp_path: Path) -> None:
    """bf16 is rounded to nearest, the header aligned and marked; our reader sees what the library sees."""
    model = model_config("gpt2")
    export(make_run(tmp_path / "run", model), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    theirs, weights = load_file(path), weights_of(model)
    fused = torch.cat([weights[f"layers.1.self_attn.{x}_proj.weight"].T for x in "qkv"], dim=1)
    assert torch.equal(theirs["transformer.h.1.attn.c_attn.weight"], fused.bfloat16())
    assert torch.equal(theirs["transformer.wte.weight"], weights["embed_tokens.weight"].bfloat16())
    assert "lm_head.weight" not in theirs, "tied: written once"
    assert SafetensorsWeights(tmp_path / "out").shapes == {n: tuple(t.shape) for n, t in theirs.items()}


def test_without_transformers_bits_are_compared_and_it_is_said_loudly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", model_config("qwen3"))
    monkeypatch.setattr(exporting, "transformers_version", lambda: "")
    assert main(["export", str(run), "--to", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "bit for bit" in said.out
    assert "LOGITS WERE NOT COMPARED: transformers is not installed" in said.err
    monkeypatch.undo()
    assert main(["export", str(run), "--to", str(tmp_path / "two"), "--no-compare"]) == 0
    assert "--no-compare was given" in capsys.readouterr().err


def test_bits_that_read_back_otherwise_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", model_config("llama"))
    write = exporting.write_safetensors

    def flip(weights: Any, folder: Path, most: int) -> Any:
        files = write(weights, folder, most)
        with files[0].open("r+b") as f:
            f.seek(-5, 2)
            byte = f.read(1)[0]
            f.seek(-5, 2)
            f.write(bytes([byte ^ 1]))
        return files

    monkeypatch.setattr(exporting, "write_safetensors", flip)
    with pytest.raises(RunError, match=r"lm_head.weight reads back otherwise"):
        export(run, tmp_path / "out", compare=False)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_wrong_logits_stop_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", model_config("llama"))
    described = exporting.to_hugging_face
    monkeypatch.setattr(exporting, "to_hugging_face", lambda m, f: described(m, f) | {"rope_theta": 9000.0})
    with pytest.raises(RunError, match="transformers' logits differ from bigtrain's"):
        export(run, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_an_existing_model_is_replaced_only_when_told_and_nothing_else_ever(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", model_config("llama"))
    out = tmp_path / "out"
    out.mkdir()
    export(run, out, dtype="fp32", compare=False)
    with pytest.raises(UserError, match="is not empty"):
        export(run, out, compare=False)
    export(run, out, overwrite=True, compare=False)
    assert SafetensorsWeights(out).tensors["model.norm.weight"].dtype == "BF16"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="no exported model"):
        export(run, tmp_path / "home", overwrite=True, compare=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "out", "run"]


def test_fp16_refuses_values_that_it_cannot_hold(tmp_path: Path) -> None:
    model = model_config("llama")
    weights = weights_of(model)
    export(make_run(tmp_path / "small", model, weights), tmp_path / "out", dtype="fp16")
    weights["norm.weight"][3] = 1e5
    with pytest.raises(UserError, match=r"model.norm.weight has values up to 1e\+05.*\n.*bf16"):
        export(make_run(tmp_path / "run", model, weights), tmp_path / "large", dtype="fp16")


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", model_config("tied"))
    step = run / "checkpoints" / "step_00000007"
    assert main(["export", str(step), "--to", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    for word in (
        "llama",
        "model.safetensors",
        "tokenizer.json",
        "parameters in bf16",
        "step_00000007",
        "AutoModel",
    ):
        assert word in text
    assert main(["export", str(run), "--to", str(tmp_path / "x"), "--max-shard-gb", "0"]) == 2
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}


# ---- tokenizer


def loaded(tokenizer: Tokenizer, folder: Path, family: str = "llama") -> tuple[Any, list[str]]:
    folder.mkdir()
    warnings = write_tokenizer(tokenizer, folder, 64)
    write_json(folder / "config.json", {"model_type": family})
    return transformers.AutoTokenizer.from_pretrained(folder), warnings


def probes(count: int) -> list[str]:
    choose = random.Random(0)
    letters = (" ab-\n\tteh", "  d=g", "\u2581 <s>/0xA")
    fuzz = ["".join(choose.choices(choose.choice(letters), k=choose.randint(1, 60))) for _ in range(count)]
    return [*HOSTILE, *texts()[:50], *fuzz]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gpt2"])
def test_auto_tokenizer_gives_our_ids(family: str, tmp_path: Path) -> None:
    ours = small_tokenizer("bpe")
    theirs, warnings = loaded(ours, tmp_path / "t", family)
    assert warnings == []
    for text in probes(500):
        ids = ours.encode(text).tolist()
        assert theirs.encode(text, add_special_tokens=False) == ids, repr(text)
        assert theirs.encode(text) == [ours.bos_id, *ids], "a document begins with BOS"
        assert theirs.decode(ids) == ours.decode(ids), repr(text)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 3)
    assert len(theirs) == ours.vocab_size


def test_unigram_ids_are_ours_but_for_ties_which_is_said(tmp_path: Path) -> None:
    ours = small_tokenizer("unigram")
    theirs, warnings = loaded(ours, tmp_path / "t")
    assert "unigram" in warnings[0]
    for text in [*HOSTILE, *texts()[:50]]:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text).tolist(), repr(text)


def test_a_tokenizer_that_transformers_loads_otherwise_is_said(tmp_path: Path) -> None:
    """transformers 5 makes a byte-level Qwen2Tokenizer of whatever lies beside a qwen2 model."""
    run = make_run(tmp_path / "run", model_config("qwen2"))
    written = export(run, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    equal = (
        theirs.encode(compare._PROBE, add_special_tokens=False)
        == small_tokenizer().encode(compare._PROBE).tolist()
    )
    assert equal != any("PreTrainedTokenizerFast" in w for w in written.warnings)
    right = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert right.encode("a  b\n", add_special_tokens=False) == small_tokenizer().encode("a  b\n").tolist()
