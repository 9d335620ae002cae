"""From a budget to a config: a model, its data, learning rate, batch and layout for so many GPU-hours.

Each shape on a ladder of Llama models gets as many tokens as its own planned speed buys (so the speed is that of
the very model, batch and layout proposed, not an assumed utilisation), and the refitted Chinchilla law picks the
shape of the least loss.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LayoutConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from bigtrain.configfile import build
from bigtrain.errors import UserError
from bigtrain.plan.calibration import NEUTRAL, Calibration
from bigtrain.plan.constants import Constants
from bigtrain.plan.flops import flops_per_token, non_embedding_parameters, parameters
from bigtrain.plan.hardware import Cluster, Gpu, cluster_of
from bigtrain.plan.interval import save_plan
from bigtrain.plan.quantities import short
from bigtrain.plan.scaling import CHINCHILLA, Suggestion, allocation, deepseek_lr, step_law_batch, step_law_lr
from bigtrain.plan.search import Found, Layout, search, with_layout

WIDTHS = (
    256,
    384,
    512,
    640,
    768,
    1024,
    1280,
    1536,
    2048,
    2560,
    3072,
    4096,
    5120,
    6144,
    8192,
    10240,
    12288,
    16384,
)
"""The ladder: each step is about twice the parameters or less."""

LONGEST_DAYS = 7.0
"""Without a number of GPUs: so many that the run takes a week at most."""

FEWEST_STEPS = 50
"""Less, or less than one token a parameter, is no training to speak of."""


@dataclass(frozen=True)
class Proposal:
    """A config for a budget, and why."""

    config: Config
    text: str
    """The config as TOML, with reasons as comments."""
    cluster: Cluster
    layout: Layout
    tokens: int
    loss: float
    """By the refitted Chinchilla law, nats a token: to compare proposals with, not to expect."""


def shape(width: int) -> ModelConfig:
    """A Llama of this width (a multiple of 128): head dim 128, grouped-query attention, feed-forward 3.5 x width.

    Small models are relatively deep (width / layers 64 up to width 1024), large ones about as Llama 3's (128).
    """
    assert width % 128 == 0, width
    layers = width / 64 if width <= 1024 else 16 + (width - 1024) / 192 if width < 4096 else width / 128
    heads = width // 128
    kv = (
        8
        if heads >= 16 and heads % 8 == 0
        else max(k for k in (1, 2, 4) if heads % k == 0 and 2 * k <= heads)
    )
    length = 2048 if width < 2048 else 4096 if width < 4096 else 8192
    return ModelConfig(
        # A vocabulary's embeddings should not outweigh the layers: Llama 2's for small models, Llama 3's for large.
        vocab_size=32000 if width < 2048 else 128256,
        layers=round(layers) if layers < 10 else int(layers + 2) // 4 * 4,
        width=width,
        heads=heads,
        kv_heads=kv,
        ffn_width=7 * width // 2,
        max_length=length,
        rope_theta=500000.0,
    )


def gpus_for(hours: float, gpu: Gpu) -> int:
    """The fewest GPUs, a power of two, that spend so many GPU-hours within LONGEST_DAYS; whole nodes beyond one."""
    most = hours / (LONGEST_DAYS * 24)
    count = 1
    while count < most:
        count *= 2
    return count if count <= gpu.per_node else math.ceil(count / gpu.per_node) * gpu.per_node


def propose(
    hours: float,
    gpu: Gpu,
    *,
    gpus: int | None = None,
    network: str | None = None,
    extra: Path | None = None,
    tokens: int | None = None,
    template: Config | None = None,
    constants: Constants | None = None,
    calibration: Calibration = NEUTRAL,
) -> Proposal:
    """The best use of `hours` GPU-hours. `gpus`: on so many; `tokens`: with so much data (the largest model that
    sees it all); `template`: its model and data stay, only budget, rate, batch and layout are proposed.

    Raises UserError when the budget is too small for any model, or no model fits.
    """
    counts = [gpus] if gpus else [gpus_for(hours, gpu) * 2**i for i in range(4)]
    for count in counts:
        cluster = cluster_of(gpu.name, count, network, extra)
        asked = _Asked(hours, cluster, tokens, template, constants, calibration)
        best = _climb(asked)
        if best is not None:
            return _finished(asked, best)
    raise UserError(
        f"{hours:,.0f} GPU-hours on {counts[-1]} x {gpu.name} train no model of the ladder"
        + (f" on {short(tokens)} tokens" if tokens else ""),
        where="--budget",
        do=f"raise the budget, or give fewer {'--tokens' if tokens else '--gpus'} or larger cards",
    )


@dataclass(frozen=True)
class _Asked:
    """What a proposal must keep to."""

    hours: float
    cluster: Cluster
    tokens: int | None
    template: Config | None
    constants: Constants | None
    calibration: Calibration

    @property
    def seconds(self) -> float:
        """Wall time of the run."""
        return self.hours / self.cluster.gpus * 3600

    def search(self, draft: Config) -> Found:
        """The best of the likely layouts."""
        more: dict[str, Any] = {"constants": self.constants, "calibration": self.calibration}
        return search(draft, self.cluster, few=1, quick=True, **more)


@dataclass(frozen=True)
class _Try:
    """One shape with the data that the budget buys it."""

    config: Config
    layout: Layout

    @property
    def loss(self) -> float:
        return CHINCHILLA.loss(parameters(self.config.model), self.config.train.tokens or 1)


def _climb(asked: _Asked) -> _Try | None:
    """The best shape: down or up the ladder from a first guess for as long as it gets better."""
    if asked.template is not None:
        return _afford(asked, asked.template.model)
    flops = asked.hours * 3600 * 0.4 * asked.cluster.gpu.flops("bf16")
    wanted = flops / 6 / asked.tokens if asked.tokens else CHINCHILLA.best(flops)[0]
    start = min(range(len(WIDTHS)), key=lambda i: abs(math.log(parameters(shape(WIDTHS[i])) / wanted)))
    seen: dict[int, _Try | None] = {}

    def at(index: int) -> _Try | None:
        if index not in seen:
            seen[index] = _afford(asked, shape(WIDTHS[index])) if 0 <= index < len(WIDTHS) else None
        return seen[index]

    here = start
    while at(here) is None and here > 0:  # too large for this cluster or budget
        here -= 1
    for step in (-1, 1):
        while _better(at(here + step), at(here)):
            here += step
    return at(here)


def _better(one: _Try | None, other: _Try | None) -> bool:
    return one is not None and (other is None or one.loss < other.loss)


def _afford(asked: _Asked, model: ModelConfig) -> _Try | None:
    """The data that this model sees within the budget at its planned speed; None if it does not fit or pay.

    Data decides the batch, the batch the layout and the speed, and that the data: repeated until the batch stays.
    """
    length = asked.template.data.sequence_length if asked.template else model.max_length
    flops = flops_per_token(model, length).training
    guess = 0.4 * asked.cluster.gpu.flops("bf16") / flops * asked.hours * 3600
    batch = _batch(asked, model, length, asked.tokens or guess)
    seen: list[int] = []
    while True:
        draft = _drafted(asked, model, length, batch, batch)
        try:
            found = asked.search(draft)
        except UserError:  # so few sequences, layers and heads do not occupy so many GPUs
            return None
        if not found.best:
            return None
        layout = found.best[0]
        saves = save_plan(12.0 * parameters(model), asked.cluster.gpus, asked.cluster.nodes)
        bought = asked.seconds * saves.goodput / layout.time.total * batch
        if bought < max(asked.tokens or 0, FEWEST_STEPS * batch, parameters(model)):
            return None
        seen.append(batch)
        batch = _batch(asked, model, length, asked.tokens or bought)
        if batch in seen:
            steps = int(asked.tokens or bought) // seen[-1]
            return _Try(
                with_layout(_drafted(asked, model, length, seen[-1], steps * seen[-1]), layout.job), layout
            )


def _batch(asked: _Asked, model: ModelConfig, length: int, tokens: float) -> int:
    """Tokens in a global batch: the Step Law's, as sequences that divide among the GPUs (a power of two of them)."""
    wanted = step_law_batch(non_embedding_parameters(model), int(tokens)).value / length
    odd = asked.cluster.gpus // (asked.cluster.gpus & -asked.cluster.gpus)
    return int(odd * 2 ** max(0, round(math.log2(max(wanted, 1.0) / odd))) * length)


