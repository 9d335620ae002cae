"""Checkpoints in an object store: the same promises as in a folder, against a real S3 server on this machine."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain.checkpoint import commit, format, location, objects, store, writer
from bigtrain.checkpoint.compare import compare
from bigtrain.checkpoint.describe import describe
from bigtrain.checkpoint.format import DamagedError
from bigtrain.cli import main
from bigtrain.config import Config
from bigtrain.configfile import find_config, load
from bigtrain.errors import RunError, UserError
from bigtrain.mesh import rendezvous
from bigtrain.rundir import RunDir
from tests.runs.worlds import run_world
from tests.test_checkpoint_store import ONE, check, save, split, tensors


def all_names(url: str) -> list[str]:
    """Every object below a URL."""
    where: Any = location.place(url)
    where.fs.invalidate_cache()
    return sorted(name.removeprefix(where.path + "/") for name in where.fs.find(where.path))


def three_files(root: Path, step: int) -> Path:
    """As in a folder: a checkpoint of three ranks, written by this process."""
    final = root / format.step_name(step)
    name, lock = commit.begin(final, 0)
    draft, whole = root / name, tensors(step)
    files = [
        writer.write_file(draft / f"rank_{r:05d}.bin", split(whole, r, 3), step=step, rank=r)
        for r in range(3)
    ]
    commit.commit(draft, final, files, step, {"step": step})
    commit.abandon(draft, lock)
    return final


def test_save_list_resume_verify_describe_and_prune(s3: str) -> None:
    assert store.list_checkpoints(s3) == []
    assert store.resume(s3, list, ONE) is None
    for step in (1, 2, 3, 10):
        assert str(save(s3, step)) == f"{s3}/step_{step:08d}"  # type: ignore[arg-type]
    assert [p.name for p in store.list_checkpoints(s3)] == [f"step_{step:08d}" for step in (1, 2, 3, 10)]
    path, warnings = store.newest(s3)
    assert (str(path), warnings) == (f"{s3}/step_00000010", [])
    assert path is not None
    check(path, 10)
    target = {key: torch.zeros_like(t) for key, t in tensors(10).items()}
    resumed = store.resume(s3, lambda: split(target, 0, 1), ONE)
    assert resumed is not None
    assert (resumed.path, resumed.state) == (path, {"step": 10})
    told = describe(str(path), verify=True)
    assert (told.step, told.problems, told.writers) == (10, [], 1)
    assert told.bytes == sum(
        len(location.read(path.parent / name)) for name in all_names(s3) if "10/" in name
    )
    assert [p.name[-2:] for p in store.prune(s3, keep_last=1, keep_every=3)] == ["02", "01"]
    assert [p.name[-2:] for p in store.list_checkpoints(s3)] == ["03", "10"]
    assert {name.partition("/")[0] for name in all_names(s3)} == {"step_00000003", "step_00000010"}
    assert location.folder_of(Path("run"), with_folder(s3)) == location.place(s3)


def test_any_layout_is_read_from_the_store_and_compared_with_a_local_one(s3: str, tmp_path: Path) -> None:
    remote, local = three_files(location.place(s3), 4), save(tmp_path, 4)
    check(remote, 4)
    found = compare(str(remote), str(local))
    assert found.equal
    assert found.compared == 18


def four_ranks(url: str) -> None:
    mesh = rendezvous()
    path = save(url, 4, mesh)  # type: ignore[arg-type]
    check(path, 4)
    mine = {key: torch.zeros_like(t) for key, t in tensors(4).items()}
    resumed = store.resume(url, lambda: split(mine, mesh.rank, mesh.world), mesh)
    assert resumed is not None
    assert str(resumed.path) == str(path)
    pieces = split(tensors(5), mesh.rank, mesh.world)
    with pytest.raises(RunError, match="elements were written by no rank; nothing was saved"):
        store.save(url, 5, pieces[1:] if mesh.rank == 2 else pieces, {}, mesh)
    mesh.barrier()
    mesh.close()


def test_four_ranks_save_and_fail_together(s3: str) -> None:
    program = "import sys; from tests.test_checkpoint_remote import four_ranks; four_ranks(sys.argv[1])"
    run_world(["-c", program, s3], 4)
    names = all_names(s3)
    assert len(names) == 5
    assert all(name.startswith("step_00000004/") for name in names), "a failed save leaves nothing behind"


def change(path: Path, how: Callable[[bytearray], bytes | bytearray]) -> None:
    location.put(path, bytes(how(bytearray(location.read(path)))))


def flipped(at: int) -> Callable[[bytearray], bytearray]:
    def flip(raw: bytearray) -> bytearray:
        raw[at % len(raw)] ^= 1 << (at % 8)
        return raw

    return flip


DAMAGES: dict[str, Callable[[Path], None]] = {
    "first byte flipped": lambda p: change(p, flipped(0)),
    "middle flipped": lambda p: change(p, flipped(middle(p))),
    "last byte flipped": lambda p: change(p, flipped(-1)),
    "half missing": lambda p: change(p, lambda raw: raw[: len(raw) // 2]),
    "last byte missing": lambda p: change(p, lambda raw: raw[:-1]),
    "empty": lambda p: change(p, lambda raw: b""),
    "longer": lambda p: change(p, lambda raw: raw + b"\0"),
    "removed": location.remove,
}


def middle(path: Path) -> int:
    """A byte that carries a number."""
    if path.name == "manifest.json":
        return location.size(path) // 2
    folder = path.parents[1]
    manifest = format.read_manifest(folder)
    file = next(f for f in manifest.files if f.name.endswith(path.name))
    stored = format.read_index(folder, file, manifest.step)[3]
    return stored.start + stored.bytes // 2


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_to_every_object_is_named_and_survived(s3: str, damage: str) -> None:
    root = location.place(s3)
    three_files(root, 1)
    three_files(root, 2)
    objects_of_2 = [root / name for name in all_names(s3) if name.startswith("step_00000002/")]
    assert len(objects_of_2) == 4
    for file in objects_of_2:
        kept = location.read(file)
        DAMAGES[damage](file)
        target = {key: torch.zeros_like(t) for key, t in tensors(1).items()}
        resumed = store.resume(s3, lambda t=target: split(t, 0, 1), ONE)  # type: ignore[misc]
        assert resumed is not None
        assert resumed.state == {"step": 1}
        found, warnings = store.newest(s3)
        assert found == root / "step_00000001"
        if (damage, file.name) == ("removed", "manifest.json"):
            assert warnings == resumed.warnings == [], "without its manifest it is no checkpoint"
        else:
            assert str(file) in warnings[0]
            assert str(file) in resumed.warnings[0]
        location.put(file, kept)
    check(root / "step_00000002", 2)


def test_a_step_is_replaced_without_a_moment_of_mixture(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = location.place(s3)
    path = save(root, 3)
    before = all_names(s3)
    # The new data is there, the former manifest too: still the former checkpoint.
    name, lock = commit.begin(path, 0)
    files = [writer.write_file(root / name / "rank_00000.bin", split(tensors(3), 0, 1), step=3, rank=0)]
    check(path, 3)
    commit.commit(root / name, path, files, 3, {"step": 3, "new": True})
    commit.abandon(root / name, lock)
    assert format.read_manifest(path).state == {"step": 3, "new": True}
    after = all_names(s3)
    assert len(after) == len(before) == 2, "the former data is gone"
    assert after != before


def test_a_put_that_came_through_though_it_failed_keeps_its_data(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = objects.put

    def put_and_fail(path: Path, content: bytes) -> None:
        real(path, content)
        raise TimeoutError("no answer")

    monkeypatch.setattr(objects, "put", put_and_fail)
    with pytest.raises(RunError, match=r"manifest\.json: could not be written: no answer"):
        save(location.place(s3), 3)
    check(store.list_checkpoints(s3)[0], 3)


def test_what_a_killed_save_left_goes_and_a_living_one_stays(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = location.place(s3)
    save(root, 1)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here, elsewhere = objects._machine(), "00000000"
    dead = f"step_00000001/{here}-{gone.pid}-aaaaaaaa/rank_00000.bin"
    living = f"step_00000002/{here}-{os.getppid()}-bbbbbbbb/rank_00000.bin"
    foreign = f"step_00000002/{elsewhere}-1-cccccccc/rank_00000.bin"
    users = "step_00000002/notes/text"
    for name in (dead, living, foreign, users):
        location.put(root / name, b"x")
    assert [p.name for p in store.list_checkpoints(root)] == ["step_00000001"], "data alone is no checkpoint"
    save(root, 3)
    assert not set(all_names(s3)) & {dead}
    assert {living, foreign, users} <= set(all_names(s3)), "other machines' may still be written"
    tomorrow = time.time() + 25 * 3600
    monkeypatch.setattr(objects.time, "time", lambda: tomorrow)
    save(root, 4)
    assert not set(all_names(s3)) & {foreign}
    assert {living, users} <= set(all_names(s3))
    # A manifest that cannot be read may name anything.
    location.put(root / dead, b"x")
    change(root / "step_00000001/manifest.json", flipped(50))
    save(root, 5)
    assert dead in all_names(s3)


def save_until_killed(url: str, said: int) -> None:
    found, _ = store.newest(url)
    step = int(found.name[5:]) + 1 if found else 1
    while True:
        save(url, step)  # type: ignore[arg-type]
        os.write(said, f"{step}\n".encode())
        store.prune(url, keep_last=2)
        step += 1


def look(url: str, said: list[int]) -> None:
    """What must be there after a kill."""
    found, warnings = store.newest(url)
    assert warnings == []
    if said:
        assert found is not None
        assert int(found.name[5:]) in (said[-1], said[-1] + 1), "what was said to be saved is there"
    if found is not None:
        check(found, int(found.name[5:]))


def in_child(act: Callable[[], object]) -> int:
    """Fork: this process itself never starts the store's client, whose threads would not survive it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            act()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def kill_many(url: str, kills: int) -> None:
    """Kill -9 a saving child at a random moment, look at what is there; again and again."""
    import s3fs
    import upath  # noqa: F401  # slow to import: once, here, and not in every child

    assert s3fs
    torch.set_num_threads(1)
    chance = random.Random(3)
    pace = 0.5  # seconds a save, measured below: a machine may be ten times as busy as another
    for number in range(kills):
        ear, mouth = os.pipe()
        child = in_child(lambda mouth=mouth: save_until_killed(url, mouth))  # type: ignore[misc]
        os.close(mouth)
        with os.fdopen(ear) as f:
            said = []
            for _ in range(2 if number == 0 else chance.randrange(3)):
                began = time.monotonic()
                said.append(int(f.readline()))
                pace = time.monotonic() - began
            time.sleep(chance.uniform(0.0, 1.5 * pace))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            said += [int(line) for line in f]
        _, status = os.waitpid(in_child(lambda said=said: look(url, said)), 0)  # type: ignore[misc]
        assert status == 0
    _, status = os.waitpid(in_child(lambda: save(location.place(url), 10_000)), 0)
    assert status == 0


