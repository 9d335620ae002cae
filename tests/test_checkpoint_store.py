"""Commit, damage, disk full, kills: whatever happens, the newest sound checkpoint is found and used."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from bigtrain.checkpoint import commit, format, store, writer
from bigtrain.checkpoint.agree import together
from bigtrain.checkpoint.describe import describe, tensor_lines
from bigtrain.checkpoint.saver import Saver
from bigtrain.errors import RunError, UserError
from bigtrain.logical import Piece, boxes_of_flat_range
from bigtrain.mesh import Mesh, rendezvous
from bigtrain.place import Place
from tests.runs.worlds import run_world

ONE = Mesh(Place(0, 1, 0, 1, "single"), torch.device("cpu"), None)
SHAPES: dict[str, tuple[int, ...]] = {
    "scale": (),
    "bias": (13,),
    "matrix": (17, 9),
    "cube": (3, 5, 7),
    "tiny": (1,),
    "embedding": (101, 33),
}


def tensors(step: int) -> dict[tuple[str, str], torch.Tensor]:
    """A model's masters and moments, different at every step."""
    generator = torch.Generator().manual_seed(step)
    kinds = ("master", "exp_avg", "exp_avg_sq")
    return {(k, n): torch.randn(s, generator=generator) for n, s in SHAPES.items() for k in kinds}


def split(whole: dict[tuple[str, str], torch.Tensor], rank: int, world: int) -> list[Piece]:
    """This rank's share as ZeRO cuts it: one range of each kind's concatenation, odd where it falls."""
    pieces: list[Piece] = []
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        total = sum(t.numel() for (k, _), t in whole.items() if k == kind)
        first, last = total * rank // world, total * (rank + 1) // world
        at = 0
        for (k, name), t in whole.items():
            if k == kind:
                start, end = max(first - at, 0), min(last - at, t.numel())
                for box in boxes_of_flat_range(tuple(t.shape), start, end - start):
                    slices = tuple(slice(o, o + n) for o, n in zip(box.offset, box.sizes, strict=True))
                    pieces.append(Piece(kind, name, tuple(t.shape), box.offset, t[slices]))
                at += t.numel()
    return pieces


def save(root: Path, step: int, mesh: Mesh = ONE) -> Path:
    return store.save(root, step, split(tensors(step), mesh.rank, mesh.world), {"step": step}, mesh)


def check(path: Path, step: int) -> None:
    """The checkpoint holds exactly what was saved at `step`."""
    target = {key: torch.zeros_like(t) for key, t in tensors(step).items()}
    assert store.load(path, split(target, 0, 1)) == {"step": step}
    for key, t in tensors(step).items():
        assert torch.equal(target[key], t), key


def in_world(ranks: int, body: str, folder: Path) -> None:
    """Run a function of this module in a world of processes; a failure in one fails the test."""
    program = f"import sys; from tests.test_checkpoint_store import {body}; {body}(sys.argv[1])"
    run_world(["-c", program, str(folder)], ranks)


def four_ranks(folder: str) -> None:
    """What several ranks must do together; every rank runs all of it."""
    mesh = rendezvous()
    rank, world = mesh.rank, mesh.world
    root = Path(folder) / "checkpoints"
    path = save(root, 4, mesh)
    check(path, 4)  # every rank reads the whole
    assert len(list(path.glob("rank_*.bin"))) == world
    # Back into the same sharded layout: no rank holds all, together they use all.
    mine = {key: torch.zeros_like(t) for key, t in tensors(4).items()}
    resumed = store.resume(root, lambda: split(mine, rank, world), mesh)
    assert resumed is not None
    assert (resumed.path, resumed.state, resumed.warnings) == (path, {"step": 4}, [])
    for got, expected in zip(split(mine, rank, world), split(tensors(4), rank, world), strict=True):
        assert torch.equal(got.tensor, expected.tensor)

    # A hole: rank 2 forgets a piece. Every rank learns it, nothing is left behind.
    pieces = split(tensors(5), rank, world)
    with pytest.raises(RunError, match="elements were written by no rank; nothing was saved"):
        store.save(root, 5, pieces[1:] if rank == 2 else pieces, {}, mesh)
    with pytest.raises(RunError, match="were written twice"):
        store.save(root, 5, [*pieces, *split(tensors(5), 0, world)[:1]] if rank == 3 else pieces, {}, mesh)

    # Rank 1 cannot write its file: all ranks raise an error that names it.
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    with pytest.raises(RunError) as caught:
        save(root, 5, mesh)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    text = str(caught.value)
    assert text.startswith("rank 1, "), text
    assert "rank_00001.bin: could not be written: File too large" in text
    assert "ulimit -f" in text
    mesh.barrier()
    assert [p.name for p in root.iterdir()] == ["step_00000004"]

    # A tensor that no rank wants is noticed though no rank alone can know; so is damage that one rank meets.
    with pytest.raises(UserError, match="exp_avg of tiny: in the checkpoint only"):
        store.resume(
            root,
            lambda: [p for p in split(mine, rank, world) if (p.kind, p.name) != ("exp_avg", "tiny")],
            mesh,
        )
    if rank == 0:
        flip(path / "rank_00003.bin", 2000)
    mesh.barrier()
    with pytest.raises(RunError, match="no checkpoint is sound"):
        store.resume(root, lambda: split(mine, rank, world), mesh)
    mesh.close()


