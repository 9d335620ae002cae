"""What two checkpoints have in common and what not: equal to the bit, and every kind of difference by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from bigtrain.checkpoint import compare as comparing
from bigtrain.checkpoint import store
from bigtrain.checkpoint.compare import compare
from bigtrain.checkpoint.format import DamagedError
from bigtrain.cli import main
from bigtrain.logical import Piece
from tests.test_checkpoint_reader import flip, numbered, peak_mib, piece, whole_box
from tests.test_checkpoint_store import ONE, in_data, save, three_files


def saved(root: Path, tensors: dict[str, torch.Tensor], state: dict[str, object], step: int = 1) -> Path:
    return store.save(root, step, [piece(n, t, whole_box(t)) for n, t in tensors.items()], state, ONE)


def compared(a: Path, b: Path) -> comparing.Comparison:
    return compare(str(a), str(b))


def test_another_layout_of_the_same_numbers_is_equal_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(comparing, "CHUNK", 100)  # so that a tensor is compared in many parts
    one, three = save(tmp_path / "one", 7), three_files(tmp_path / "three", 7)
    found = compared(one, three)
    assert found.equal
    assert found.same_tensors
    assert found.differences == []
    assert "all 18 are equal to the bit" in str(found)
    assert main(["inspect", str(one), str(three)]) == 0
    assert "equal to the bit" in capsys.readouterr().out


def test_every_number_of_a_difference_is_what_it_is_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "CHUNK", 5)
    a = {"far": torch.ones(3, 4), "near": torch.ones(3, 4), "same": numbered((7,))}
    b = {name: t.clone() for name, t in a.items()}
    b["far"][1, 2] = 4.0
    b["far"][2, 3] = -3.0
    b["near"][0, 0] = 1.0 + 2**-20
    found = compared(saved(tmp_path / "a", a, {}), saved(tmp_path / "b", b, {}))
    assert not found.equal
    assert [d.name for d in found.differences] == ["far", "near"], "the worst first"
    far, near = found.differences
    assert (far.unequal, far.elements, far.largest) == (2, 12, 4.0)
    assert far.relative == pytest.approx(math.sqrt((9 + 16) / 12))
    assert (near.unequal, near.largest) == (1, 2**-20)
    assert near.relative == pytest.approx(2**-20 / math.sqrt(12))
    assert "2 of 3 in both differ" in str(found)


def test_what_no_subtraction_shows_is_not_overlooked(tmp_path: Path) -> None:
    nan, inf = math.nan, math.inf
    a = {"both": torch.tensor([nan, inf, 1.0]), "one": torch.tensor([nan, 1.0]), "sign": torch.tensor([0.0])}
    b = {"both": torch.tensor([nan, inf, 1.0]), "one": torch.tensor([2.0, 1.0]), "sign": torch.tensor([-0.0])}
    found = compared(saved(tmp_path / "a", a, {}), saved(tmp_path / "b", b, {}))
    by_name = {d.name: d for d in found.differences}
    assert set(by_name) == {"one", "sign"}, "the same NaN is no difference"
    assert by_name["one"].largest == math.inf
    assert (by_name["sign"].unequal, by_name["sign"].largest, by_name["sign"].relative) == (1, 0.0, 0.0)
    text = json.dumps(found.to_json(), allow_nan=False)
    assert json.loads(text)["differences"][0]["largest"] is None


def test_tensors_of_one_side_shapes_dtypes_and_state_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layouts = ({"world": 1, "zero": 0}, {"world": 2, "zero": 0})
    states = [
        {"progress": {"step": s, "tokens": 64}, "data": "abc", "layout": w} for s, w in enumerate(layouts)
    ]
    a = {
        "old": numbered((2,)),
        "shape": numbered((2, 3)),
        "dtype": numbered((4,)),
        "scalar": torch.tensor(1.0),
    }
    b = {
        "new": numbered((2,)),
        "shape": numbered((6,)),
        "dtype": numbered((4,)).half(),
        "scalar": a["scalar"],
    }
    first, second = saved(tmp_path / "a", a, states[0]), saved(tmp_path / "b", b, states[1], step=2)
    assert main(["inspect", str(first), str(second)]) == 1
    text = capsys.readouterr().out
    for line in (
        "step        1 and 2",
        "state       progress.step: 0 and 1",
        "state       layout.world: 1 and 2",
        "only first  master of old: float32 2",
        "only second master of new: float32 2",
        "unlike      master of shape: float32 2x3 and float32 6",
        "unlike      master of dtype: float32 4 and float16 4",
        "tensors     all 2 in both are equal to the bit",
    ):
        assert line in text
    assert "tokens" not in text, "what is equal is not told"
    assert main(["inspect", str(first), str(second), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] is False
    assert found["steps"] == [1, 2]
    assert found["state"] == {"progress.step": [0, 1], "layout.world": [1, 2]}
    assert [t["name"] for t in found["only_first"]] == ["old"]


def test_the_layout_alone_makes_no_difference_but_is_told(tmp_path: Path) -> None:
    tensors = {"w": numbered((2, 2))}
    states = [{"data": "abc", "layout": {"world": world}} for world in (1, 8)]
    found = compared(saved(tmp_path / "a", tensors, states[0]), saved(tmp_path / "b", tensors, states[1]))
    assert found.equal
    assert found.state == {"layout.world": (1, 8)}


def test_a_run_stands_for_its_newest_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "checkpoints", 1)
    newest = save(tmp_path / "checkpoints", 2)
    (tmp_path / "config.toml").write_text((Path(__file__).parents[1] / "configs/quickstart.toml").read_text())
    assert main(["inspect", str(tmp_path), str(newest), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["paths"] == [str(newest), str(newest)]
    assert main(["inspect", str(tmp_path / "config.toml"), str(newest)]) == 2
    assert "neither a checkpoint nor a run" in capsys.readouterr().err
    assert main(["inspect", str(newest), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["problems"], len(found["tensors"])) == (2, [], 18)
    (newest / "manifest.json").unlink()
    assert main(["inspect", str(tmp_path), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [t["sound"] for t in told] == [True, False]
    assert "manifest.json" in told[1]["problems"][0]
    assert main(["inspect", str(newest)]) == 1
    assert "DAMAGED" in capsys.readouterr().out
    assert main(["inspect", "quickstart", "--json"]) == 2
    assert "--json" in capsys.readouterr().err


def test_damage_is_named_and_no_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = three_files(tmp_path / "a", 1), three_files(tmp_path / "b", 1)
    file = b / "rank_00001.bin"
    flip(file, in_data(file, 0))
    with pytest.raises(DamagedError, match=r"rank_00001\.bin"):
        compared(a, b)
    assert main(["inspect", str(a), str(b)]) == 1
    assert "rank_00001.bin" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's resettable peak")
def test_memory_stays_bounded(tmp_path: Path) -> None:
    """Tensors of 128 MiB are compared in a fraction of that."""
    big = torch.ones(4096, 8192)
    one = store.save(tmp_path / "one", 1, [piece("w", big, whole_box(big))], {}, ONE)
    big[4000, 7000] = 2.0
    columns = [Piece("master", "w", (4096, 8192), (0, c), big[:, c : c + 4096]) for c in (0, 4096)]
    two = store.save(tmp_path / "two", 1, columns, {}, ONE)
    del big, columns
    before = peak_mib(reset=True)
    found = compared(one, two)
    assert [(d.unequal, d.largest) for d in found.differences] == [(1, 1.0)]
    extra = peak_mib() - before
    assert extra < 120, f"{extra:.0f} MiB"
