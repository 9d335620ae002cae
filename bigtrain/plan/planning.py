"""`bigtrain plan`: what a config takes on a cluster, the best layout for it, or the best config for a budget."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bigtrain.config import Config
from bigtrain.configfile import find_config, load, load_undecided
from bigtrain.errors import RunError, UserError
from bigtrain.metrics import read_records
from bigtrain.plan.calibration import NEUTRAL, Calibration, read, save
from bigtrain.plan.comparison import WARM_UP, Comparison, cluster_of_run, compare
from bigtrain.plan.estimate import Estimate, Range, estimate
from bigtrain.plan.hardware import Cluster, cluster_of, find_gpu
from bigtrain.plan.job import Job, job_of
from bigtrain.plan.propose import Proposal, propose
from bigtrain.plan.quantities import amount, budget, gibibytes, span
from bigtrain.plan.scaling import allocation, batch_sizes, learning_rates
from bigtrain.plan.search import Found, Layout, described, search, with_layout
from bigtrain.plan.steptime import PARTS
from bigtrain.plan.telling import KINDS, tell, tell_search

MOST_DOUBLINGS = 8
"""A model that does not fit is tried on up to 2^8 times as many GPUs."""


def plan_command(args: argparse.Namespace) -> int:
    """The verb. 0; 1 when the layout does not fit the card, or plan and dry run disagree."""
    if args.calibrate:
        return _calibrate(args)
    calibration = read(Path(args.calibration)) if args.calibration else NEUTRAL
    extra = Path(args.hardware) if args.hardware else None
    tokens = round(amount(args.tokens, "--tokens")) if args.tokens else None
    price = amount(args.price, "--price") if args.price else None
    if args.budget:
        return _budget(args, calibration, extra, tokens, price)
    if not args.config:
        raise UserError("nothing to plan", do="give a CONFIG and --gpus, or --budget 5000gpuh")
    config, automatic = _load(args.config, args.overrides, args.layout)
    if args.gpus is None:
        raise UserError("on how many GPUs?", where="--gpus", do="give their number: --gpus 64 --gpu h100")
    if config.model.kind == "lstm" and args.dry_run:
        raise UserError(
            "cuDNN's LSTM runs on a GPU only, so its dry run would show another one's memory",
            where="--dry-run",
            do="plan it without --dry-run",
        )
    cluster = cluster_of(args.gpu, args.gpus, args.network, extra)
    found = search(config, cluster, calibration=calibration) if automatic else None
    job = _chosen(config, cluster, found)
    config = with_layout(config, job) if automatic else config
    if job.offload and args.dry_run:
        raise UserError(
            "what is kept in host memory cannot be told from the GPU's, for a dry run has no GPU",
            where="--dry-run",
            do='plan it without --dry-run, or with layout.offload = "none"',
        )
    e = estimate(config, job, cluster, tokens=tokens, price=price, calibration=calibration)
    return _answer(args, e, found)


def _load(path: str, overrides: Sequence[str], layout: str) -> tuple[Config, bool]:
    """The config, and whether its layout is to be searched."""
    config, undecided = load_undecided(find_config(path), overrides)
    return config, undecided or layout == "auto"


def _chosen(config: Config, cluster: Cluster, found: Found | None) -> Job:
    """The job to describe: the search's best (its smallest where none fits), or the config's own layout."""
    if found is not None:
        return (found.best[0] if found.best else _smallest(found)).job
    try:
        return job_of(config, cluster.gpus)
    except UserError as e:
        hint = search(
            config, cluster, few=1, quick=True
        )  # raises its own error when no layout at all is possible
        some = (
            f"runs and fits: {described(hint.best[0].job)}"
            if hint.best
            else "--layout auto tells what could run"
        )
        raise UserError(e.what, where=e.where, do=f"{some} (--layout auto compares all)") from e


def _answer(
    args: argparse.Namespace, e: Estimate, found: Found | None, proposal: Proposal | None = None
) -> int:
    """Print the estimate and whatever else was asked for."""
    remedy = None if e.fits else _remedy(e, found)
    pictures: list[Path] = []
    if args.pictures:
        from bigtrain.plan.pictures import draw_all

        pictures = draw_all(e, Path(args.pictures))
    dry, wrong = _dry_run(e) if args.dry_run else (None, [])
    if args.json:
        told = to_json(e, found, remedy, proposal) | ({"dry_run": dry[1]} if dry else {})
        print(json.dumps(told, indent=1))
    else:
        print(tell(e))
        if dry is not None:
            print("\n" + dry[0])
        if found is not None:
            print("\n" + tell_search(found))
        if remedy is not None:
            print("\n" + f"{'would fit':17s}{remedy}")
        for picture in pictures:
            print(f"drawn in {picture}")
    if wrong:
        raise RunError(
            "the plan differs from the executed code by more than 5 %\n  " + "\n  ".join(wrong),
            do="trust the dry run, and please report this config",
        )
    return 0 if e.fits else 1


def _dry_run(e: Estimate) -> tuple[tuple[str, dict[str, Any]], list[str]]:
    """Execute the estimate's job dry: as text and for JSON, and where the plan is wrong."""
    from bigtrain.plan.checked import checks, checks_json, disagreements, tell_checks
    from bigtrain.plan.dryrun import dry_run
    from bigtrain.plan.replay import replay

    dry = dry_run(with_layout(e.config, e.job), e.cluster.gpus)
    found, replayed = checks(e, dry), replay(dry, e.job, e.cluster)
    told = tell_checks(found, dry, replayed, e.time), checks_json(found, dry, replayed, e.time)
    return told, disagreements(found, replayed, e.time)