@pytest.mark.runs
def test_kill_at_any_moment_loses_only_the_unfinished_save(s3: str) -> None:
    program = "import sys; from tests.test_checkpoint_remote import kill_many; kill_many(sys.argv[1], 12)"
    done = subprocess.run(
        [sys.executable, "-c", program, s3], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-5000:]
    data = [name for name in all_names(s3) if name.endswith(".bin")]
    assert len(data) == len(store.list_checkpoints(s3)), "what the killed saves left is cleared by the next"


def with_folder(folder: str, *more: str) -> Config:
    return load(find_config("quickstart"), [f"checkpoint.folder={folder}", *more])


def test_a_run_keeps_its_checkpoints_in_the_store(s3: str, tmp_path: Path) -> None:
    run = RunDir.open(tmp_path / "run", with_folder(s3))
    assert run.checkpoints == location.place(s3)
    assert all_names(s3) == [], "the test at the start leaves nothing"
    assert not (run.path / "checkpoints").exists()
    save(run.checkpoints, 5)
    run.close()
    # Whoever changes the folder would start over without wanting to; whoever starts over would resume.
    with pytest.raises(UserError, match=f"holds no checkpoint, but this run has some in {s3}"):
        RunDir.open(tmp_path / "run", load(find_config("quickstart")))
    with pytest.raises(UserError, match="which --fresh does not move aside"):
        RunDir.open(tmp_path / "run", with_folder(s3), fresh=True)
    RunDir.open(tmp_path / "run", with_folder(s3)).close()
    with pytest.raises(UserError, match=r"a run directory lies in a file system"):
        RunDir.open(s3, with_folder(s3))


