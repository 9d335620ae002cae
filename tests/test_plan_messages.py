"""How often ZeRO 2 and 3 communicate, as planned, beside what the executed code counts."""

from __future__ import annotations

import pytest

from bigtrain.configfile import find_config, load
from bigtrain.plan import messages
from bigtrain.plan.dryrun import dry_run


@pytest.mark.parametrize(
    ("name", "zero", "tensor"),
    [("llama-1b", 2, 1), ("llama-1b", 3, 1), ("llama-1b", 3, 2), ("gpt2-124m", 3, 1)],
)
def test_messages_are_those_of_the_executed_code(name: str, zero: int, tensor: int) -> None:
    """Level 2 within a fifth: owners that share a bucket are counted roughly. Level 3 within a seventh."""
    config = load(find_config(name), [f"layout.zero={zero}", f"layout.tensor={tensor}"])
    dry = dry_run(config, 8)
    counted = sum(
        calls
        for (axis, kind), (calls, _) in dry.stages[0].traffic.items()
        if axis == "data" and kind in ("reduce", "reduce-scatter", "all-gather")
    )
    replicas, n = 8 // tensor, dry.microbatches
    if zero == 2:
        planned = n * messages.level_2(config.model, tensor, replicas)
    else:
        again = config.layout.recompute == "full"
        planned = n * messages.level_3(config.model, tensor, again) + messages.small(config.model)
    assert planned == pytest.approx(counted, rel=0.2 if zero == 2 else 0.15)


def test_larger_models_and_more_owners_send_more() -> None:
    small, large = (load(find_config(name), []).model for name in ("llama-1b", "llama-8b"))
    assert messages.level_3(small, 1, True) < messages.level_3(large, 1, True)
    assert messages.level_2(large, 1, 8) < messages.level_2(large, 1, 64)
    assert messages.level_3(large, 1, False) < messages.level_3(large, 1, True)  # entered once less
