"""The whole configuration: frozen, typed, documented field by field.

A config names a model, data, a budget and a layout; everything else has a default. Nothing is ever written
back into it: derived values live in the modules that need them and are printed by `bigtrain train --dry`.
`bigtrain.configfile` reads TOML into these classes and reports every problem at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A part of the configuration: immutable, unknown keys are errors, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class RopeScaling(Section):
    """Stretch rotary position embeddings beyond the length they were trained on."""

    kind: Literal["linear", "llama3", "yarn"]
    """linear: divide positions by `factor` (Chen 2023); llama3: Llama 3.1's piecewise rule; yarn: Peng 2023."""
    factor: float = Field(ge=1.0)
    """How many times longer than `original_length`."""
    original_length: int = Field(default=8192, ge=1)
    """Positions the model was trained on before stretching (llama3, yarn)."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_length / low_freq_factor are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_length / high_freq_factor stay as they are."""
    beta_fast: float = 32.0
    """yarn: dimensions that turn more often than this over original_length stay as they are."""
    beta_slow: float = 1.0
    """yarn: dimensions that turn less often than this over original_length are divided by `factor`."""


class ModelConfig(Section):
    """The network. Changing anything here makes another model: old checkpoints are refused."""

    kind: Literal["transformer", "lstm"] = "transformer"
    """transformer: decoder or encoder blocks; lstm: the primer's embedding + LSTM + linear example."""
    objective: Literal["causal", "masked"] = "causal"
    """causal: predict the next token; masked: BERT-style, hide tokens and look both ways."""
    vocab_size: int = Field(ge=2)
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    layers: int = Field(ge=1)
    """Transformer blocks, or stacked LSTM layers."""
    width: int = Field(ge=1)
    """Width C of the residual stream, or of the LSTM's hidden state."""
    heads: int | None = Field(default=None, ge=1)
    """Query heads H (transformer only, required there)."""
    kv_heads: int | None = Field(default=None, ge=1)
    """Key/value heads K; fewer than `heads` is grouped-query attention. Default: `heads`."""
    head_dim: int | None = Field(default=None, ge=2)
    """Width D of one head. Default: width / heads."""
    ffn_width: int | None = Field(default=None, ge=1)
    """Inner width F of the feed-forward. Default: swiglu 8/3 x width rounded up to 64, gelu 4 x width."""
    max_length: int = Field(default=2048, ge=1)
    """Longest sequence; a table size for learned positions, a limit for generation and training."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before attention, before the feed-forward and at the end."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the variance before the square root."""
    position: Literal["rope", "learned"] = "rope"
    """rope: rotary embeddings on queries and keys; learned: a table added to the token embedding (GPT-2)."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Context extension; none by default."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """swiglu: gated (Llama); gelu: plain, tanh approximation (GPT-2)."""
    bias: bool = False
    """Biases in every linear layer and layernorm except the output head (GPT-2)."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections only (Qwen 2)."""
    qk_norm: bool = False
    """RMSNorm on each query and key head before the rotation (Qwen 3)."""
    sliding_window: int | None = Field(default=None, ge=1)
    """Each token attends to itself and at most this many - 1 tokens before it."""
    tied: bool = False
    """The output head is the embedding matrix."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout between LSTM layers and before the head (lstm only; the primer uses 0.2)."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of initial weights; projections back into the residual use std / sqrt(2 x layers)."""

    @property
    def num_heads(self) -> int:
        """H, after the check that it is given."""
        assert self.heads is not None, "validated: a transformer has heads"
        return self.heads

    @property
    def num_kv_heads(self) -> int:
        """K: `kv_heads`, or H without grouped-query attention."""
        return self.kv_heads or self.num_heads

    @property
    def dim_per_head(self) -> int:
        """D: `head_dim`, or width / heads."""
        return self.head_dim or self.width // self.num_heads

    @property
    def ffn(self) -> int:
        """F: `ffn_width`, or the default of the activation."""
        if self.ffn_width is not None:
            return self.ffn_width
        return 4 * self.width if self.activation == "gelu" else -(-8 * self.width // 3 // 64) * 64


class LossConfig(Section):
    """What is minimised. The reported loss is always the plain cross-entropy of the counted tokens, in nats."""

    z_loss: float = Field(default=0.0, ge=0)
    """Weight of log(sum(exp(logits)))^2, which keeps logits small (PaLM uses 1e-4)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target probability spread evenly over the vocabulary."""
    mask_rate: float = Field(default=0.15, gt=0, lt=1)
    """masked objective: share of the tokens to predict; of these 80 % hidden, 10 % random, 10 % kept (BERT)."""


class SourceConfig(Section):
    """One of several corpora that a run reads."""

    path: str
    """As data.path."""
    tokenizer: str | None = None
    """As data.tokenizer."""
    weight: float = Field(default=1.0, ge=0)
    """Its share of the samples, relative to the other sources' weights."""
    max_epochs: float | None = Field(default=None, gt=0)
    """How often it may be read; data.at_limit says what happens then."""


class StageConfig(Section):
    """A change of the data while a run goes on. What comes before its first sample does not depend on it."""

    sample: int = Field(ge=1)
    """First sample of the stage, counted from 0 over the run; a step must begin there to change the length."""
    weights: dict[str, float] | None = None
    """Weights of the sources from here on, 0 for those not named. Default: as before."""
    sequence_length: int | None = Field(default=None, ge=2)
    """Tokens in one sequence from here on; every source begins a new epoch. Default: as before."""


class DataConfig(Section):
    """Which tokens, in which order."""

    path: str | None = None
    """A folder written by `bigtrain prepare` (it holds dataset.json), relative to the working folder or a URL; or
    PREFIX of a Megatron corpus PREFIX.bin + PREFIX.idx. Give this or `sources`."""
    tokenizer: str | None = None
    """A Megatron corpus does not say which tokenizer made it: its SentencePiece .model file."""
    sources: dict[str, SourceConfig] = {}
    """Several corpora with one tokenizer, by name: [data.sources.web]. The order counts; append new ones."""
    stages: dict[str, StageConfig] = {}
    """Changes of weights and sequence length while the run goes on, by name: [data.stages.anneal]."""
    at_limit: Literal["stop", "reweight"] = "stop"
    """When a source would be read more often than its max_epochs: stop: refuse the run before it begins; reweight: the
    others take its share, in their proportions."""
    cache: str | None = None
    """Folder for copies of corpora that lie in a store, on each machine. Default: BIGTRAIN_CACHE, or in ~/.cache."""
    skip: list[list[int]] = []
    """Ranges [first, last] of samples that are left out, as `bigtrain data show` numbers them."""
    sequence_length: int = Field(ge=2)
    """Tokens S in one training sequence."""
    packing: Literal["chunk", "best_fit"] = "chunk"
    """chunk: documents one after another, cut every S tokens; best_fit: documents packed so that only those longer than
    S are cut, with a little padding (`bigtrain pack` prepares it)."""
    document_mask: bool = True
    """Documents packed into one sequence do not see each other, and positions restart at each."""
    prefetch: int = Field(default=4, ge=0)
    """Steps read ahead in the background; 0 reads in the training thread."""

    @property
    def corpora(self) -> dict[str, SourceConfig]:
        """Every corpus by its name, in the order that counts."""
        return self.sources or {"data": SourceConfig(path=self.path or "", tokenizer=self.tokenizer)}

    @property
    def first_path(self) -> str:
        """Where the first corpus lies: the only one of most runs."""
        return next(iter(self.corpora.values())).path

    @property
    def in_stages(self) -> dict[int, tuple[int, dict[str, float]]]:
        """Sequence length and weights of the sources by the sample from which they hold."""
        length, weights = self.sequence_length, {name: source.weight for name, source in self.corpora.items()}
        found = {0: (length, weights)}
        for stage in sorted(self.stages.values(), key=lambda stage: stage.sample):
            length = stage.sequence_length or length
            weights = weights if stage.weights is None else stage.weights
            found[stage.sample] = length, weights
        return found

    @property
    def lengths(self) -> dict[int, int]:
        """Sequence length by the sample from which it holds."""
        found: dict[int, int] = {}
        last = 0
        for sample, (length, _) in self.in_stages.items():
            if length != last:
                found[sample] = last = length
        return found

    @property
    def skipped(self) -> list[tuple[int, int]]:
        """`skip`, as pairs."""
        return [(first, last) for first, last in self.skip]


class TrainConfig(Section):
    """How long and how much at a time."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps. Give this or `tokens`."""
    tokens: int | None = Field(default=None, ge=1)
    """Training tokens; the run stops at the first step that reaches them. Give this or `steps`."""
    global_batch: int | None = Field(default=None, ge=1)
    """Sequences in one optimizer step, over all ranks. Give this or `global_batch_tokens`."""
    global_batch_tokens: int | None = Field(default=None, ge=1)
    """The same in tokens; a multiple of data.sequence_length."""
    microbatch: int = Field(default=1, ge=1)
    """Sequences in one forward pass of one rank; the rest of the global batch is accumulated."""
    batch_ramp_from: int | None = Field(default=None, ge=1)
    """Start with this global batch (same unit as the global batch) and grow to the full one."""
    batch_ramp_steps: int | None = Field(default=None, ge=1)
    """Steps over which the batch grows, in equal rises."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 compute in 16 bits over fp32 master weights and fp32 gradient accumulation."""
    seed: int = Field(default=1, ge=0)
    """Decides initial weights, data order, masking and dropout."""
    init_from: str | None = None
    """Start from the weights in this folder or URL instead of random ones: a Hugging Face model (safetensors) or a
    torch.distributed.checkpoint, as `bigtrain import` checks and writes it. Read at step 0 only; a run that has a
    checkpoint goes on from that."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between evaluations on the held-out split; 0: only at the end."""
    eval_sequences: int = Field(default=64, ge=1)
    """Held-out sequences in one evaluation (always the same ones)."""
    max_skipped: int = Field(default=10, ge=1)
    """Stop after this many steps in a row that were skipped: loss or gradient not finite, or a spike."""


class OptimConfig(Section):
    """From gradients to weights."""

    kind: Literal["adamw", "sgd", "muon"] = "adamw"
    """adamw; sgd: the primer's w -= lr * gradient, with momentum; muon: orthogonalised momentum for matrices."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate. Default: the Step Law for this model and data size, printed with its source."""
    schedule: Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"] = "cosine"
    """Shape after warm-up; wsd holds the peak and decays only in the last `decay_steps`."""
    warmup_steps: int = Field(default=0, ge=0)
    """Linear rise from lr / warmup_steps to the peak."""
    decay_steps: int | None = Field(default=None, ge=1)
    """wsd: length of the final decay. Default: a tenth of the run."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end as a share of the peak (cosine, linear, wsd)."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay of matrices, embeddings among them; norms and biases are excluded."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """adamw: memory of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """adamw: memory of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """adamw: added to the square root of the second moment."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """sgd: memory of the gradient (0 is the primer's plain rule)."""
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    """muon: memory of the gradient of matrices; everything else is trained by adamw."""
    clip: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 turns clipping off."""


class LayoutConfig(Section):
    """How the work is laid over the ranks. Changing anything here changes speed and memory, never the curve.

    ranks = pipeline x data x context x expert x tensor; data is whatever the others leave. One process alone runs
    any layout, as if all axes were 1. `layout = "auto"` above all sections, in place of this one, lets the planner
    choose at the start of `bigtrain train`, with train.microbatch, by the number and kind of the GPUs.
    """

    tensor: int = Field(default=1, ge=1)
    """Ranks that share each layer's matrices and heads (inside one node: they talk in every layer)."""
    sequence: bool = True
    """With tensor > 1, norms and residuals are also shared, token by token: the same traffic, less memory."""
    pipeline: int = Field(default=1, ge=1)
    """Ranks that hold consecutive layers; microbatches flow through them."""
    schedule: Literal["1f1b", "gpipe", "interleaved", "interleaved-zb", "zbv"] = "1f1b"
    """Order of forward and backward passes in the pipeline; see `bigtrain inspect CONFIG --schedule`."""
    chunks: int = Field(default=1, ge=1)
    """Pieces of the model each pipeline rank holds: at least 2 for interleaved schedules, 2 for zbv, else 1."""
    split: list[Annotated[int, Field(ge=0)]] | None = None
    """Layers in each of the pipeline x chunks pieces, in model order. Default: balanced by cost, head included."""
    context: int = Field(default=1, ge=1)
    """Ranks that share each sequence, for long ones."""
    context_by: Literal["gather", "ulysses"] = "gather"
    """gather: keys and values of all ranks are gathered, the causal work balanced; ulysses: heads are exchanged."""
    expert: int = Field(default=1, ge=1)
    """Ranks that share the experts of a mixture-of-experts model; 1 for the models of this release."""
    engine: Literal["auto", "reference", "zero"] = "auto"
    """reference: plain PyTorch, one process; zero: DeepSpeed ZeRO. auto: reference on one process, else zero."""
    zero: Literal[0, 1, 2, 3] = 1
    """What the data-parallel ranks shard: 1 optimizer state, 2 + gradients, 3 + weights."""
    offload: Literal["none", "optimizer"] = "none"
    """optimizer: its state lives and is updated in host memory."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: selective the attention core, full whole blocks."""
    kernels: Literal["auto", "torch", "triton", "reference"] = "auto"
    """auto: our Triton kernels on a GPU, torch's operations elsewhere; torch: these everywhere; triton: the kernels
    everywhere (on a CPU in Triton's interpreter, thousands of times slower); reference: plain explicit operations."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads a rank. Default: the cores divided by the ranks on this machine."""


class CheckpointConfig(Section):
    """When to save, where, what to keep."""

    folder: str = ""
    """Path or URL (s3://bucket/run, needs `pip install bigtrain[remote]`) of the checkpoints. Default: in the run."""
    every_steps: int = Field(default=1000, ge=0)
    """Save after every this many steps; 0: not by steps. The last step is always saved."""
    every_minutes: float = Field(default=0.0, ge=0)
    """Also save when this long has passed since the last save; 0: not by time."""
    keep_last: int = Field(default=3, ge=1)
    """Newest checkpoints to keep."""
    keep_every: int = Field(default=0, ge=0)
    """Also keep those whose step is a multiple of this; 0: none."""
    asynchronous: bool = True
    """Write in the background, from a copy in host memory (12 bytes a parameter with AdamW, shared by the ranks);
    false: training waits until the checkpoint is on the disk."""
    verify: bool = True
    """Verify checksums when loading."""
    on_damage: Literal["older", "stop"] = "older"
    """When the newest checkpoint is damaged: older: say so and go on from the newest sound one; stop: give up."""


class GuardConfig(Section):
    """What to do about spikes: steps whose loss or gradient norm is far above those of the steps before.

    A step whose loss or gradient is not finite is left out whatever stands here.
    """

    on_spike: Literal["warn", "skip", "rollback"] = "warn"
    """warn: say so; skip: leave the update out too; rollback: go back to a checkpoint, leave the data out, go on."""
    sigma: float = Field(default=8.0, gt=0)
    """How many robust standard deviations above the last updates make a spike."""
    window: int = Field(default=128, ge=4)
    """Last updates that a step is compared with; nothing is a spike until half of it is full."""
    leave_out: int = Field(default=1, ge=1)
    """rollback: steps, up to and with the spike, whose samples are left out (PaLM left out 200 to 500)."""
    max_rollbacks: int = Field(default=3, ge=1)
    """rollback: stop the run at the next spike after this many."""


class LogConfig(Section):
    """What is told while it runs. metrics.jsonl is always written."""

    every_steps: int = Field(default=1, ge=1)
    """Steps between console lines."""
    tensorboard: bool = True
    """Write TensorBoard files into RUN/tensorboard."""
    wandb: str | None = None
    """Weights & Biases project to report to (needs `pip install bigtrain[wandb]`)."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Dense peak of one device in TFLOP/s for MFU; known GPUs are looked up, others show no MFU."""


class Config(Section):
    """One run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run directory runs/NAME unless `--run-dir` says otherwise."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    layout: LayoutConfig = LayoutConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    log: LogConfig = LogConfig()


def model_problems(m: ModelConfig) -> Iterator[str]:
    """What does not fit together inside [model]; each one sentence starting with the key."""
    if m.kind == "lstm":
        if m.objective == "masked":
            yield 'model.objective: "masked" needs both directions; an lstm is causal'
        if m.tied:
            yield "model.tied: the lstm example has an output layer of its own; remove it"
        return
    if m.dropout:
        yield "model.dropout: only the lstm has dropout; remove it"
    if m.heads is None:
        yield "model.heads: required for a transformer"
        return
    if m.head_dim is None and m.width % m.heads:
        yield f"model.heads: width {m.width} is not a multiple of heads {m.heads}; set head_dim or change one"
    elif m.position == "rope" and m.dim_per_head % 2:
        yield f"model.head_dim: rotary positions need an even head_dim, not {m.dim_per_head}"
    if m.heads % m.num_kv_heads:
        yield f"model.kv_heads: heads {m.heads} is not a multiple of kv_heads {m.kv_heads}"
    if m.rope_scaling is not None and m.position != "rope":
        yield 'model.rope_scaling: needs position = "rope"'
    if m.sliding_window is not None and m.objective == "masked":
        yield "model.sliding_window: only for the causal objective"


def batch_problems(c: Config) -> Iterator[str]:
    """What does not fit together in the budget and the batch, whatever the number of ranks."""
    t = c.train
    if (t.steps is None) == (t.tokens is None):
        yield "train.steps: give exactly one of steps and tokens"
    if (t.global_batch is None) == (t.global_batch_tokens is None):
        yield "train.global_batch: give exactly one of global_batch and global_batch_tokens"
        return
    for key in ("global_batch_tokens", "batch_ramp_from"):
        tokens = getattr(t, key)
        in_tokens = key == "global_batch_tokens" or t.global_batch_tokens is not None
        for length in c.data.lengths.values() if tokens is not None and in_tokens else ():
            if tokens % length:
                yield f"train.{key}: {tokens} is not a multiple of the sequence length {length}"
    full = t.global_batch or t.global_batch_tokens or 0
    if (t.batch_ramp_from is None) != (t.batch_ramp_steps is None):
        yield "train.batch_ramp_from: give both batch_ramp_from and batch_ramp_steps, or neither"
    elif t.batch_ramp_from is not None and t.batch_ramp_from > full:
        yield f"train.batch_ramp_from: {t.batch_ramp_from} is larger than the full global batch {full}"


def data_problems(c: Config) -> Iterator[str]:
    """What does not fit together inside [data]."""
    d = c.data
    if (d.path is None) != bool(d.sources):
        yield "data.path: give exactly one of path and sources"
    if d.sources and d.tokenizer is not None:
        yield "data.tokenizer: belongs to data.path; a source has a tokenizer of its own"
    if d.sources and not any(source.weight for source in d.sources.values()):
        yield "data.sources: one weight at least must be above 0"
    seen: dict[int, str] = {}
    for name, stage in d.stages.items():
        where = f"data.stages.{name}"
        if stage.sample in seen:
            yield f"{where}.sample: stage {seen[stage.sample]} begins at {stage.sample} too"
        seen[stage.sample] = name
        for source, weight in (stage.weights or {}).items():
            if source not in d.corpora:
                yield f"{where}.weights: no source {source!r}; there are {', '.join(d.corpora)}"
            elif weight < 0:
                yield f"{where}.weights: {source} has {weight}, which is below 0"
        if stage.weights is not None and not any(stage.weights.values()):
            yield f"{where}.weights: one weight at least must be above 0"
        if stage.weights is None and stage.sequence_length is None:
            yield f"{where}: changes neither weights nor sequence_length"
    for each in d.skip:
        if len(each) != 2 or not 0 <= each[0] <= each[1]:
            yield f"data.skip: {each} is no range of samples: give [first, last], 0 <= first <= last"
    if d.packing == "best_fit" and not d.document_mask:
        yield 'data.packing: "best_fit" needs document_mask = true, or documents would see their neighbours'
    for length in d.lengths.values():
        if length > c.model.max_length and c.model.kind == "transformer":
            yield f"data.sequence_length: {length} is longer than model.max_length {c.model.max_length}"


def layout_problems(c: Config) -> Iterator[str]:
    """What does not fit together in [layout] and between it and the model, whatever the number of ranks.

    What depends on the number of ranks is checked by `bigtrain.grid` before they meet.
    """
    layout, m = c.layout, c.model
    yield from _axis_problems(layout, m)
    yield from _pipeline_problems(layout, m)
    if layout.offload != "none" and layout.engine == "reference":
        yield 'layout.offload: needs engine = "zero"'


def _axis_problems(layout: LayoutConfig, m: ModelConfig) -> Iterator[str]:
    """Tensor, context and expert parallelism against the model's shapes."""
    split = {"tensor": layout.tensor, "pipeline": layout.pipeline, "context": layout.context}
    if m.kind == "lstm":
        for axis in (name for name, size in split.items() if size > 1):
            yield f"layout.{axis}: an lstm runs data-parallel only (its state walks the sequence); set {axis} = 1"
        return
    if layout.expert > 1:
        yield "layout.expert: this model has no experts; set expert = 1"
    if m.heads is None:
        return
    H, K, t = m.num_heads, m.num_kv_heads, layout.tensor
    fits = [n for n in range(1, H + 1) if H % n == 0 and (K % n == 0 or n % K == 0)]
    if t not in fits:
        yield (
            f"layout.tensor: {t} ranks cannot share {H} heads with {K} key/value heads evenly; "
            f"nearest that works: {_nearest(t, fits)}"
        )
        return
    here, kv = H // t, max(1, K // t)
    fits = [n for n in range(1, here + 1) if here % n == 0 and (kv % n == 0 or n % kv == 0)]
    if layout.context_by == "ulysses" and layout.context not in fits:
        yield (
            f"layout.context: ulysses cannot share the {here} heads ({kv} kv) of a tensor rank among "
            f"{layout.context}; "
            f'nearest that works: {_nearest(layout.context, fits)}, or context_by = "gather"'
        )


def _pipeline_problems(layout: LayoutConfig, m: ModelConfig) -> Iterator[str]:
    """Pipeline stages, chunks and the split against the model's layers and the ZeRO level."""
    p, pieces = layout.pipeline, layout.pipeline * layout.chunks
    if layout.schedule == "zbv" and layout.chunks != 2:
        yield f'layout.chunks: schedule "zbv" holds 2 chunks a rank, not {layout.chunks}; set chunks = 2'
    if layout.schedule.startswith("interleaved") and layout.chunks < 2:
        yield f'layout.chunks: schedule "{layout.schedule}" needs at least 2 chunks a rank; set chunks = 2'
    if layout.schedule in ("1f1b", "gpipe") and layout.chunks != 1:
        yield (
            f'layout.chunks: schedule "{layout.schedule}" has 1 chunk a rank; '
            'set chunks = 1 or schedule = "interleaved"'
        )
    if p == 1 or m.kind == "lstm":
        return
    if pieces > m.layers:
        fits = max(1, m.layers // layout.chunks)
        yield (
            f"layout.pipeline: {p} ranks x {layout.chunks} chunks are {pieces} pieces, but the model has only "
            f"{m.layers} layers; nearest that works: pipeline = {fits}"
        )
    if layout.zero == 3:
        yield (
            "layout.zero: ZeRO 3 gathers weights in every microbatch of every stage, which undoes a pipeline; "
            "nearest that works: zero = 1 (or pipeline = 1)"
        )
    if layout.split is not None and len(layout.split) != pieces:
        yield f"layout.split: has {len(layout.split)} numbers, but pipeline x chunks are {pieces} pieces"
    elif layout.split is not None and (
        sum(layout.split) != m.layers or min(layout.split[1:-1], default=1) < 1
    ):
        yield (
            f"layout.split: must sum to the model's {m.layers} layers, with 1 or more in each piece (0 only in the "
            "first, which has the embedding, and in the last, which has the head)"
        )


def _nearest(wanted: int, fits: list[int]) -> int:
    return min(fits, key=lambda n: (abs(n - wanted), n))


def problems(c: Config) -> list[str]:
    """Every cross-field problem of a well-typed config, as sentences that begin with the key."""
    found = [*model_problems(c.model), *batch_problems(c), *layout_problems(c), *data_problems(c)]
    t, o = c.train, c.optim
    if t.steps is not None and o.warmup_steps > t.steps:
        found.append(f"optim.warmup_steps: {o.warmup_steps} is more than train.steps {t.steps}")
    if o.decay_steps is not None and o.schedule != "wsd":
        found.append('optim.decay_steps: only for schedule = "wsd"')
    if o.kind == "sgd" and o.lr is None:
        found.append("optim.lr: required for sgd, the default rule is adamw's; set any and run --lr-find")
    return found
