"""Other people's weights: what is read is what is there, and whatever is not as it should be is named."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from bigtrain.checkpoint.boxes import Box
from bigtrain.cli import main
from bigtrain.config import ModelConfig
from bigtrain.configfile import load, render
from bigtrain.engine import make_engine
from bigtrain.errors import UserError
from bigtrain.exporting import export
from bigtrain.importing import import_weights
from bigtrain.interop import safetensors_reader
from bigtrain.interop.dcp import DcpWeights
from bigtrain.interop.families import family_of, from_hugging_face, to_hugging_face
from bigtrain.interop.initial import find_parameters, init_from, start_from
from bigtrain.interop.safetensors_reader import SafetensorsWeights
from bigtrain.logical import Piece
from bigtrain.model.build import build_model
from tests.foreign_parts import MODELS, ONE, config_of, make_run, model_config, weights_of


def exported(folder: Path, name: str = "llama", **options: Any) -> Path:
    """An exported model in folder/hf."""
    make_run(folder / "run", model_config(name))
    export(folder / "run", folder / "hf", compare=False, **options)
    return folder / "hf"


def read_all(folder: Path, model: ModelConfig) -> dict[str, torch.Tensor]:
    """Every parameter through `init_from`."""
    found = {n: torch.full(p.shape, 7.0) for n, p in build_model(model, device="meta").named_parameters()}
    pieces = [Piece("master", n, tuple(t.shape), (0,) * t.dim(), t) for n, t in found.items()]
    init_from(folder, pieces, model, ONE)
    return found


# ---- config.json


@pytest.mark.parametrize("name", MODELS)
def test_config_json_says_the_model(name: str) -> None:
    model = model_config(name)
    back = from_hugging_face(json.loads(json.dumps(to_hugging_face(model, family_of(model)))), "x")
    for key in ("num_kv_heads", "dim_per_head", "ffn"):
        assert getattr(back, key) == getattr(model, key)
    exact = {
        "kv_heads": 1,
        "head_dim": 2,
        "ffn_width": 1,
        "qkv_bias": False,
    }  # said in another way, or implied
    assert back.model_copy(update=exact) == model.model_copy(update=exact)
    assert back.qkv_bias == model.qkv_bias


@pytest.mark.parametrize("name", ["llama3", "window", "qwen2-window", "qwen3", "gpt2", "yarn"])
def test_config_json_as_transformers_writes_it_says_the_model_too(name: str, tmp_path: Path) -> None:
    """transformers 5 writes `rope_parameters` and `layer_types`, and leaves some defaults out."""
    transformers = pytest.importorskip("transformers")
    model = model_config(name)
    ours = to_hugging_face(model, family_of(model))
    transformers.AutoConfig.for_model(**ours).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert from_hugging_face(written, "x") == from_hugging_face(ours, "x")


BAD_CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "family": ({"model_type": "mamba"}, ["'mamba' is no family", "bigtrain has llama, mistral"]),
    "several": (
        {"hidden_act": "gelu", "attention_bias": True, "hidden_size": None, "partial_rotary_factor": 0.5},
        ["hidden_act: 'gelu'", "attention_bias, mlp_bias", "hidden_size: is missing", "partial_rotary_factor"],
    ),
    "rope": ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, ["rope_type: 'longrope'"]),
    "yarn": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0, "truncate": False}},
        ["attention_factor: bigtrain's yarn has 0.1 ln(factor) + 1 = 1.138629", "truncate"],
    ),
    "quantised": ({"quantization_config": {"bits": 4}}, ["quantization_config", "dequantise"]),
    "arithmetic": ({"num_key_value_heads": 3}, ["heads 4 is not a multiple of kv_heads 3"]),
    "type": ({"vocab_size": "many"}, ["model.vocab_size"]),
    "layers of two kinds": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        ["layer_types: some layers"],
    ),
    "erf": (
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 8}
        | {"activation_function": "gelu"},
        ["activation_function: 'gelu', bigtrain has 'gelu_new'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_models_that_bigtrain_has_not_are_refused_with_every_reason(case: str) -> None:
    changes, words = BAD_CONFIGS[case]
    with pytest.raises(UserError) as refused:
        from_hugging_face(to_hugging_face(model_config("llama"), "llama") | changes, "config.json")
    for word in words:
        assert word in str(refused.value)


# ---- reading


@pytest.mark.parametrize("shard", [10**9, 20_000])
@pytest.mark.parametrize("name", ["tied", "qwen3", "gpt2-untied", "biases"])
def test_an_exported_model_is_read_back(name: str, shard: int, tmp_path: Path) -> None:
    folder = exported(tmp_path, name, dtype="fp32", max_shard_bytes=shard)
    found = read_all(folder, model_config(name))
    for key, tensor in weights_of(model_config(name)).items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_import_and_export_again_give_the_same_bits_in_bf16(name: str, tmp_path: Path) -> None:
    folder = exported(tmp_path, name)
    model = from_hugging_face(json.loads((folder / "config.json").read_text()), "x")
    make_run(tmp_path / "second", model, read_all(folder, model))
    export(tmp_path / "second", tmp_path / "again", compare=False)
    first, second = (SafetensorsWeights(f).tensors for f in (folder, tmp_path / "again"))
    assert {n: (e.dtype, e.shape) for n, e in first.items()} == {
        n: (e.dtype, e.shape) for n, e in second.items()
    }
    one, two = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    for key in one:
        assert torch.equal(one[key].view(torch.int16), two[key].view(torch.int16)), key


@pytest.mark.parametrize("buffer", [16, 500, 1 << 20])
def test_boxes_are_read_by_their_bytes_and_no_others(
    buffer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, vector = torch.randn(23, 17), torch.randn(40).bfloat16()
    save_file({"matrix": matrix, "vector": vector}, tmp_path / "model.safetensors")
    weights = SafetensorsWeights(tmp_path)
    monkeypatch.setattr(safetensors_reader, "BUFFER", buffer)
    read = [0]
    preadv = os.preadv

    def counting(fd: int, buffers: Any, offset: int) -> int:
        read[0] += sum(map(len, buffers))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    for offset, sizes in (((0, 0), (23, 17)), ((3, 5), (11, 7)), ((22, 0), (1, 17)), ((4, 16), (19, 1))):
        read[0] = 0
        target = torch.zeros(sizes)
        weights.read("matrix", Box(offset, sizes), target)
        rows, columns = (slice(o, o + n) for o, n in zip(offset, sizes, strict=True))
        assert torch.equal(target, matrix[rows, columns])
        assert read[0] == target.numel() * 4
    turned = torch.zeros(7, 11)
    weights.read("matrix", Box((3, 5), (11, 7)), turned.t())
    assert torch.equal(turned, matrix[3:14, 5:12].T)
    part = torch.zeros(9)
    weights.read("vector", Box((30,), (9,)), part)
    assert torch.equal(part, vector[30:39].float())


def test_training_starts_with_the_weights_and_without_moments(tmp_path: Path) -> None:
    """The reference engine, in fp32 and bf16: masters exact, compute weights rounded from them."""
    folder = exported(tmp_path, "qwen3", dtype="fp32")
    weights = weights_of(model_config("qwen3"))
    for precision in ("fp32", "bf16"):
        config = config_of(model_config("qwen3"), init_from=str(folder), precision=precision)
        engine = make_engine(build_model(config.model, device="meta"), config, ONE)
        notes = start_from(str(folder), engine, config, ONE)
        assert "weights from" in notes[0]
        assert len(notes) == 1, "config.json says the same model"
        for piece in engine.pieces(owned=True):
            expected = weights[piece.name] if piece.kind == "master" else torch.zeros(piece.shape)
            assert torch.equal(piece.tensor, expected), (piece.kind, piece.name)
        for name, parameter in engine.model.named_parameters():  # type: ignore[attr-defined]
            assert torch.equal(parameter.float(), weights[name].to(parameter.dtype).float())
        assert engine.extra_state()["updates"] == 0


def test_what_config_json_says_otherwise_is_told(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    model = model_config("llama", rope_theta=500000.0, max_length=4096)
    pieces: list[Piece] = []
    notes = init_from(folder, pieces, model, ONE)
    assert notes[1:] == [f"model.rope_theta: 10000.0 in {folder}/config.json, 500000.0 in this run"]


# ---- the verb


def test_import_writes_a_config_that_trains_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = exported(tmp_path, "gpt2")
    out = tmp_path / "next.toml"
    assert main(["import", str(folder), "--out", str(out), "--data", "data/mine"]) == 0
    text = capsys.readouterr().out
    for word in (f"bigtrain train {out}", f"--tokenizer {folder}/tokenizer.model", "parameters, each found"):
        assert word in text
    config = load(out)
    assert config.train.init_from == str(folder)
    assert config.data.path == "data/mine"
    assert config.data.sequence_length == 128
    assert find_parameters(folder, config.model).ignored == []
    assert main(["import", str(folder), "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_import_with_a_config_keeps_it(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    given = tmp_path / "given.toml"
    given.write_text(render(config_of(model_config("llama"))))
    found = import_weights(folder, out=tmp_path / "out.toml", config=str(given))
    assert found.config == load(tmp_path / "out.toml")
    assert found.config == config_of(model_config("llama"), init_from=str(folder))


# ---- what is wrong is named


def fails(folder: Path, *words: str, config: Path | None = None) -> None:
    with pytest.raises(UserError) as refused:
        import_weights(folder, out=folder / "never.toml", config=str(config) if config else None)
    for word in words:
        assert word in str(refused.value), str(refused.value)
    assert not (folder / "never.toml").exists()


def test_no_weights_or_pickled_ones(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    (folder / "model.safetensors").unlink()
    fails(folder, str(folder), "holds neither model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    fails(folder, "pytorch_model.bin", "pickles", "save_pretrained")
    (folder / "config.json").unlink()
    fails(folder, "no config.json", "--config")
    fails(tmp_path / "nowhere", "is no folder")


@pytest.mark.parametrize("at", [0, 5, 100, -1])
def test_a_truncated_file(at: int, tmp_path: Path) -> None:
    folder = exported(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:at])
    fails(folder, str(path), "truncated")


HEADERS: dict[str, bytes] = {
    "no JSON": b"{hello",
    "a list": b"[1]",
    "no offsets": b'{"x":{"dtype":"F32","shape":[1]}}',
    "a contradiction": b'{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,4]}}',
    "beyond the end": b'{"x":{"dtype":"F32","shape":[100],"data_offsets":[0,400]}}',
    "negative": b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}',
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_wrong_header(case: str, tmp_path: Path) -> None:
    folder = exported(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(len(HEADERS[case]).to_bytes(8, "little") + HEADERS[case] + bytes(4))
    fails(folder, str(path), "truncated or altered" if case == "beyond the end" else "header is damaged")


def test_a_header_that_claims_to_be_endless(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    (folder / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + bytes(100))
    fails(folder, "a header of 1152921504606846976")


def test_missing_shards_and_wrong_indexes(tmp_path: Path) -> None:
    folder = exported(tmp_path, max_shard_bytes=20_000)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    second = folder / sorted(set(content["weight_map"].values()))[1]
    kept = second.read_bytes()
    second.unlink()
    fails(folder, str(index), second.name, "missing")
    second.write_bytes(kept)
    first = sorted(set(content["weight_map"].values()))[0]
    moved = next(t for t, f in content["weight_map"].items() if f == second.name)
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {moved: first}}))
    fails(folder, first, f"{moved} is not in it")
    index.write_text(json.dumps({"weight_map": {moved: "../elsewhere.safetensors"}}))
    fails(folder, "outside the directory")
    index.write_text("{}")
    fails(folder, "weight_map")
    index.write_text("{")
    fails(folder, "is not JSON")


def test_every_tensor_that_differs_is_named(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.zeros(31)
    tensors["model.layers.0.mlp.experts.weight"] = torch.zeros(1)
    tensors["lm_head.weight"] = torch.zeros(515, 32, dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors")
    fails(
        folder,
        "4 differences",
        "model.layers.1.mlp.up_proj.weight: missing",
        "model.norm.weight: shape (31,) there, (32,) in this model",
        "model.layers.0.mlp.experts.weight: not in this model",
        "lm_head.weight: has dtype I8",
    )


def test_buffers_of_old_files_and_a_second_head_do_no_harm(tmp_path: Path) -> None:
    folder = exported(tmp_path, "tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros(515, 32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, folder / "model.safetensors")
    found = import_weights(folder, out=tmp_path / "x.toml")
    assert sorted(found.ignored) == ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]


def test_gpt2_without_its_prefix_is_found(tmp_path: Path) -> None:
    """The files of the first GPT-2 have no "transformer."."""
    folder = exported(tmp_path, "gpt2", dtype="fp32")
    tensors = load_file(folder / "model.safetensors")
    bare = {n.removeprefix("transformer."): t for n, t in tensors.items()} | {
        "h.0.attn.bias": torch.ones(1, 1, 9, 9)
    }
    save_file(bare, folder / "model.safetensors")
    found = read_all(folder, model_config("gpt2"))
    assert all(torch.equal(found[n], t) for n, t in weights_of(model_config("gpt2")).items())


# ---- torch.distributed.checkpoint


def save_dcp(folder: Path, state: dict[str, Any]) -> Path:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def config_file(folder: Path, name: str) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(render(config_of(model_config(name))))
    return path


@pytest.mark.parametrize("naming", ["ours", "model.ours", "theirs", "model.theirs"])
@pytest.mark.parametrize("name", ["tied", "gpt2-untied"])
def test_a_distributed_checkpoint_is_read_in_every_naming(name: str, naming: str, tmp_path: Path) -> None:
    weights = weights_of(model_config(name))
    state: dict[str, Any] = dict(weights)
    if naming.endswith("theirs"):
        state = dict(load_file(exported(tmp_path, name, dtype="fp32") / "model.safetensors"))
    if naming.startswith("model."):
        state = {f"model.{n}": t for n, t in state.items()}
    moments = {f"optim.state.{n}.exp_avg": torch.zeros_like(t) for n, t in state.items()}
    folder = save_dcp(tmp_path / "dcp", state | moments | {"step": 5, "rng": torch.get_rng_state()})
    found = import_weights(folder, out=tmp_path / "out.toml", config=str(config_file(tmp_path, name)))
    assert found.config.train.init_from == str(folder)
    read = read_all(folder, model_config(name))
    for key, tensor in weights.items():
        assert torch.equal(read[key], tensor), key
    with pytest.raises(UserError, match=r"no config.json.*\n.*--config"):
        import_weights(folder, out=tmp_path / "other.toml")


def test_only_needed_items_of_a_distributed_checkpoint_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_config("llama")
    folder = save_dcp(tmp_path / "dcp", weights_of(model))
    loads = [0]
    real = torch.load

    def counting(*a: Any, **k: Any) -> Any:
        assert k["weights_only"] is True
        loads[0] += 1
        return real(*a, **k)

    monkeypatch.setattr(torch, "load", counting)
    out = torch.zeros(3, 32)
    init_from(folder, [Piece("master", "lm_head.weight", (515, 32), (9, 0), out)], model, ONE)
    assert loads == [1]
    assert torch.equal(out, weights_of(model)["lm_head.weight"][9:12])


class Evil:
    """What a pickle can do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("where", ["planner_data", "storage_data"])