def test_four_ranks_save_and_fail_together(tmp_path: Path) -> None:
    in_world(4, "four_ranks", tmp_path)


def two_ranks(folder: str) -> None:
    mesh = rendezvous()
    rank = mesh.rank
    save(Path(folder) / "two", 2, mesh)

    def fail_on_1() -> int:
        if rank == 1:
            raise UserError("bad key", where="x.toml", do="mend it")
        return rank

    with pytest.raises(UserError) as caught:
        together(mesh, fail_on_1)
    assert str(caught.value) == "x.toml: bad key\n  -> mend it"
    assert together(mesh, lambda: rank * 10) == [0, 10]
    mesh.close()


def test_two_ranks_and_one_read_each_other(tmp_path: Path) -> None:
    in_world(2, "two_ranks", tmp_path)
    check(tmp_path / "two" / "step_00000002", 2)
    check(save(tmp_path / "one", 2), 2)


def flip(path: Path, at: int) -> None:
    """Flip one bit of one byte."""
    raw = bytearray(path.read_bytes())
    raw[at % len(raw)] ^= 1 << (at % 8)
    path.write_bytes(raw)


def three_files(root: Path, step: int) -> Path:
    """A checkpoint of three ranks, written by this process: one file a rank, then the commit."""
    final = root / format.step_name(step)
    name, lock = commit.begin(final, 0)
    whole = tensors(step)
    files = [
        writer.write_file(root / name / f"rank_{r:05d}.bin", split(whole, r, 3), step=step, rank=r)
        for r in range(3)
    ]
    commit.commit(root / name, final, files, step, {"step": step})
    os.close(lock)
    return final


