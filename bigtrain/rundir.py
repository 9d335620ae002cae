"""The run directory: one folder holds everything about a run, and the same command on it goes on.

RUN/
    config.toml               resolved, as of the latest attempt
    provenance.json           code, packages, machine and command of every attempt
    metrics.jsonl             one record a step and one an evaluation (bigtrain.metrics)
    checkpoints/step_00001000/       (elsewhere with checkpoint.folder)
    logs/0001/rank_0.log      of the first attempt
    samples/  plots/  tensorboard/
    outcome.json              how the latest attempt ended; absent while one runs, or after a kill
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import torch
from pydantic import BaseModel

from bigtrain.checkpoint.agree import together
from bigtrain.checkpoint.format import sync_folder, write_synced
from bigtrain.checkpoint.location import folder_of, make_ready, remote
from bigtrain.checkpoint.store import list_checkpoints
from bigtrain.config import Config
from bigtrain.configfile import load, render
from bigtrain.errors import RunError, UserError
from bigtrain.mesh import Mesh
from bigtrain.metrics import cut_back
from bigtrain.place import Place
from bigtrain.provenance import provenance
from bigtrain.redact import redacted

State = Literal["done", "preempted", "failed"]

# What makes another run of it: the tensors of a checkpoint would not fit, or the samples would not go on.
_IDENTITY = ("model.", "train.seed", "data.sequence_length", "optim.kind", "data (content)")


@dataclass
class RunDir:
    """A run directory that this process may write; made by `RunDir.open`."""

    path: Path
    mesh: Mesh
    attempt: int
    """From 1; every start of the command is one."""
    notes: list[str]
    """What the user should be told: settings that changed since the last attempt, a former run moved
    aside."""
    checkpoints: Path
    """Folder of the checkpoints; in an object store when checkpoint.folder is a URL."""
    _locks: list[IO[str]] = field(default_factory=list, repr=False)
    _log: logging.Handler | None = field(default=None, repr=False)
    _level: int = field(default=logging.NOTSET, repr=False)

    @staticmethod
    def open(
        path: str | Path,
        config: Config,
        *,
        fresh: bool = False,
        mesh: Mesh | None = None,
        data: str = "",
    ) -> RunDir:
        """Create the run directory, or take up the run in it (collective; rank 0 does the work).

        `data` identifies the content of the dataset (its manifest's hash). `fresh` moves a former run aside
        as RUN.old-1. Raises UserError when another process trains here, or when the run here is of another
        model, seed or data; nothing is changed then.
        """
        mesh = mesh or Mesh(Place(0, 1, 0, 1, "single"), torch.device("cpu"), None)
        path = _local(path)
        facts = provenance(mesh)
        locks: list[IO[str]] = []
        folders: list[Path] = []

        def take() -> tuple[int, list[str]]:
            folders.append(folder_of(path, config))
            with _writing(path):
                return _take(path, config, fresh, data, facts, locks) if mesh.first else (0, [])

        attempt, notes = together(mesh, take)[0]
        run = RunDir(path, mesh, attempt, notes, folders[0], _locks=locks)
        together(mesh, run._start_log)
        return run

    @property
    def metrics(self) -> Path:
        """The metrics file."""
        return self.path / "metrics.jsonl"

    @property
    def logs(self) -> Path:
        """Folder of this attempt's logs, one file a rank."""
        return self.path / "logs" / f"{self.attempt:04d}"

    def folder(self, name: Literal["samples", "plots", "tensorboard"]) -> Path:
        """A folder of the run, made if need be."""
        (self.path / name).mkdir(exist_ok=True)
        return self.path / name

    def begin(self, step: int) -> None:
        """The run goes on from `step`: metrics after it are cut off, for they will be made again."""
        if self.mesh.first:
            cut_back(self.metrics, step)

    def finish(self, state: State, step: int, reason: str = "") -> None:
        """Write outcome.json, which tells launchers whether to requeue."""
        if self.mesh.first:
            outcome = {"state": state, "step": step, "reason": reason, "time": time.time()}
            try:
                _write_json(self.path / "outcome.json", outcome)
            except OSError as e:  # a full disk is often the reason itself, and must not hide it
                logging.getLogger(__name__).warning("outcome.json could not be written: %s", e)

    def close(self) -> None:
        """Stop logging into the run and let others have it."""
        if self._log is not None:
            logging.captureWarnings(False)
            logging.getLogger().removeHandler(self._log)
            logging.getLogger("bigtrain").setLevel(self._level)
            self._log.close()
        for lock in self._locks:
            lock.truncate(0)
            lock.close()
        self._log = None
        self._locks.clear()

    def _start_log(self) -> None:
        """Send this rank's logging (bigtrain's from INFO on, torch's, DeepSpeed's) and warnings to its own file."""
        file = self.logs / f"rank_{self.mesh.rank}.log"
        with _writing(file):
            self.logs.mkdir(parents=True, exist_ok=True)
            self._log = _RankLog(file)
        self._log.setFormatter(_Redacting("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(self._log)
        logging.captureWarnings(True)
        ours = logging.getLogger("bigtrain")
        self._level = ours.level
        ours.setLevel(logging.INFO)
        rank = f"rank {self.mesh.rank} of {self.mesh.world}"
        who = f"process {os.getpid()} on {socket.gethostname()}, {self.mesh.device}"
        ours.info("attempt %d, %s: %s", self.attempt, rank, who)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """RunError that names the file when the file system does not take what is written."""
    try:
        yield
    except OSError as e:
        raise RunError(
            f"cannot be written: {e.strerror}",
            where=str(e.filename or path),
            do="free some space or mend the file system, then run the same command again: it resumes from the "
            "newest checkpoint",
        ) from e


class _RankLog(logging.FileHandler):
    """A rank's log file. A full disk costs it lines, not the run: one warning, where logging prints stacks."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """See logging.Handler: a line could not be written."""
        if not self._told:
            print(f"{self.baseFilename}: lines are lost: {sys.exc_info()[1]}", file=sys.stderr)
        self._told = True

    def close(self) -> None:
        """See logging.Handler."""
        with contextlib.suppress(OSError):  # what is still buffered is lost, and was told
            super().close()


class _Redacting(logging.Formatter):
    """No secrets in logs: an error of a store or a proxy may quote a URL with its password."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def _take(
    path: Path, config: Config, fresh: bool, data: str, facts: dict[str, Any], locks: list[IO[str]]
) -> tuple[int, list[str]]:
    """Lock, compare with the run that is there, write what this attempt adds. Returns (attempt, notes)."""
    notes: list[str] = []
    checkpoints = folder_of(path, config)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = _locked(path)
    except OSError as e:
        raise UserError(
            f"cannot be a run directory: {e.strerror}", where=str(path), do="give another --run-dir"
        ) from e
    try:
        if fresh and config.checkpoint.folder:
            _refuse_to_mix(checkpoints)
        if fresh and any(entry.name != _LOCK for entry in path.iterdir()):
            aside = next(
                p for n in range(1, 10**6) if not (p := path.with_name(f"{path.name}.old-{n}")).exists()
            )
            path.rename(aside)
            lock.close()
            path.mkdir()
            lock = _locked(path)
            notes.append(f"the former run was moved to {aside}")
        former = _former(path)
        changed = _changes(path, config, data, former)
        refused = [line for key, line in changed.items() if key.startswith(_IDENTITY)]
        if "checkpoint.folder" in changed:
            _refuse_to_lose(folder_of(path, load(path / "config.toml")), checkpoints)
        if refused and list_checkpoints(checkpoints):
            raise UserError(
                "holds a run of another model, seed or data\n    " + "\n    ".join(refused),
                where=str(path),
                do="give this one another --run-dir, or start over with --fresh (moves the run there aside)",
            )
        make_ready(checkpoints)
        if config.checkpoint.folder and not remote(checkpoints):
            locks.append(_locked(checkpoints, "checkpoint.folder", "folder of checkpoints"))
    except BaseException:
        lock.close()
        raise
    notes += [f"changed since the last attempt: {line}" for line in changed.values()]
    attempts = [*former.get("attempts", []), {**facts, "changed": list(changed.values())}]
    if len(attempts) > 1:  # outcome.json is about to go, and the history of the run with it
        attempts[-2]["ended"] = _outcome(path)
    _write_text(path / "config.toml", render(config))
    _write_json(path / "provenance.json", {"data": data, "attempts": attempts})
    (path / "outcome.json").unlink(missing_ok=True)
    sync_folder(path)
    locks.append(lock)
    return len(attempts), notes


def _local(path: str | Path) -> Path:
    """The run directory's path. UserError for a URL: locks, logs and appended metrics need a file system."""
    if "://" in str(path):
        raise UserError(
            "a run directory lies in a file system; its checkpoints may lie elsewhere",
            where=str(path),
            do=f"give a local --run-dir and --set checkpoint.folder={path}",
        )
    return Path(path)


def _refuse_to_mix(checkpoints: Path) -> None:
    """UserError when a fresh run would go on from the checkpoints of a former one: they are not moved aside."""
    if list_checkpoints(checkpoints):
        raise UserError(
            "holds the checkpoints of a former run, which --fresh does not move aside",
            where=str(checkpoints),
            do="give another checkpoint.folder, or move or remove them",
        )


def _refuse_to_lose(former: Path, checkpoints: Path) -> None:
    """UserError when the run's checkpoints lie where this attempt does not look: it would start over, unasked."""
    if former != checkpoints and list_checkpoints(former) and not list_checkpoints(checkpoints):
        raise UserError(
            f"holds no checkpoint, but this run has some in {former}",
            where=str(checkpoints),
            do=f"copy them there, or set checkpoint.folder to {former}; --fresh starts over",
        )


_LOCK = ".lock"


def _locked(path: Path, given_by: str = "--run-dir", what: str = "run directory") -> IO[str]:
    """Lock a folder of the run for this process; its end, however violent, gives the lock back."""
    lock = (path / _LOCK).open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        lock.seek(0)
        owner = lock.read().strip() or "another process"
        lock.close()
        raise UserError(
            f"{owner} is training in this {what}",
            where=str(path),
            do=f"wait for it or stop it, or give this run another {given_by}",
        ) from e
    except OSError:
        logging.getLogger(__name__).warning(
            "%s: this file system has no locks; take care that only one process trains here", path
        )
    lock.truncate(0)
    who = f"process {os.getpid()} on {socket.gethostname()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}"
    with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
        os.write(lock.fileno(), who.encode())
    return lock


def _former(path: Path) -> dict[str, Any]:
    """Provenance of the run that is here; empty when there is none."""
    try:
        found = json.loads((path / "provenance.json").read_text())
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise UserError(
            f"is not valid JSON: {e}",
            where=str(path / "provenance.json"),
            do="remove the file (its history of attempts is lost, the run is not)",
        ) from e
    assert isinstance(found, dict)
    return found


def _outcome(path: Path) -> dict[str, Any] | None:
    """How the latest attempt said it ended; None when it was killed."""
    try:
        found = json.loads((path / "outcome.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _changes(path: Path, config: Config, data: str, former: Mapping[str, Any]) -> dict[str, str]:
    """Every setting that differs from the last attempt: key -> one line; none if there was no attempt."""
    if not (path / "config.toml").exists():
        return {}
    old, new = _flat(load(path / "config.toml")), _flat(config)
    if former.get("data"):
        old["data (content)"], new["data (content)"] = former["data"][:12], data[:12]
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return {key: f"{key}: {_shown(old.get(key))} in the run, {_shown(new.get(key))} now" for key in keys}


def _flat(section: BaseModel | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """All settings under their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in section.items() if isinstance(section, Mapping) else section:
        nested = isinstance(value, BaseModel | dict)
        found |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return found


def _shown(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _write_json(path: Path, content: Any) -> None:
    _write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _write_text(path: Path, content: str) -> None:
    """Replace a file in one go: readers and kills see the former one or the new one."""
    draft = path.with_name(path.name + ".tmp")
    write_synced(draft, content.encode())
    draft.replace(path)