def _remedy(e: Estimate, found: Found | None) -> str:
    """The nearest that fits: another layout of these GPUs, else more of them."""
    here = found or search(e.config, e.cluster, calibration=e.calibration, few=1, quick=True)
    if not here.best:
        here = search(e.config, e.cluster, calibration=e.calibration, few=1)
    if here.best:
        best = here.best[0]
        return (
            f"{described(best.job)}: {gibibytes(best.bytes)}, {span(best.time.total)} a step (--layout auto)"
        )
    least = f"the smallest layout here needs {gibibytes(_smallest(here).bytes)} ({described(_smallest(here).job)})"
    more = enough(e.config, e.cluster, e.calibration)
    if more is None:
        return f"nothing: {least}, and more GPUs do not help; a shorter sequence_length or another GPU would"
    gpus, layout = more
    return f"{gpus:,} x {e.cluster.gpu.name} ({described(layout.job)}); {least}"


def _smallest(found: Found) -> Layout:
    assert found.smallest is not None, "where nothing fits, one is smallest"
    return found.smallest


def enough(config: Config, cluster: Cluster, calibration: Calibration = NEUTRAL) -> tuple[int, Layout] | None:
    """The fewest doublings of the GPUs on which a layout fits; None if none does within MOST_DOUBLINGS."""
    for i in range(1, MOST_DOUBLINGS + 1):
        more = Cluster(cluster.gpu, cluster.gpus * 2**i, cluster.per_node, cluster.network)
        try:
            found = search(config, more, calibration=calibration, few=1, quick=True)
        except UserError:  # the global batch does not divide among so many
            continue
        if found.best:
            return more.gpus, found.best[0]
    return None


def _budget(
    args: argparse.Namespace,
    calibration: Calibration,
    extra: Path | None,
    tokens: int | None,
    price: float | None,
) -> int:
    """Propose a config, write it, and plan it."""
    hours = budget(args.budget).gpu_hours(price)
    template = _load(args.config, args.overrides, "auto")[0] if args.config else None
    gpu = find_gpu(args.gpu, extra)
    proposal = propose(
        *(hours, gpu),
        gpus=args.gpus,
        network=args.network,
        extra=extra,
        tokens=tokens,
        template=template,
        calibration=calibration,
    )
    if args.out:
        _write(Path(args.out), proposal.text, args.overwrite)
    job = proposal.layout.job
    e = estimate(proposal.config, job, proposal.cluster, price=price, calibration=calibration)
    if not args.json:
        print(proposal.text)
        if args.out:
            print(f"written to {args.out}; after `bigtrain prepare` into {proposal.config.data.path}:")
            print(f"  bigtrain train {args.out}\n")
    return _answer(args, e, None, proposal)


