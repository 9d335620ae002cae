"""How often ZeRO 2 and 3 communicate, as planned, beside what the executed code counts."""

from __future__ import annotations

import pytest

from bigtrain.configfile import find_config, load
from bigtrain.plan import messages
from bigtrain.plan.dryrun import dry_run


@pytest.mark.parametrize(("zero", "tensor"), [(2, 1), (3, 1), (3, 2)])
def test_messages_are_those_of_the_executed_code(zero: int, tensor: int) -> None:
    """Within a fifth: hooks, norms and owners that share a bucket are counted roughly."""
    config = load(find_config("llama-1b"), [f"layout.zero={zero}", f"layout.tensor={tensor}"])
    dry = dry_run(config, 8)
    counted = sum(
        calls
        for (axis, kind), (calls, _) in dry.stages[0].traffic.items()
        if axis == "data" and kind in ("reduce", "reduce-scatter", "all-gather")
    )
    replicas = 8 // tensor
    if zero == 2:
        planned = messages.level_2(config.model, tensor, replicas)
    else:
        planned = messages.level_3(config.model, tensor, config.layout.recompute == "full")
    assert planned * dry.microbatches == pytest.approx(counted, rel=0.2)


def test_larger_models_and_more_owners_send_more() -> None:
    small, large = (load(find_config(name), []).model for name in ("llama-1b", "llama-8b"))
    assert messages.level_3(small, 1, True) < messages.level_3(large, 1, True)
    assert messages.level_2(large, 1, 8) < messages.level_2(large, 1, 64)
    assert messages.level_3(large, 1, False) < messages.level_3(large, 1, True)  # entered once less
