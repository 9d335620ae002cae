"""Rules of thumb from published scaling studies: a first learning rate, how much data."""

from __future__ import annotations

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
    inside = 60e6 <= parameters <= 1.1e9 and 2e9 <= tokens <= 100e9
    return Suggestion(min(value, 1e-2), "Step Law, arXiv 2503.04715", not inside)


def chinchilla_tokens(parameters: int) -> Suggestion:
    """Compute-optimal training tokens, about 20 a parameter (Hoffmann et al. 2022; refit arXiv 2404.10102)."""
    inside = 4e7 <= parameters <= 1.6e10
    return Suggestion(20.0 * parameters, "Chinchilla, about 20 tokens a parameter", not inside)


def peak_learning_rate(config: Config, tokens: int) -> Suggestion:
    """`optim.lr`, or the Step Law for this model and this many training tokens."""
    if config.optim.lr is not None:
        return Suggestion(config.optim.lr, "from optim.lr", False)
    return step_law_lr(non_embedding_parameters(config.model), tokens)
