"""Any partition of tensors into boxes is read back by any other, bit for bit; only what is needed is read."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigtrain.checkpoint import format, reader, store, writer
from bigtrain.checkpoint.boxes import Box, coverage_problem, flat_hull, intersection
from bigtrain.errors import UserError
from bigtrain.logical import Piece, boxes_of_flat_range, mark_logical
from bigtrain.mesh import Mesh
from bigtrain.place import Place

ONE = Mesh(Place(0, 1, 0, 1, "single"), torch.device("cpu"), None)


def numbered(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, first: int = 1) -> torch.Tensor:
    """A tensor whose every element tells its place."""
    return (torch.arange(math.prod(shape)) + first).reshape(shape).to(dtype)


def piece(name: str, whole: torch.Tensor, box: Box, kind: str = "master") -> Piece:
    """The part of `whole` in `box`, as a view (not contiguous when the box is a column)."""
    return Piece(kind, name, tuple(whole.shape), box.offset, whole[box.within((0,) * whole.dim())])


def whole_box(tensor: torch.Tensor) -> Box:
    return Box((0,) * tensor.dim(), tuple(tensor.shape))


@st.composite
def partitions(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Split a box again and again at random places, as tensor x ZeRO x pipeline layouts do."""
    boxes = [Box((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6))):
        i = draw(st.integers(0, len(boxes) - 1))
        axes = [d for d, n in enumerate(boxes[i].sizes) if n > 1]
        if not axes:
            continue
        d = draw(st.sampled_from(axes))
        box = boxes.pop(i)
        at = draw(st.integers(1, box.sizes[d] - 1))
        boxes.append(Box(box.offset, (*box.sizes[:d], at, *box.sizes[d + 1 :])))
        offset = (*box.offset[:d], box.offset[d] + at, *box.offset[d + 1 :])
        boxes.append(Box(offset, (*box.sizes[:d], box.sizes[d] - at, *box.sizes[d + 1 :])))
    return boxes


@st.composite
def flat_partitions(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Cut the flat numbering at random places, as ZeRO's partitions do."""
    total = math.prod(shape)
    cuts = [0, *sorted(draw(st.lists(st.integers(0, total), max_size=5))), total]
    return [
        Box(b.offset, b.sizes)
        for start, end in itertools.pairwise(cuts)
        for b in boxes_of_flat_range(shape, start, end - start)
    ]


shapes = st.lists(st.integers(1, 7), max_size=4).map(tuple)
layouts = shapes.flatmap(
    lambda s: st.tuples(
        st.just(s), st.one_of(partitions(s), flat_partitions(s)), st.one_of(partitions(s), flat_partitions(s))
    )
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layout=layouts,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    block=st.integers(1, 9),
)
def test_any_partition_to_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: tuple[tuple[int, ...], list[Box], list[Box]],
    dtype: torch.dtype, block: int,
) -> None:  # fmt: skip
    shape, saved, wanted = layout
    for module in (format, reader, writer):  # blocks of a few elements, so that boxes span several
        monkeypatch.setattr(module, "BLOCK", block * 8)
    source = numbered(shape, dtype)
    path = store.save(tmp_path, 1, [piece("w", source, box) for box in saved], {}, ONE)
    target = torch.zeros(shape, dtype=dtype)
    store.load(path, [piece("w", target, box) for box in wanted])
    assert torch.equal(target, source)


@settings(max_examples=100, deadline=None)
@given(layout=layouts, drop=st.integers(0, 50))
def test_coverage_finds_every_hole_and_every_double(
    layout: tuple[tuple[int, ...], list[Box], list[Box]], drop: int
) -> None:
    shape, boxes, others = layout
    assert coverage_problem(shape, boxes) == ""
    one = boxes[drop % len(boxes)]
    rest = [b for b in boxes if b is not one]
    assert "written by no rank" in coverage_problem(shape, rest)
    assert "written twice" in coverage_problem(shape, [*boxes, others[drop % len(others)]])
    # The same number of elements, but one box in another's place.
    double = next((b for b in rest if b.sizes == one.sizes), None)
    if double is not None:
        assert coverage_problem(shape, [*rest, double]) != ""


def test_coverage_finds_a_box_outside() -> None:
    assert "outside" in coverage_problem((4, 4), [Box((0, 1), (4, 4))])
    assert "outside" in coverage_problem((4, 4), [Box((0,), (16,))])


@given(layout=layouts)
def test_hull_holds_the_box_and_nothing_before_or_after(
    layout: tuple[tuple[int, ...], list[Box], list[Box]],
) -> None:
    shape, boxes, _ = layout
    whole = Box((0,) * len(shape), shape)
    numbers = numbered(shape, torch.int64, first=0)
    for box in boxes:
        inside = numbers[box.within(whole.offset)]
        assert flat_hull(box, whole) == (int(inside.min()), int(inside.max()) + 1)
        assert intersection(box, whole) == box