def _drafted(asked: _Asked, model: ModelConfig, length: int, batch: int, tokens: int) -> Config:
    """A config with this batch and this much data; everything but the layout."""
    steps = tokens // batch
    inner = non_embedding_parameters(model)
    budget: dict[str, Any] = {
        "steps": None,
        "tokens": tokens,
        "global_batch": None,
        "global_batch_tokens": batch,
    }
    budget |= {"precision": "bf16", "eval_every": max(1, steps // 50)}
    optim = {"lr": learning_rate(inner, tokens).value, "warmup_steps": min(2000, max(1, steps // 50))}
    saves = save_plan(12.0 * parameters(model), asked.cluster.gpus, asked.cluster.nodes)
    keep = {"every_steps": 0, "every_minutes": float(max(10, round(saves.every_seconds / 60)))}
    if (given := asked.template) is not None:
        budget |= {"batch_ramp_from": None, "batch_ramp_steps": None, "microbatch": 1}
        changed = {"train": given.train.model_copy(update=budget), "layout": LayoutConfig()}
        if given.optim.kind == "sgd":  # the published rules are AdamW's
            del optim["lr"]
        changed |= {"optim": given.optim.model_copy(update=optim)}
        return given.model_copy(update=changed | {"checkpoint": given.checkpoint.model_copy(update=keep)})
    name = f"llama-{short(parameters(model)).lower()}"
    return Config(
        name=name,
        model=model,
        data=DataConfig(path=f"data/{name}", sequence_length=length),
        train=TrainConfig.model_validate({k: v for k, v in budget.items() if v is not None}),
        optim=OptimConfig.model_validate(optim),
        checkpoint=CheckpointConfig.model_validate(keep),
    )


def learning_rate(inner: int, tokens: int) -> Suggestion:
    """The Step Law's rate; outside the range it was fitted on the lower of its and DeepSeek's, three digits.

    `inner` are the parameters without embeddings. There a rate too high costs the run, one too low a little loss:
    the Step Law gives 1.9e-3 for Llama 3 8B on 15T tokens, which was trained with 3e-4.
    """
    best = step_law_lr(inner, tokens)
    if best.extrapolated:
        best = min(best, deepseek_lr(6.0 * inner * tokens), key=lambda s: s.value)
    return Suggestion(float(f"{best.value:.3g}"), best.source, best.extrapolated)


def _finished(asked: _Asked, best: _Try) -> Proposal:
    """The proposal with its text, which is read back: what is written is what was planned."""
    text = _text(asked, best)
    assert asked.template is not None or build(tomllib.loads(text)) == best.config
    assert best.config.train.tokens is not None
    return Proposal(
        build(tomllib.loads(text)), text, asked.cluster, best.layout, best.config.train.tokens, best.loss
    )


def _text(asked: _Asked, best: _Try) -> str:
    """The config as TOML: what differs from the defaults, with the reason above each section."""
    config, cluster = best.config, asked.cluster
    count, tokens = parameters(config.model), config.train.tokens or 0
    judged = allocation(count, tokens)
    lr = learning_rate(non_embedding_parameters(config.model), tokens)
    rate = lr.source + ("; extrapolated beyond its fit" if lr.extrapolated else "")
    if config.optim.kind == "sgd":
        rate = "The rate as given: published rules are AdamW's, `bigtrain train CONFIG --lr-find` finds SGD's"
    size = "as given" if asked.template else "width / layers and grouped heads as in Llama 3"
    against = f"the best size for its compute is {short(judged.best_parameters)} (arXiv 2404.10102)"
    reasons = {
        "model": f"{count:,} parameters, {size};\n# {against}.",
        "data": "A folder written by `bigtrain prepare`; its tokenizer needs no more pieces than vocab_size.",
        "train": f"{tokens / count:.3g} tokens a parameter; the batch is the Step Law's (arXiv 2503.04715), rounded.",
        "optim": f"{rate}.",
        "layout": f"Fastest found for {cluster.gpus} x {cluster.gpu.name}: {best.layout.time.total:.3g} s a step, "
        f"MFU {best.layout.time.mfu:.0%}.",
        "checkpoint": "Young's interval for this many GPUs, ten minutes at least.",
    }
    spent = f"{asked.hours:,.0f} GPU-hours of {cluster.gpu.name} on {cluster.gpus} GPUs"
    lines = [f"# Proposed by `bigtrain plan --budget` for {spent}.", f"name = {json.dumps(config.name)}"]
    for section, value in config.model_dump(exclude_defaults=True, exclude_none=True).items():
        if isinstance(value, dict) and value:
            lines += ["", f"# {reasons.get(section, 'As given.')}", f"[{section}]", *_pairs(value, section)]
    return "\n".join(lines) + "\n"


def _pairs(section: Mapping[str, Any], name: str) -> list[str]:
    """`key = value` lines, sections inside this one last."""
    plain = [f"{k} = {_toml(v)}" for k, v in section.items() if not isinstance(v, dict)]
    inner = [(k, v) for k, v in section.items() if isinstance(v, dict)]
    return plain + [line for k, v in inner for line in ["", f"[{name}.{k}]", *_pairs(v, f"{name}.{k}")]]


def _toml(value: Any) -> str:
    if isinstance(value, bool | str | list):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)
