"""What a run leaves behind: metrics, checkpoints, the console's lines, the outcome."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.budget import Progress, sample_id
from bigtrain.checkpoint.agree import together
from bigtrain.checkpoint.saver import Saver
from bigtrain.checkpoint.store import Resumed, discard_later, prune, resume
from bigtrain.console import Console, Startup, summary
from bigtrain.engine import StepResult, engine_name
from bigtrain.errors import UserError
from bigtrain.grid import layout_notes
from bigtrain.guard import Finding, Guard, missing
from bigtrain.heldout import HeldOut
from bigtrain.interop.initial import start_from
from bigtrain.metrics import EventRecord, Meter, peak_flops, read_records, recent_losses
from bigtrain.plan.comparison import beside_plan
from bigtrain.plan.flops import flops_per_token
from bigtrain.plan.scaling import Suggestion
from bigtrain.run_data import differences, facts, shares
from bigtrain.rundir import RunDir, State
from bigtrain.sinks import Sinks, open_sinks
from bigtrain.stragglers import Stragglers

if TYPE_CHECKING:
    from bigtrain.train import Parts

_log = logging.getLogger(__name__)


class Recorder:
    """The trainer's observer. Rank 0 writes and prints; saving is the work of all ranks."""

    def __init__(self, parts: Parts, run: RunDir, startup: Startup) -> None:
        self.parts = parts
        self.run = run
        self.startup: Startup | None = startup
        self.progress = Progress()
        self.guard = Guard(parts.config)
        self.resumed = False
        """Whether the run stands at a checkpoint."""
        self.console: Console | None = None
        self.stragglers: Stragglers | None = None
        self._sinks = Sinks([], warn=_log.warning)
        self._meter: Meter | None = None
        keep = parts.config.checkpoint
        self._saver = Saver(
            run.checkpoints,
            parts.mesh,
            asynchronous=keep.asynchronous,
            committed=lambda: prune(run.checkpoints, keep.keep_last, keep.keep_every),
        )

    def resume(self) -> Progress:
        """Fill the engine from the newest sound checkpoint; where the run stands (the start without one)."""
        parts = self.parts
        found = self._load()
        if found is not None:
            self.guard.load(found.state.get("guard", {}))
            self.run.notes.extend(found.warnings)
            self.run.notes.append(f"resumed from {found.path.name}")
        elif parts.config.train.init_from is not None:
            self.run.notes.extend(
                start_from(parts.config.train.init_from, parts.engine, parts.config, parts.mesh)
            )
        # Without a checkpoint nothing that was recorded stays, not even an evaluation at step 0.
        first = self.progress.step if found is not None else -1
        together(parts.mesh, lambda: self.run.begin(first))
        if self.startup is not None:
            self.startup.done("resume")
        return self.progress

    def _load(self, latest: int | None = None) -> Resumed | None:
        """Fill the engine from the newest sound checkpoint, of step `latest` at most. Collective."""
        parts = self.parts
        found = resume(
            self.run.checkpoints,
            lambda: parts.engine.pieces(owned=False),
            parts.mesh,
            verify=parts.config.checkpoint.verify,
            on_damage=parts.config.checkpoint.on_damage,
            latest=latest,
        )
        if found is not None:
            self._same_samples(found.state, found.path)
            parts.engine.loaded(found.state["engine"])
            self.progress = Progress(**found.state["progress"])
            self.resumed = True
        return found

    def roll_back(self, found: Finding) -> bool:
        """See `trainer.Observer`. Collective.

        The checkpoint gone back to is saved again, for it now says what is left out, before anything is told: a run
        that is killed from here on and resumed, in whatever layout, leaves out the same. Before, it finds the spike
        again.
        """
        mesh, where = self.parts.mesh, self.run.checkpoints
        self._say(found.sentence())
        self.settle()
        latest = self.guard.latest(found)
        loaded = self._load(latest)
        if loaded is None:
            self._say(f"step {found.step}: no checkpoint of step {latest} or before is there to go back to")
            return False
        self.guard.roll_back(found, loaded.state.get("guard", {}))
        together(mesh, lambda: discard_later(where, latest) if mesh.first else None)
        self.on_save(self.progress)
        self.settle()
        self._close()
        together(mesh, lambda: self.run.begin(self.progress.step))
        self.startup = None
        self.run.notes[:] = [*loaded.warnings, f"went back to {loaded.path.name}"]
        return True

    def _same_samples(self, state: Mapping[str, Any], path: Path) -> None:
        """UserError when the checkpoint's run read other samples: its folder may be older than this run directory."""
        read = state["progress"]["samples"]
        then = Guard(self.parts.config)
        then.load(state.get("guard", {}))
        differ = differences(state, self._facts, read, sample_id(read, then.left_out))
        if differ:
            raise UserError(
                "is of a run over other samples\n    " + "\n    ".join(differ),
                where=str(path),
                do="give the data and seed that it was trained with, or another checkpoint.folder",
            )

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """What decides which tokens sample number g holds."""
        return facts(self.parts.config, self.parts.samples)

    def begin(self, progress: Progress, end: Progress, peak: Suggestion) -> None:
        """Open the sinks and the console, tell what is about to happen. All ranks learn of a failure."""
        mesh = self.parts.mesh
        together(mesh, lambda: self._begin(progress, end, peak) if mesh.first else None)

    def _begin(self, progress: Progress, end: Progress, peak: Suggestion) -> None:
        total_steps = end.step
        parts, config = self.parts, self.parts.config
        shutil.copyfile(parts.tokenizer.path, self.run.path / "tokenizer.model")
        self.console = Console(
            total_steps=total_steps,
            every_steps=config.log.every_steps,
            tokens_total=end.tokens,
            device=parts.mesh.device,
            devices=parts.mesh.world,
            startup=self.startup,
        )
        if not parts.held_out:
            self.run.notes.append("the dataset has no held-out text: there will be no evaluation")
        for note in self.run.notes:
            self.console.say(note)
        source = (
            f" ({peak.source}{', extrapolated' if peak.extrapolated else ''})"
            if config.optim.lr is None
            else ""
        )
        engine = engine_name(config, parts.mesh.world)
        ahead = f"steps {progress.step + 1:,} to {total_steps:,}"
        if progress.step >= total_steps:
            ahead = f"all {total_steps:,} steps are done"
        zero = f" (ZeRO {config.layout.zero})" if engine == "zero" else ""
        axes = f" ({parts.mesh.grid})" if parts.mesh.world > 1 else ""
        self.console.say(
            f"{self.run.path}: {ahead} on {parts.mesh.world} x {parts.mesh.device.type}{axes}, {engine} engine{zero}, "
            f"{config.train.precision}, peak lr {peak.value:.3g}{source}"
        )
        for note in layout_notes(config, parts.mesh.world):
            self.console.say(note)
        if config.layout.offload == "optimizer":
            self.console.say(
                "the optimizer state is kept and updated in host memory, by PyTorch's fused AdamW"
            )
        if len(parts.samples.corpora) > 1:
            read = shares(parts.samples, progress.samples, end.samples)
            self.console.say(f"the steps to come read {read or 'nothing'}")
        longest = max(corpus.longest for corpus in parts.samples.corpora)
        if longest > config.data.sequence_length + 1:
            self.console.say(
                f"the longest document has {longest:,} tokens: documents longer than a sequence "
                f"({config.data.sequence_length:,}) are read in parts, none is lost"
            )
        flops = flops_per_token(config.model, config.data.sequence_length).training
        self._meter = Meter(
            devices=parts.mesh.world,
            tokens=progress.tokens,
            tokens_per_epoch=sum(corpus.num_tokens for corpus in parts.samples.corpora),
            flops_per_token=flops,
            peak_flops=self._peak_flops(),
            device=parts.mesh.device,
            recent=recent_losses(read_records(self.run.metrics)),
        )
        untold = missing(self.guard.rolled, read_records(self.run.metrics))
        self._sinks = open_sinks(
            config.log, self.run.path, config.name, step=progress.step, warn=self.console.say
        )
        for found in untold:
            self._record(progress, found)

    def on_finding(self, progress: Progress, found: Finding) -> None:
        """See `trainer.Observer`."""
        self._say(found.sentence())
        self._record(progress, found)

    def _record(self, progress: Progress, found: Finding) -> None:
        name = found.action if found.action == "rollback" else found.what
        self._sinks.write(EventRecord(progress.step, name, found.sentence(), found.record(), time.time()))

    def _say(self, text: str) -> None:
        if self.console is not None:
            self.console.say(text)

    def on_step(self, progress: Progress, result: StepResult, lr: float, seconds: float) -> None:
        """See `trainer.Observer`."""
        self.progress = progress
        if self._meter is None or self.console is None:
            return
        record = self._meter.step(progress, result, lr, seconds)
        self._sinks.write(record)
        self.console.step(record)
        self._say_slow(progress)
        self._say_saved()

    def _say_slow(self, progress: Progress) -> None:
        """Ranks that were found to be slow: once on the console, with a line for programs in metrics.jsonl."""
        for slow in self.stragglers.news() if self.stragglers else ():
            self._sinks.write(EventRecord(progress.step, "straggler", str(slow), asdict(slow), time.time()))
            if self.console is not None:
                self.console.say(str(slow))

    def on_eval(self, progress: Progress, result: HeldOut) -> None:
        """See `trainer.Observer`."""
        if self._meter is not None and self.console is not None:
            record = self._meter.evaluation(progress, result)
            self._sinks.write(record)
            self.console.evaluation(record)

    def on_save(self, progress: Progress) -> None:
        """See `trainer.Observer`. Collective; raises RunError on every rank when one cannot write."""
        parts, config = self.parts, self.parts.config
        self._sinks.flush()
        state: dict[str, Any] = {
            "progress": asdict(progress),
            "engine": parts.engine.extra_state(),
            "model": config.model.model_dump(),
            **self._facts,
            "guard": self.guard.state(),
            "layout": {
                "world": parts.mesh.world,
                "axes": str(parts.mesh.grid),
                "engine": engine_name(config, parts.mesh.world),
                "zero": config.layout.zero,
                "precision": config.train.precision,
            },
        }
        self._saver.start(progress.step, parts.engine.pieces(owned=True), state)
        self._say_saved()

    def save_failed(self) -> bool:
        """See `trainer.Observer`."""
        return self._saver.failed

    def settle(self) -> None:
        """See `trainer.Observer`."""
        self._saver.settle()
        self._say_saved()

    def _say_saved(self) -> None:
        """A checkpoint is called saved when it is committed, not before."""
        saved = self._saver.news()
        if saved is not None and self.console is not None:
            self.console.saved(saved.path, saved.seconds, saved.blocked)

    def finish(self, state: State, progress: Progress, reason: str) -> None:
        """The run ended as it should: say so, in outcome.json and on the console."""
        self._close()
        _log.info("%s at step %d%s", state, progress.step, f" ({reason})" if reason else "")
        self.run.finish(state, progress.step, reason)

    def tell(self, state: State) -> None:
        """The end-of-run summary, once the outcome is written."""
        if self.parts.mesh.first:
            again = "the same command goes on from here" if state == "preempted" else ""
            print("\n" + summary(self.run.path, again), flush=True)
            if planned := self._beside_plan():
                print(planned, flush=True)

    def _beside_plan(self) -> str:
        """The planner's step time and memory beside the run's; nothing on CPUs, of which it has no model."""
        import torch

        mesh = self.parts.mesh
        if mesh.device.type != "cuda":
            return ""
        name, records = torch.cuda.get_device_name(mesh.device), read_records(self.run.metrics)
        return beside_plan(self.parts.config, name, mesh.world, mesh.place.local_world, records)

    def fail(self, reason: str) -> None:
        """The run ended as it should not: rank 0 writes the outcome, every rank's log says why it stopped."""
        _log.error("failed after step %d: %s", self.progress.step, reason, exc_info=True)
        self._saver.leave()
        self._say_saved()
        self._close()
        self.run.finish("failed", self.progress.step, reason)

    def abandon(self, reason: str) -> None:
        """The watchdog is about to end the process while the main thread hangs: the outcome, and no more."""
        self.run.finish("failed", self.progress.step, reason)

    def _close(self) -> None:
        self._sinks.close()
        self._sinks = Sinks([], warn=_log.warning)
        if self.console is not None:
            self.console.close()
            self.console = None

    def _peak_flops(self) -> float | None:
        import torch

        given = self.parts.config.log.peak_tflops
        if given is not None:
            return given * 1e12
        device = self.parts.mesh.device
        return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