def test_malicious_metadata_is_refused_before_it_acts(where: str, tmp_path: Path) -> None:
    folder = save_dcp(tmp_path / "dcp", weights_of(model_config("llama")))
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    trace = tmp_path / "it-ran"
    setattr(metadata, where, {"x": Evil(trace)})
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    fails(folder, "asks for posix.system", "do not trust", config=config_file(tmp_path, "llama"))
    assert not trace.exists()


@pytest.mark.parametrize(
    "target", ["builtins.eval", "torch.load", "torch.hub.load", "pickle.loads", "pathlib.Path.unlink"]
)
def test_other_names_are_refused_too(target: str, tmp_path: Path) -> None:
    module, _, name = target.rpartition(".")
    if target == "pathlib.Path.unlink":
        module, name = "pathlib", "Path.unlink"
    raw = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(w)]) + w.encode() for w in (module, name)) + b"\x93."
    (tmp_path / ".metadata").write_bytes(raw)
    with pytest.raises(UserError, match=f"asks for {target}"):
        DcpWeights(tmp_path)


def test_a_malicious_item_is_refused(tmp_path: Path) -> None:
    model = model_config("llama")
    folder = save_dcp(tmp_path / "dcp", weights_of(model))
    path = folder / "__0_0.distcp"
    item = DcpWeights(folder).tensors["norm.weight"][0]
    trace = tmp_path / "it-ran"
    bad = pickle.dumps(Evil(trace), protocol=2)
    raw = path.read_bytes()
    path.write_bytes(raw[: item.start] + bad.ljust(item.length, b"\0") + raw[item.start + item.length :])
    with pytest.raises(UserError, match=r"norm.weight cannot be read"):
        read_all(folder, model)
    assert not trace.exists()


def test_damaged_distributed_checkpoints_are_named(tmp_path: Path) -> None:
    model, config = model_config("llama"), config_file(tmp_path, "llama")
    folder = save_dcp(tmp_path / "dcp", weights_of(model))
    copy = shutil.copytree(folder, tmp_path / "short")
    data = copy / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"__0_0.distcp: ends inside"):
        read_all(copy, model)
    data.unlink()
    fails(copy, "__0_0.distcp", "missing", config=config)
    (copy / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:-20])
    fails(copy, ".metadata: is damaged", config=config)
    (copy / ".metadata").write_bytes(pickle.dumps({"no": "metadata"}))
    fails(copy, "holds a dict", config=config)
    fewer = save_dcp(tmp_path / "fewer", {n: t for n, t in weights_of(model).items() if n != "norm.weight"})
    fails(fewer, "norm.weight: missing", config=config)
