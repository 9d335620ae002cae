"""Published scaling studies as numbers: how much data, which loss, a first learning rate and batch.

Every rule is a fit over small runs. Each answer says from where it comes and whether it is asked outside the range
it was fitted on, where it may be wrong by any factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bigtrain.config import Config
from bigtrain.plan.flops import non_embedding_parameters


@dataclass(frozen=True)
class Suggestion:
    """A number, where it comes from, and whether it is used outside the range it was fitted on."""

    value: float
    source: str
    extrapolated: bool


def step_law_lr(parameters: int, tokens: int) -> Suggestion:
    """Peak learning rate of AdamW: 1.79 N^-0.713 D^0.307 (Step Law, Li et al. 2025, arXiv 2503.04715).

    `parameters` N without embeddings, `tokens` D. Fitted on N 60M to 1B and D 2B to 100B tokens.
    """
    value = 1.79 * parameters**-0.713 * tokens**0.307
    return Suggestion(min(value, 1e-2), "Step Law, arXiv 2503.04715", _outside_step_law(parameters, tokens))


def step_law_batch(parameters: int, tokens: int) -> Suggestion:
    """Tokens in a global batch: 0.58 D^0.571 (Step Law, arXiv 2503.04715); N decides only whether it is known."""
    value = 0.58 * tokens**0.571
    return Suggestion(value, "Step Law, arXiv 2503.04715", _outside_step_law(parameters, tokens))


def _outside_step_law(parameters: int, tokens: int) -> bool:
    return not (60e6 <= parameters <= 1.1e9 and 2e9 <= tokens <= 100e9)


def deepseek_lr(compute: float) -> Suggestion:
    """Peak learning rate 0.3118 C^-0.125 (DeepSeek LLM, arXiv 2401.02954); C in FLOPs, fitted on 1e17 to 2e19."""
    return Suggestion(0.3118 * compute**-0.125, "DeepSeek LLM, arXiv 2401.02954", _outside_deepseek(compute))


def deepseek_batch(compute: float) -> Suggestion:
    """Tokens in a global batch: 0.2920 C^0.3271 (DeepSeek LLM, arXiv 2401.02954); C in FLOPs."""
    return Suggestion(0.2920 * compute**0.3271, "DeepSeek LLM, arXiv 2401.02954", _outside_deepseek(compute))


def _outside_deepseek(compute: float) -> bool:
    return not 1e17 <= compute <= 2e19


def kaplan_lr(parameters: int) -> Suggestion | None:
    """Peak learning rate 0.003239 - 0.0001395 ln N (Kaplan et al. 2020, arXiv 2001.08361, appendix D.6).

    `parameters` N without embeddings; fitted on 768 to 1.5B. None from 12B on, where it falls below 0.
    """
    value = 0.003239 - 0.0001395 * math.log(parameters)
    if value <= 0:
        return None
    return Suggestion(value, "Kaplan, arXiv 2001.08361", not 768 <= parameters <= 1.5e9)


def chinchilla_tokens(parameters: int) -> Suggestion:
    """Compute-optimal training tokens, about 20 a parameter (Hoffmann et al. 2022; refit arXiv 2404.10102)."""
    inside = 4e7 <= parameters <= 1.6e10
    return Suggestion(20.0 * parameters, "Chinchilla, about 20 tokens a parameter", not inside)


def peak_learning_rate(config: Config, tokens: int) -> Suggestion:
    """`optim.lr`, or the Step Law for this model and this many training tokens."""
    if config.optim.lr is not None:
        return Suggestion(config.optim.lr, "from optim.lr", False)
    return step_law_lr(non_embedding_parameters(config.model), tokens)


@dataclass(frozen=True)
class LossLaw:
    """Loss in nats a token of N parameters trained on D tokens: E + A / N^alpha + B / D^beta; compute is 6 N D FLOPs.

    Approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556). Its constants hold for that paper's text and tokenizer:
    compare two losses of it, do not expect the number itself on other data.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats a token."""
        return float(self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta)

    def best(self, compute: float) -> tuple[float, float]:
        """(parameters, tokens) of the least loss for `compute` FLOPs."""
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        parameters = G * (compute / 6) ** (self.beta / (self.alpha + self.beta))
        return parameters, compute / 6 / parameters

    def best_loss(self, compute: float) -> float:
        """The least loss for `compute` FLOPs."""
        return self.loss(*self.best(compute))

    def compute_for(self, loss: float) -> float:
        """Least FLOPs that reach this loss; infinite at E or below, which no model and data do."""
        if loss <= self.E:
            return math.inf
        # Along the optimum both terms fall with compute^-(alpha beta / (alpha + beta)).
        power = self.alpha * self.beta / (self.alpha + self.beta)
        return float(((self.best_loss(1.0) - self.E) / (loss - self.E)) ** (1 / power))

    def tokens_for(self, parameters: float) -> float:
        """Tokens with which a model of this size is the best one for its compute."""
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        return float((parameters / G) ** ((self.alpha + self.beta) / self.beta) / parameters)


CHINCHILLA = LossLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
"""As refitted by Besiroglu et al. 2024 (arXiv 2404.10102) on 240 runs of 44M to 16B parameters, 6e18 to 3e21 FLOPs;
the constants first published do not fit the paper's own data."""


@dataclass(frozen=True)
class Allocation:
    """A model size and an amount of data against the best for the same compute, by the refitted Chinchilla law."""

    parameters: int
    tokens: float
    compute: float
    """6 N D, FLOPs."""
    best_parameters: float
    best_tokens: float
    """Of the least loss for the same compute."""
    loss: float
    best_loss: float
    """Nats a token."""
    extra_compute: float
    """Share of the compute that the best size would have saved for the same loss: the price of a model that is
    smaller, and cheaper to use, than the best (or of one that is larger)."""
    extrapolated: bool


def allocation(parameters: int, tokens: float) -> Allocation:
    """Judge `parameters` (embeddings included, as in the paper) trained on `tokens`."""
    compute = 6.0 * parameters * tokens
    loss = CHINCHILLA.loss(parameters, tokens)
    best_parameters, best_tokens = CHINCHILLA.best(compute)
    return Allocation(
        parameters=parameters,
        tokens=tokens,
        compute=compute,
        best_parameters=best_parameters,
        best_tokens=best_tokens,
        loss=loss,
        best_loss=CHINCHILLA.best_loss(compute),
        extra_compute=1 - CHINCHILLA.compute_for(loss) / compute,
        extrapolated=not (4.4e7 <= parameters <= 1.6e10 and 6e18 <= compute <= 3e21),
    )


def learning_rates(parameters: int, tokens: int) -> list[Suggestion]:
    """The published rules beside each other, the one that bigtrain uses first; N without embeddings.

    On the Step Law's own grid of runs (N 0.2 to 1.07B) its choice lost 0.10 % of loss on average against the best
    one found, DeepSeek's 0.76 %, Kaplan's with the Step Law's batch 1.21 %.
    """
    rules = (
        step_law_lr(parameters, tokens),
        deepseek_lr(6.0 * parameters * tokens),
        kaplan_lr(parameters),
    )
    return [found for found in rules if found is not None]


def batch_sizes(parameters: int, tokens: int) -> list[Suggestion]:
    """Tokens in a global batch by the published rules, the one that bigtrain uses first; N without embeddings."""
    return [step_law_batch(parameters, tokens), deepseek_batch(6.0 * parameters * tokens)]