def _calibrate(args: argparse.Namespace) -> int:
    """Compare finished runs with their plans and store what they say. Raises UserError when one cannot be planned."""
    runs = [Path(run) for run in args.calibrate]
    if len(runs) > 1 and not args.out:
        raise UserError("where to, of several runs?", where="--out", do="name the file to write: --out FILE")
    out = Path(args.out or runs[0] / "calibration.toml")
    extra = Path(args.hardware) if args.hardware else None
    found = [_compared(run, args.network, extra) for run in runs]
    save(Calibration(tuple(one.finding for one in found)), out)
    if args.json:
        print(json.dumps([asdict(one) for one in found], indent=1))
    else:
        print("\n".join(f"{one.finding.source}\n{one}" for one in found))
        print(f"written to {out}; use it with --calibration {out}")
    return 0


def _compared(run: Path, network: str | None, extra: Path | None) -> Comparison:
    config = load(run / "config.toml")
    cluster = cluster_of_run(run, network, extra)
    world = cluster.gpus
    source = f"{config.name}: {described(job_of(config, world))} on {world} x {cluster.gpu.name}"
    found = compare(config, cluster, read_records(run / "metrics.jsonl"), source)
    if found is None:
        raise UserError(f"has no full step after the first {WARM_UP}", where=str(run), do="train longer")
    return found


def _write(path: Path, text: str, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise UserError("is there already", where=str(path), do="give another --out, or --overwrite")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise UserError(f"cannot write: {e.strerror}", where=str(path), do="give another --out") from e


def to_json(
    e: Estimate, found: Found | None = None, remedy: str | None = None, proposal: Proposal | None = None
) -> dict[str, Any]:
    """Everything that `tell` says, in bytes, seconds and FLOPs."""
    judged = allocation(e.parameters, e.tokens)
    told: dict[str, Any] = {
        "name": e.config.name,
        "cluster": {
            "gpu": e.cluster.gpu.name,
            "gpus": e.cluster.gpus,
            "nodes": e.cluster.nodes,
            "network": e.cluster.network.name,
        },
        "parameters": e.parameters,
        "parameters_without_embeddings": e.inner,
        "flops_per_token": {"training": e.flops.training, "training_visible": e.flops.training_visible},
        "layout": layout_json(e.job),
        "memory": [
            {**{kind: getattr(s, kind) for kind in KINDS}, "total": asdict(total)}
            for s, total in zip(e.stages, e.memory, strict=True)
        ],
        "capacity": e.capacity,
        "fits": e.fits,
        "surely_fits": e.surely_fits,
        "step_seconds": {**asdict(e.step), "parts": {part: getattr(e.time, part) for part in PARTS}},
        "tokens_per_second_per_gpu": asdict(e.speed),
        **{kind: asdict(e.utilisation(kind)) for kind in ("mfu", "hfu")},
        "mfu_visible": asdict(e.utilisation("visible")),
        "tokens": e.tokens,
        "steps": e.steps,
        "days": asdict(e.wall.times(1 / 86400)),
        "gpu_hours": asdict(e.gpu_hours),
        "cost": asdict(e.cost) if e.cost is not None else None,
        "checkpoint": asdict(e.saves),
        "data": asdict(judged),
        "learning_rates": [asdict(r) for r in learning_rates(e.inner, e.tokens)],
        "batches_tokens": [asdict(b) for b in batch_sizes(e.inner, e.tokens)],
    }
    if found is not None:
        told["search"] = {
            "tried": found.tried,
            "seconds": found.seconds,
            "best": [_found_json(layout) for layout in found.best],
            "too_large": [_found_json(layout) for layout in found.too_large],
        }
    if remedy is not None:
        told["would_fit"] = remedy
    if proposal is not None:
        told["config"] = proposal.text
    return told


def layout_json(job: Job) -> dict[str, Any]:
    """A job without its model."""
    names = ("tensor", "sequence", "pipeline", "schedule", "chunks", "context", "context_by", "data", "zero")
    more = (
        "offload",
        "recompute",
        "microbatch",
        "microbatches",
        "global_batch",
        "sequence_length",
        "precision",
    )
    return {name: getattr(job, name) for name in (*names, *more)}


def _found_json(layout: Layout) -> dict[str, Any]:
    seconds: Range = Range(layout.time.total, layout.time.low, layout.time.high)
    return {**layout_json(layout.job), "bytes": layout.bytes, "step_seconds": asdict(seconds)}
