"""Configs for budgets: they load, spend what they may, and follow from the planned speed."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from bigtrain.cli import main
from bigtrain.configfile import find_config, load
from bigtrain.errors import UserError
from bigtrain.grid import world_problems
from bigtrain.plan.estimate import estimate
from bigtrain.plan.flops import non_embedding_parameters, parameters
from bigtrain.plan.hardware import find_gpu
from bigtrain.plan.propose import WIDTHS, Proposal, gpus_for, propose, shape
from bigtrain.plan.scaling import CHINCHILLA, step_law_batch

H100 = find_gpu("h100")


def test_the_ladder_rises_in_shapes_that_tensor_ranks_can_share() -> None:
    models = [shape(width) for width in WIDTHS]
    sizes = [parameters(model) for model in models]
    assert sizes == sorted(sizes)
    assert all(b / a < 2.6 for a, b in itertools.pairwise(sizes))
    for model in models:
        assert model.dim_per_head == 128
        assert model.num_heads % model.num_kv_heads == 0
        assert model.ffn % 64 == 0
    eight = shape(4096)  # Llama 3 8B exactly
    assert parameters(eight) == 8_030_261_248


@pytest.fixture(scope="module")
def proposal() -> Proposal:
    return propose(500, H100)


def test_a_proposal_loads_and_its_dry_run_has_no_problem(
    proposal: Proposal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(proposal.text)
    assert load(file) == proposal.config
    assert not list(world_problems(proposal.config, proposal.cluster.gpus))
    assert main(["train", str(file), "--dry"]) == 0
    assert f"{parameters(proposal.config.model):,}" in capsys.readouterr().out


def test_it_spends_the_budget_at_its_own_planned_speed(proposal: Proposal) -> None:
    e = estimate(proposal.config, proposal.layout.job, proposal.cluster)
    assert e.gpu_hours.point == pytest.approx(500, rel=0.01)
    assert e.surely_fits
    assert e.wall.point < 7 * 86400


def test_size_and_batch_follow_the_laws(proposal: Proposal) -> None:
    config = proposal.config
    count, tokens = parameters(config.model), config.train.tokens or 0
    best, _ = CHINCHILLA.best(6 * count * tokens)
    assert 0.5 < count / best < 2
    assert proposal.loss == CHINCHILLA.loss(count, tokens)
    wanted = step_law_batch(non_embedding_parameters(config.model), tokens).value
    assert 0.6 < (config.train.global_batch_tokens or 0) / wanted < 1.5


def test_neighbouring_shapes_would_reach_a_higher_loss(proposal: Proposal) -> None:
    """The same GPU-hours spent on the next smaller and larger model of the ladder."""
    place = WIDTHS.index(proposal.config.model.width)
    for other in (WIDTHS[place - 1], WIDTHS[place + 1]):
        model = shape(other)
        template = proposal.config.model_copy(
            update={
                "model": model,
                "data": proposal.config.data.model_copy(update={"sequence_length": model.max_length}),
            }
        )
        assert propose(500, H100, gpus=proposal.cluster.gpus, template=template).loss > proposal.loss


def test_given_data_decides_the_size() -> None:
    found = propose(500, H100, tokens=100_000_000_000)
    free = propose(500, H100)
    assert parameters(found.config.model) < parameters(free.config.model)
    assert 0.99e11 < (found.config.train.tokens or 0) <= 1e11


def test_a_given_model_stays() -> None:
    template = load(find_config("qwen3-0.6b"))
    found = propose(200, H100, gpus=8, template=template)
    assert found.config.model == template.model
    assert found.config.data == template.data
    assert found.cluster.gpus == 8
    assert load_text(found) == found.config


def load_text(proposal: Proposal) -> object:
    import tomllib

    from bigtrain.configfile import build

    return build(tomllib.loads(proposal.text))


def test_more_money_buys_a_larger_model() -> None:
    sizes = [parameters(propose(hours, H100).config.model) for hours in (20, 2000, 200_000)]
    assert sizes == sorted(set(sizes))


def test_so_many_gpus_that_it_takes_a_week() -> None:
    assert gpus_for(100, H100) == 1
    assert gpus_for(1000, H100) == 8
    assert gpus_for(5000, H100) == 32
    assert gpus_for(5000, H100) % H100.per_node == 0


@pytest.mark.parametrize(
    ("hours", "gpus", "tokens"),
    [(0.001, None, None), (3, 4096, None), (10, 8, 10**13)],
)
def test_what_buys_nothing_is_said(hours: float, gpus: int | None, tokens: int | None) -> None:
    with pytest.raises(UserError, match="train no model of the ladder") as caught:
        propose(hours, H100, gpus=gpus, tokens=tokens)
    assert "--budget" in str(caught.value)
