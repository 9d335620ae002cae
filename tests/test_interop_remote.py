"""Models in an object store: exported to a URL and read from one, against a real S3 server on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from bigtrain.checkpoint import location
from bigtrain.checkpoint.boxes import Box
from bigtrain.cli import main
from bigtrain.configfile import load
from bigtrain.errors import RunError, UserError
from bigtrain.exporting import export
from bigtrain.importing import import_weights
from bigtrain.interop import draft, safetensors_reader
from bigtrain.interop.safetensors_reader import SafetensorsWeights
from tests.foreign_parts import make_run, model_config, weights_of
from tests.test_import import read_all


def put_folder(folder: Path, url: str) -> None:
    for file in folder.iterdir():
        location.put(location.place(url) / file.name, file.read_bytes())


def test_what_was_exported_to_a_url_is_read_from_there(
    s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In several files; the config that `bigtrain import` writes names the URL."""
    pytest.importorskip("transformers")
    model = model_config("gpt2-untied")
    run = make_run(tmp_path / "run", model)
    command = ["export", str(run), "--to", s3, "--dtype", "fp32", "--max-shard-gb", "3e-5"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "largest difference of a logit" in text
    assert "copy it to a folder and load it" in text
    names = location.names(location.place(s3))
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer.model"} < set(names)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    expected = weights_of(model)
    assert all(torch.equal(t, expected[name]) for name, t in read_all(location.place(s3), model).items())
    assert main(["import", s3, "--out", str(tmp_path / "next.toml")]) == 0
    text = capsys.readouterr().out
    assert f"copy {s3}/tokenizer.model here" in text
    assert "--tokenizer tokenizer.model" in text
    config = load(tmp_path / "next.toml")
    assert (config.name, config.train.init_from) == ("checkpoints", s3)
    assert config.model.heads == model.heads


def test_columns_are_read_as_whole_rows_in_few_requests(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_config("llama")
    export(make_run(tmp_path / "run", model), s3, dtype="fp32", compare=False)
    weights = SafetensorsWeights(location.place(s3))
    name = "model.layers.0.mlp.down_proj.weight"
    rows, columns = weights.shapes[name]
    monkeypatch.setattr(safetensors_reader, "BUFFER", 4 * columns * 5 + 3)
    requests = []
    fill: Any = location._fill
    monkeypatch.setattr(location, "_fill", lambda *a: requests.append(a[2]) or fill(*a))
    found = torch.full((rows - 3, columns // 2), 7.0)
    weights.read(name, Box((2, columns // 4), tuple(found.shape)), found)
    stored = weights_of(model)["layers.0.mlp.down_proj.weight"]
    assert torch.equal(found, stored[2 : rows - 1, columns // 4 : columns // 4 + columns // 2])
    assert len(requests) == -(-(rows - 3) // 5)
    vector = torch.zeros(3)
    weights.read("model.norm.weight", Box((4,), (3,)), vector)
    assert torch.equal(vector, weights_of(model)["norm.weight"][4:7])


def test_a_distributed_checkpoint_is_read_from_a_store(s3: str, tmp_path: Path) -> None:
    model = model_config("llama")
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save(weights_of(model), checkpoint_id=tmp_path / "dcp")  # type: ignore[arg-type]
    put_folder(tmp_path / "dcp", s3)
    expected = weights_of(model)
    assert all(torch.equal(t, expected[name]) for name, t in read_all(location.place(s3), model).items())
    (data,) = (tmp_path / "dcp").glob("*.distcp")
    location.put(location.place(s3) / data.name, data.read_bytes()[:-5000])
    with pytest.raises(UserError, match="ends inside"):
        read_all(location.place(s3), model)
    location.remove(location.place(s3) / data.name)
    with pytest.raises(UserError, match="1 of 1 data files are missing"):
        read_all(location.place(s3), model)


def test_a_model_is_replaced_only_when_told_and_nothing_else_goes(s3: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", model_config("llama"))
    out = location.place(s3)
    location.put(out / "notes.txt", b"x")
    with pytest.raises(UserError, match="is not empty"):
        export(run, s3, compare=False)
    with pytest.raises(UserError, match="no exported model"):
        export(run, s3, compare=False, overwrite=True)
    location.put(out / "config.json", b"{}")
    export(run, s3, compare=False, overwrite=True, max_shard_bytes=30_000)
    assert len([n for n in location.names(out) if n.startswith("model-")]) > 1
    export(run, s3, compare=False, overwrite=True)
    assert [n for n in location.names(out) if n.startswith("model")] == ["model.safetensors"]
    assert location.read(out / "notes.txt") == b"x"


def test_an_upload_that_is_cut_short_is_no_model_and_can_be_repeated(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_config("llama")
    run = make_run(tmp_path / "run", model)
    out = location.place(s3)
    with monkeypatch.context() as patch:
        patch.setattr(draft.shutil, "copyfileobj", broken_after(3, draft.shutil.copyfileobj))
        with pytest.raises(RunError, match="cut"):
            export(run, s3, compare=False)
    assert "model.safetensors" in location.names(out)
    assert "config.json" not in location.names(out)
    with pytest.raises(UserError, match=r"has no config.json"):
        import_weights(s3)
    export(run, s3, compare=False, overwrite=True)
    assert read_all(out, model)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def broken_after(calls: int, copy: Any) -> Any:
    """A copy that fails as a killed process would, in the middle of the upload."""
    left = [calls]

    def copy_or_break(*arguments: Any) -> None:
        if not left[0]:
            raise ConnectionError("cut")
        left[0] -= 1
        copy(*arguments)

    return copy_or_break


def test_damage_and_wrong_names_are_named(
    s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_config("llama")
    run = make_run(tmp_path / "run", model)
    for url, word in (
        (s3, "is no folder, or empty"),
        ("s3://no-such-bucket/model", "s3://no-such-bucket/model"),
    ):
        assert main(["import", url]) == 2
        assert word in capsys.readouterr().err
    assert main(["export", str(run), "--to", "s3://no-such-bucket/model", "--no-compare"]) == 2
    text = capsys.readouterr().err
    assert "check the bucket's name" in text
    assert "Traceback" not in text
    export(run, s3, compare=False)
    file = location.place(s3) / "model.safetensors"
    whole = location.read(file)
    location.put(file, whole[:-100])
    with pytest.raises(UserError, match=r"model.safetensors: is truncated or altered"):
        read_all(location.place(s3), model)
    location.put(file, b"")
    with pytest.raises(UserError, match=r"0 bytes"):
        read_all(location.place(s3), model)
    location.put(file, whole)
    weights = SafetensorsWeights(location.place(s3))
    location.remove(file)
    name, shape = next(iter(weights.shapes.items()))
    with pytest.raises(UserError, match=r"model.safetensors: cannot be read"):
        weights.read(name, Box((0,) * len(shape), shape), torch.empty(shape))