def in_data(path: Path, which: int) -> int:
    """A byte of the data file that carries a number, not padding."""
    manifest = format.read_manifest(path.parent)
    file = next(f for f in manifest.files if f.name == path.name)
    stored = format.read_index(path.parent, file, manifest.step)[which]
    return stored.start + stored.bytes // 2


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "first element flipped": lambda p: flip(p, 0),
    "middle flipped": lambda p: flip(p, in_data(p, 5)),
    "last box flipped": lambda p: flip(p, in_data(p, -1)),
    "index flipped": lambda p: flip(p, p.stat().st_size - 40),
    "last byte flipped": lambda p: flip(p, p.stat().st_size - 1),
    "last byte missing": lambda p: os.truncate(p, p.stat().st_size - 1),
    "half missing": lambda p: os.truncate(p, p.stat().st_size // 2),
    "empty": lambda p: os.truncate(p, 0),
    "longer": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    "removed": lambda p: p.unlink(),
    "another step's": lambda p: shutil.copy(p.parents[1] / "step_00000001" / p.name, p),
    "a folder": lambda p: to_folder(p),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_to_every_data_file_is_named_and_survived(tmp_path: Path, damage: str) -> None:
    three_files(tmp_path, 1)
    sound = three_files(tmp_path, 2)
    assert store.newest(tmp_path) == (sound, [])
    assert (
        sum(f.stat().st_size for f in sound.iterdir())
        < sum(f.stat().st_size for f in (tmp_path / "step_00000001").iterdir()) * 1.01
    ), "files of two steps have about the same size: only content tells them apart"
    for file in sorted(sound.iterdir()):
        kept = file.read_bytes()
        if file.name == "manifest.json" and damage in ("middle flipped", "last box flipped"):
            continue  # it has no boxes; each of its bytes is flipped below
        DAMAGES[damage](file)
        found, warnings = store.newest(tmp_path)
        assert found == tmp_path / "step_00000001"
        assert len(warnings) == 1
        assert warnings[0].startswith("skipped step_00000002")
        assert file.name in warnings[0]
        target = {key: torch.zeros_like(t) for key, t in tensors(1).items()}
        resumed = store.resume(tmp_path, lambda t=target: split(t, 0, 1), ONE)  # type: ignore[misc]
        assert resumed is not None
        assert resumed.state == {"step": 1}
        assert file.name in resumed.warnings[0]
        assert all(torch.equal(target[key], t) for key, t in tensors(1).items())
        if file.is_dir():
            file.rmdir()
        file.write_bytes(kept)
    check(sound, 2)


def test_by_policy_damage_stops_the_run_instead(tmp_path: Path) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    target = {key: torch.zeros_like(t) for key, t in tensors(1).items()}

    def resume(on_damage: Literal["older", "stop"]) -> store.Resumed | None:
        return store.resume(tmp_path, lambda: split(target, 0, 1), ONE, on_damage=on_damage)

    resumed = resume("stop")
    assert resumed is not None
    assert (resumed.path, resumed.warnings) == (newest, [])
    for damaged in ("rank_00000.bin", "manifest.json"):
        flip(newest / damaged, 200)
        with pytest.raises(RunError) as caught:
            resume("stop")
        assert not isinstance(caught.value, format.DamagedError)
        assert f"{newest / damaged}: " in str(caught.value)
        assert "checkpoint.on_damage" in str(caught.value)
        resumed = resume("older")
        assert resumed is not None
        assert resumed.state == {"step": 1}
        assert str(newest / damaged) in resumed.warnings[0]


def test_any_flipped_bit_of_the_manifest_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    raw = (path / "manifest.json").read_bytes()
    for at in range(len(raw)):
        flipped = bytearray(raw)
        flipped[at] ^= 1 << (at % 8)
        (path / "manifest.json").write_bytes(flipped)
        with pytest.raises(format.DamagedError, match=r"manifest\.json"):
            format.read_manifest(path)


def test_files_of_two_ranks_swapped(tmp_path: Path) -> None:
    path = three_files(tmp_path, 1)
    (path / "rank_00000.bin").rename(path / "x")
    (path / "rank_00001.bin").rename(path / "rank_00000.bin")
    (path / "x").rename(path / "rank_00001.bin")
    found, warnings = store.newest(tmp_path)
    assert found is None
    assert "rank_00000.bin" in warnings[0]
    assert "rank_00001.bin" in warnings[1]


def test_a_manifest_of_a_later_format_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as later:
        later.setattr(format, "VERSION", format.VERSION + 1)
        path = save(tmp_path, 1)
    with pytest.raises(UserError, match="use the newer bigtrain"):
        format.read_manifest(path)


def test_nothing_there_is_not_an_error(tmp_path: Path) -> None:
    assert store.newest(tmp_path / "none") == (None, [])
    assert store.resume(tmp_path / "none", list, ONE) is None
    (tmp_path / "step_00000009.tmp-abc").mkdir()
    (tmp_path / "notes").mkdir()
    assert store.list_checkpoints(tmp_path) == []


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    flip(path / "rank_00000.bin", 0)
    assert save(tmp_path, 3) == path
    check(path, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000003"]


def test_a_stale_draft_goes_and_a_living_one_stays(tmp_path: Path) -> None:
    stale, living = tmp_path / "step_00000001.tmp-dead", tmp_path / "step_00000001.tmp-alive"
    stale.mkdir()
    (stale / "rank_00000.bin").write_bytes(b"x" * 100)
    living.mkdir()
    held = os.open(living, os.O_RDONLY)
    assert not commit._locked_by_others(held)
    save(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001.tmp-alive", "step_00000002"]
    os.close(held)
    save(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]


def test_prune_keeps_the_newest_sound_and_every_kth(tmp_path: Path) -> None:
    for step in range(1, 9):
        save(tmp_path, step)
    assert [p.name[-1] for p in store.prune(tmp_path, keep_last=2, keep_every=3)] == ["5", "4", "2", "1"]
    assert [p.name[-1] for p in store.list_checkpoints(tmp_path)] == ["3", "6", "7", "8"]
    os.truncate(tmp_path / "step_00000008" / "rank_00000.bin", 10)
    (tmp_path / "step_00000007" / "manifest.json").unlink()
    store.prune(tmp_path, keep_last=1)
    assert store.newest(tmp_path)[0] == tmp_path / "step_00000006"
    assert not (tmp_path / "step_00000003").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A real file system of 8 MB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", mount], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small file system needs root")
    yield mount
    subprocess.run(["umount", mount], check=True)


def million(value: float, count: int) -> list[Piece]:
    """`count` tensors of 1 MB."""
    return [Piece("master", f"w{i}", (250_000,), (0,), torch.full((250_000,), value)) for i in range(count)]


def test_a_full_disk_is_told_before_it_is_filled(small_disk: Path) -> None:
    first = store.save(small_disk, 1, million(1.0, 5), {}, ONE)
    with pytest.raises(RunError) as caught:
        store.save(small_disk, 2, million(2.0, 5), {}, ONE)
    text = str(caught.value)
    assert "No space left on device" in text
    assert "needs 5.0 MB" in text
    assert "free some space, then run the same command again" in text
    assert store.newest(small_disk) == (first, [])
    assert [p.name for p in small_disk.iterdir()] == ["step_00000001"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_became_read_only(small_disk: Path, asynchronous: bool) -> None:
    first = store.save(small_disk, 1, million(1.0, 2), {}, ONE)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    saver = Saver(small_disk, ONE, asynchronous=asynchronous)
    with pytest.raises(RunError, match=r"Read-only file system.*\n.*choose another run directory"):
        saver.start(2, million(2.0, 2), {})
    assert store.newest(small_disk) == (first, [])


def test_a_disk_that_fills_up_while_writing(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = store.save(small_disk, 1, million(1.0, 2), {}, ONE)
    real = writer.write_file

    def write_beside_others(path: Path, *args: Any, **kwargs: Any) -> Any:
        (small_disk / "others").write_bytes(b"x" * 4_000_000)  # another program takes the space meanwhile
        return real(path, *args, **kwargs)

    monkeypatch.setattr(store, "write_file", write_beside_others)
    with pytest.raises(RunError, match=r"rank_00000\.bin: could not be written: No space left on device"):
        store.save(small_disk, 2, million(2.0, 4), {}, ONE)
    assert store.newest(small_disk) == (first, [])
    assert sorted(p.name for p in small_disk.iterdir()) == ["others", "step_00000001"]


def test_describe_tells_contents_and_health(tmp_path: Path) -> None:
    path = three_files(tmp_path, 12)
    told = describe(path)
    parameters = sum(t.numel() for (kind, _), t in tensors(12).items() if kind == "master")
    assert told.elements == {"master": parameters, "exp_avg": parameters, "exp_avg_sq": parameters}
    assert (told.step, told.writers, told.problems) == (12, 3, [])
    assert told.bytes == sum(f.stat().st_size for f in path.iterdir())
    lines = tensor_lines(told)
    assert len(lines) == len(SHAPES)
    assert any("cube" in line and "3x5x7" in line and "0.001 MB" in line for line in lines)
    flip(path / "rank_00001.bin", in_data(path / "rank_00001.bin", 0))
    assert describe(path).problems == [], "a look at the outside does not read the data"
    assert "DAMAGED" in str(describe(path, verify=True))
    assert "rank_00001.bin" in str(describe(path, verify=True))


def save_until_killed(root: Path, said: int, asynchronous: bool) -> None:
    """Save step after step, saying each one when it is done; what the child below does."""
    found, _ = store.newest(root)
    step = int(found.name[5:]) + 1 if found else 1
    saver = Saver(root, ONE, asynchronous=asynchronous, committed=lambda: store.prune(root, keep_last=2))
    while True:
        saver.start(step, split(tensors(step), 0, 1), {"step": step})
        if (news := saver.news()) is not None:
            os.write(said, f"{int(news.path.name[5:])}\n".encode())
        step += 1


def kill_many(folder: str, kills: int) -> None:
    """Fork a saving child, kill -9 it at a random moment, look at what is there; again and again."""
    torch.set_num_threads(1)
    chance, root, drafts = random.Random(7), Path(folder), 0
    for number in range(kills):
        ear, mouth = os.pipe()
        child = os.fork()
        if child == 0:
            save_until_killed(root, mouth, asynchronous=number % 2 == 1)
        os.close(mouth)
        time.sleep(chance.uniform(0.0, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(ear) as f:
            said = [int(line) for line in f]
        drafts += any(".tmp-" in p.name for p in root.iterdir())
        found, warnings = store.newest(root)
        assert warnings == []
        if said:
            assert found is not None
            assert int(found.name[5:]) - said[-1] in range(3), "what was said to be saved is there"
        if found is not None:
            check(found, int(found.name[5:]))
    assert drafts > kills // 10, f"{drafts} of {kills} kills hit a save: the test tests too little"
    save(root, 10_000)
    assert not [p for p in root.iterdir() if ".tmp-" in p.name]


@pytest.mark.runs
def test_kill_at_any_moment_loses_only_the_unfinished_save(tmp_path: Path) -> None:
    program = "import sys; from tests.test_checkpoint_store import kill_many; kill_many(sys.argv[1], 100)"
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
