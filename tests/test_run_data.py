"""From [data] to samples: what is refused, limits, and what a run that goes on may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bigtrain.config import Config
from bigtrain.configfile import build, render
from bigtrain.data.blend import quotas
from bigtrain.errors import UserError
from bigtrain.run_data import check_limits, differences, facts, held_out_samples, samples_of, shares
from tests.data_parts import random_documents, small_tokenizer, write_corpus

MODEL = {"vocab_size": 512, "layers": 1, "width": 8, "heads": 1, "max_length": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for seed, (name, count) in enumerate({"web": 300, "code": 90, "books": 40}.items()):
        write_corpus(folder / name, random_documents(count, 40, seed))
    return folder


def config(folder: Path, names: str = "web code books", **data: Any) -> Config:
    sources = {name: {"path": str(folder / name)} for name in names.split()}
    for name, changes in data.pop("of", {}).items():
        sources[name] |= changes
    raw = {"sequence_length": 16, "sources": sources, **data}
    return build({"name": "t", "model": MODEL, "data": raw, "train": {"steps": 10, "global_batch": 8}})


def test_weights_stages_and_lengths_become_quotas(folder: Path) -> None:
    made = samples_of(
        config(
            folder,
            of={"web": {"weight": 2.0}, "books": {"weight": 0.0}},
            stages={
                "late": {"sample": 3000, "sequence_length": 32},
                "books": {"sample": 1000, "weights": {"books": 1.0, "web": 3.0}},
            },
        )
    )
    assert made.names == ("web", "code", "books")
    assert [(s.start, s.quotas) for s in made.blend.stages] == [
        (0, quotas([2, 1, 0])),
        (1000, quotas([3, 0, 1])),
        (3000, quotas([3, 0, 1])),
    ]
    assert made.lengths == (16, 16, 32)


def test_a_config_with_sources_is_written_and_read_again(folder: Path) -> None:
    import tomllib

    given = config(
        folder, skip=[[3, 4]], stages={"a b": {"sample": 8, "weights": {"web": 1.0, "code": 0.25}}}
    )
    assert build(tomllib.loads(render(given))) == given


def test_every_problem_of_the_section_at_once(folder: Path) -> None:
    with pytest.raises(UserError) as e:
        config(
            folder,
            path="x",
            skip=[[5, 4], [1]],
            stages={
                "a": {"sample": 5, "weights": {"webb": 1.0}},
                "b": {"sample": 5},
                "c": {"sample": 6, "weights": {"web": 0.0, "code": -1.0}, "sequence_length": 128},
            },
            packing="best_fit",
            document_mask=False,
        )
    for text in (
        "exactly one of path and sources",
        "no source 'webb'; there are web, code, books",
        "stage a begins at 5 too",
        "b: changes neither",
        "code has -1.0",
        "[5, 4] is no range",
        "[1] is no range",
        "needs document_mask",
        "128 is longer than model.max_length 64",
    ):
        assert text in str(e.value), text
    with pytest.raises(
        UserError, match=r"unknown key data.sources.web.wieght; did you mean data.sources.web.weight"
    ):
        config(folder, of={"web": {"wieght": 1.0}})
    with pytest.raises(UserError, match="must be above 0"):
        config(folder, of={name: {"weight": 0.0} for name in ("web", "code", "books")})


def test_sources_of_different_tokenizers_are_refused(folder: Path, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", random_documents(20, 40))
    (other / "tokenizer.model").write_bytes(small_tokenizer("unigram").model)
    with pytest.raises(UserError, match="tokenizer"):
        samples_of(config(folder, of={"code": {"path": str(other)}}))
    plain = folder / "web" / "train-00000"  # as a Megatron corpus
    unigram = {"path": str(plain), "tokenizer": str(small_tokenizer("unigram").path)}
    with pytest.raises(UserError, match=r"(?s)source code is tokenized by another model.*--tokenizer"):
        samples_of(config(folder, of={"code": unigram}))
    same = {"path": str(plain), "tokenizer": str(small_tokenizer().path)}
    assert len(samples_of(config(folder, of={"code": same})).corpora) == 3


def test_absurd_weights_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="differ by more than"):
        samples_of(config(folder, of={"web": {"weight": 1e-12}}))


def test_a_source_that_would_be_read_too_often_is_refused_or_gives_way(folder: Path) -> None:
    limited = config(folder, of={"books": {"max_epochs": 1.5}, "code": {"max_epochs": 4.0}})
    samples = samples_of(limited)
    number = samples.epoch(2, 0)
    check_limits(limited, samples, int(number * 1.4 * 3))
    with pytest.raises(UserError, match=r"books would be read .* times, its max_epochs is 1.5"):
        check_limits(limited, samples, 10 * number)
    gives = config(
        folder, of={"books": {"max_epochs": 1.5}, "code": {"max_epochs": 4.0}}, at_limit="reweight"
    )
    samples = samples_of(gives)
    check_limits(gives, samples, 10**6)
    assert samples.epochs(10**6)[1:] == pytest.approx([4.0, 1.5], abs=1 / number)
    assert samples.blend.stages[-1].quotas == quotas([1, 0, 0])
    assert "books 1.50 times" in shares(samples, 0, 10**6)
    of = {name: {"max_epochs": 2.0} for name in ("web", "code", "books")}
    ends = config(folder, of=of, at_limit="reweight")
    samples = samples_of(ends)
    assert samples.end == 2 * sum(samples.epoch(i, 0) for i in range(3))
    check_limits(ends, samples, samples.end - 1)
    with pytest.raises(UserError, match="all sources have reached their max_epochs"):
        check_limits(ends, samples, samples.end)


def test_held_out_text_of_those_that_have_some(folder: Path, tmp_path: Path) -> None:
    assert held_out_samples(config(folder)) is None
    write_corpus(tmp_path / "both", random_documents(20, 40), split="validation")
    with_text = config(folder, of={"books": {"path": str(tmp_path / "both"), "weight": 0.0}})
    made = held_out_samples(with_text)
    assert made is not None
    assert made.names == ("books",)
    plain = config(
        folder,
        of={"web": {"path": str(folder / "web/train-00000"), "tokenizer": str(small_tokenizer().path)}},
    )
    assert held_out_samples(plain) is None, "a Megatron corpus has no other split"


def test_what_a_run_that_goes_on_may_change(folder: Path) -> None:
    def order(names: str = "web code", **data: Any) -> dict[str, Any]:
        made = config(folder, names, **data)
        return facts(made, samples_of(made))

    base = order(stages={"a": {"sample": 100, "weights": {"web": 1.0}}}, skip=[[10, 20]])
    grown = order(
        "web code books",
        of={"books": {"weight": 0.0}},
        stages={
            "a": {"sample": 100, "weights": {"web": 1.0}},
            "b": {"sample": 200, "weights": {"web": 1.0, "books": 1.0}},
        },
        skip=[[10, 20], [180, 190]],
    )
    assert differences(base, grown, 150, 161) == []
    assert differences(base, base, 150, 161) == []
    assert "data.skip" in differences(base, grown, 174, 185)[0]
    assert "data.stages before sample 211" in differences(base, grown, 200, 211)[0]
    assert "append new ones only" in differences(grown, base, 150, 161)[0]
    swapped = differences(base, order("code web"), 150, 161)
    assert len(swapped) == 1, "the first source is the data of the run"
    assert swapped[0].startswith("data:")
    weights = differences(base, order(of={"web": {"weight": 3.0}}, skip=[[10, 20]]), 150, 161)
    assert weights[0].startswith("data.stages before")
    assert differences(base, order(of={"web": {"weight": 3.0}}), 0, 0) == [], "nothing has been read"
    old = {key: base[key] for key in ("data", "seed", "sequence_length")}
    assert differences(old, grown, 150, 161) == [], "a checkpoint of before there were blends"