def saved(root: Path, **tensors: torch.Tensor) -> Path:
    return store.save(root, 1, [piece(n, t, whole_box(t)) for n, t in tensors.items()], {"a": 1}, ONE)


def test_every_difference_is_listed_at_once(tmp_path: Path) -> None:
    path = saved(tmp_path, same=numbered((2, 3)), shape=numbered((4,)), extra=numbered((2,)))
    model = {"same": torch.zeros(2, 3), "shape": torch.zeros(5), "missing": torch.zeros(1)}
    with pytest.raises(UserError) as caught:
        store.load(path, [piece(n, t, whole_box(t)) for n, t in model.items()])
    text = str(caught.value)
    assert "checkpoint of another model (3 differences)" in text
    assert "master of shape: shape (4,) in the checkpoint, (5,) wanted" in text
    assert "master of missing: not in the checkpoint" in text
    assert "master of extra: in the checkpoint only" in text
    assert not model["same"].any(), "nothing is loaded from a checkpoint that does not fit"


def test_another_optimizer_is_told_apart_from_another_model(tmp_path: Path) -> None:
    path = saved(tmp_path, w=numbered((3,)))
    w = torch.zeros(3)
    wanted = [piece("w", w, whole_box(w)), piece("w", w, whole_box(w), kind="exp_avg")]
    with pytest.raises(UserError, match=r"another optimizer \(1 difference\)"):
        store.load(path, wanted)


def test_another_dtype_needs_an_explicit_cast(tmp_path: Path) -> None:
    path = saved(tmp_path, w=numbered((3,)) / 3)
    half = torch.zeros(3, dtype=torch.bfloat16)
    with pytest.raises(UserError, match="float32 in the checkpoint, bfloat16"):
        store.load(path, [piece("w", half, whole_box(half))])
    store.load(path, [piece("w", half, whole_box(half))], cast=True)
    assert torch.equal(half, (numbered((3,)) / 3).bfloat16())


def test_load_weights_fills_a_plain_model_and_reads_no_optimizer_state(tmp_path: Path) -> None:
    def tied() -> torch.nn.Module:
        embedding, head = torch.nn.Embedding(11, 4), torch.nn.Linear(4, 11, bias=False)
        head.weight = embedding.weight
        model = torch.nn.Sequential(embedding, head)
        mark_logical(model)
        return model

    trained, fresh = tied(), tied().to(torch.bfloat16)
    weight = trained.get_parameter("0.weight").detach()
    moment = numbered((11, 4))
    pieces = [
        piece("0.weight", weight, whole_box(weight)),
        piece("0.weight", moment, whole_box(moment), "exp_avg"),
    ]
    path = store.save(tmp_path, 7, pieces, {"step": 7}, ONE)
    flip(path / "rank_00000.bin", 11 * 4 * 4 + 30)  # in the moment: not our business here
    assert store.load_weights(path, fresh) == {"step": 7}
    assert torch.equal(fresh.get_parameter("1.weight").detach(), weight.bfloat16())
    with pytest.raises(UserError, match="another model"):
        store.load_weights(path, torch.nn.Linear(4, 11))


def flip(path: Path, at: int) -> None:
    """Flip one bit of a byte."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x10
    path.write_bytes(raw)


def test_a_flip_is_found_where_it_is_read_and_only_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (format, reader, writer):
        monkeypatch.setattr(module, "BLOCK", 64)
    whole = numbered((8, 16))  # one row a block
    path = saved(tmp_path, w=whole)
    flip(path / "rank_00000.bin", 5 * 64 + 3)
    target = torch.zeros(8, 16)
    rows = [piece("w", target, Box((0, 0), (5, 16))), piece("w", target, Box((6, 0), (2, 16)))]
    reader.read_boxes(reader.open_checkpoint(path), rows, verify=True)
    assert torch.equal(target[[0, 1, 2, 3, 4, 6, 7]], whole[[0, 1, 2, 3, 4, 6, 7]])
    with pytest.raises(format.DamagedError, match="does not match its checksum"):
        store.load(path, [piece("w", target, whole_box(target))])
    store.load(path, [piece("w", target, whole_box(target))], verify=False)
    assert not torch.equal(target, whole), "without verification the flip goes through: that is what it costs"


def peak_mib(*, reset: bool = False) -> float:
    """Peak resident memory of this process, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's resettable peak")
def test_memory_stays_bounded(tmp_path: Path) -> None:
    """Saving a column view and loading into another layout takes no second copy of the state."""
    big, target = torch.ones(2048, 8192), torch.full((2048, 8192), 2.0)  # 64 MiB each
    halves = [piece("w", big, Box((0, 0), (2048, 5000))), piece("w", big, Box((0, 5000), (2048, 3192)))]
    before = peak_mib(reset=True)
    path = store.save(tmp_path, 1, halves, {}, ONE)
    store.load(path, [piece("w", target, whole_box(target))])
    assert torch.equal(target, big)
    extra = peak_mib() - before
    assert extra < 40, f"{extra:.0f} MiB beyond the two tensors"