def test_a_local_folder_elsewhere_works_too(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path / "run", with_folder(str(tmp_path / "big" / "disk")))
    assert run.checkpoints == tmp_path / "big" / "disk"
    path = save(run.checkpoints, 5)
    run.close()
    check(path, 5)
    assert location.place(f"file://{path}") == path
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        RunDir.open(tmp_path / "other", with_folder(str(tmp_path / "file" / "in")))


def test_memory_and_other_protocols_go_the_same_way() -> None:
    root = location.place("memory://somewhere/run")
    path = save(root, 2)
    assert str(path) == "memory://somewhere/run/step_00000002"
    check(path, 2)
    assert save(root, 2) == path
    store.prune(root, keep_last=1)
    assert store.newest(root) == (path, [])
    location.remove(root)
    assert store.list_checkpoints(root) == []


def test_what_is_missing_is_said_at_the_start(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        UserError, match=r"cannot be reached: The specified bucket does not exist\n.*bucket's name"
    ):
        RunDir.open(tmp_path / "run", with_folder("s3://no-such-bucket/run"))
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"(?s)gs://x/y: needs a package.*gcsfs"):
        location.place("gs://x/y")
    with pytest.raises(UserError, match="nosuch"):
        location.place("nosuch://x/y")
    assert main(["inspect", f"{s3}/nothing"]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    with monkeypatch.context() as bare:
        bare.setitem(sys.modules, "upath", None)
        with pytest.raises(UserError, match=r"bigtrain\[remote\]"):
            location.place(s3)
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"(?s)Unable to locate credentials.*AWS_ACCESS_KEY_ID"):
        RunDir.open(tmp_path / "run", with_folder(s3))
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_store_out_of_reach_is_not_taken_for_damage_nor_for_nothing(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(location.place(s3), 1)

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionResetError("connection reset")

    files: Any = path
    for call in ("cat_file", "ls", "info"):
        with monkeypatch.context() as away:
            away.setattr(files.fs, call, refuse)
            with pytest.raises(RunError, match="cannot be reached: connection reset") as caught:
                store.resume(s3, list, ONE)
            assert not isinstance(caught.value, DamagedError)
    with monkeypatch.context() as away:
        away.setattr(files.fs, "ls", refuse)
        assert store.prune(s3, keep_last=1) == [], "one rank does not die of what can wait"
    check(path, 1)


def test_inspect_explains_verifies_and_compares_urls(s3: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = location.place(s3)
    one, two = save(root, 1), save(root, 2)
    assert main(["inspect", str(one)]) == 0
    text = capsys.readouterr().out
    assert f"checkpoint  {one}" in text
    assert "embedding" in text
    assert main(["inspect", s3, "--verify"]) == 0
    assert capsys.readouterr().out.count("health      sound") == 2
    assert main(["inspect", str(one), str(two)]) == 1
    assert "18 of 18 in both differ" in capsys.readouterr().out
    file = next(root / name for name in all_names(s3) if name.startswith("step_00000002") and ".bin" in name)
    change(file, flipped(middle(file)))
    assert main(["inspect", s3, "--verify"]) == 1
    assert f"DAMAGED     {file}" in capsys.readouterr().out
