"""`plan --dry-run`: the real code beside the plan, and the failure when they disagree."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache

import pytest

from bigtrain.cli import main
from bigtrain.configfile import find_config, load
from bigtrain.plan import checked
from bigtrain.plan.checked import checks, checks_json, disagreements, tell_checks
from bigtrain.plan.dryrun import DryRun, dry_run
from bigtrain.plan.estimate import Estimate, estimate
from bigtrain.plan.hardware import cluster_of
from bigtrain.plan.job import job_of
from bigtrain.plan.replay import replay


@cache
def dry() -> DryRun:
    return dry_run(load(find_config("quickstart")), 1)


def planned() -> Estimate:
    config = load(find_config("quickstart"))
    return estimate(config, job_of(config, 1), cluster_of("h100", 1))


def test_what_the_code_held_is_told_beside_the_plan() -> None:
    e = planned()
    found, replayed = checks(e, dry()), replay(dry(), e.job, e.cluster)
    assert not disagreements(found, replayed, e.time)
    text = tell_checks(found, dry(), replayed, e.time)
    assert "the code of 1 rank executed" in text
    assert "lm_head" in text  # the logits are the largest tensors of this toy
    assert f"{found[0].off:+.1%}" in text
    assert re.search(r"replayed +\S+ ms  a step of this work, and \S+ ms planned", text)
    told = checks_json(found, dry(), replayed, e.time)
    assert told["replayed"]["total"] == pytest.approx(sum(told["replayed"]["parts"].values()))
    assert told["stages"][0]["peak"] == sum(told["stages"][0]["by_kind"].values())
    json.dumps(told)


def test_unseen_memory_is_not_compared() -> None:
    """The dry run sees tensors only."""
    e = planned()
    more = replace(e, stages=[replace(s, unseen=s.unseen + 2**34) for s in e.stages])
    assert checks(more, dry()) == checks(e, dry())


def test_a_wrong_plan_is_named() -> None:
    e = planned()
    wrong = replace(e, stages=[replace(s, activations=s.activations + 2**30) for s in e.stages])
    replayed = replay(dry(), e.job, e.cluster)
    (sentence,) = disagreements(checks(wrong, dry()), replayed, e.time)
    assert sentence.startswith("stage 0: ")
    assert "planned" in sentence
    (sentence,) = disagreements(checks(e, dry()), replace(replayed, total=10 * e.time.total), e.time)
    assert re.search(r"a step: .* planned, .* of the executed work \(-90.0%; .* own interval", sentence)
    for factor, wrong in ((1.04, 0), (1.06, 1)):
        off = replace(replayed, total=factor * e.time.total + (0.01 if wrong else 0))
        assert len(disagreements(checks(e, dry()), off, e.time)) == wrong


def test_the_verb_fails_when_they_disagree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bigtrain.plan.dryrun.dry_run", lambda config, ranks: dry())
    command = ["plan", "quickstart", "--gpus", "1", "--dry-run"]
    assert main(command) == 0
    assert "dry run" in capsys.readouterr().out
    monkeypatch.setattr(checked, "SLACK", 0)
    monkeypatch.setattr(checked, "AGREE", 1e-9)
    assert main(command) == 1
    assert "run failed: the plan differs from the executed code" in capsys.readouterr().err
    assert main([*command, "--json"]) == 1
    assert "dry_run" in json.loads(capsys.readouterr().out)
