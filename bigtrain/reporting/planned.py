"""What the planner says of a run on GPUs that it knows: beside what was measured, and as pictures in the page."""

from __future__ import annotations

import base64
import logging
import tempfile
from html import escape
from pathlib import Path

from bigtrain.configfile import load
from bigtrain.errors import UserError
from bigtrain.metrics import read_records
from bigtrain.reporting.watched import Watched

_log = logging.getLogger(__name__)
_TITLES = {
    "memory": "Memory of each pipeline stage by kind",
    "timeline": "The pipeline's schedule",
    "scaling": "Speed over the number of GPUs",
}


def planned(run: Watched) -> str:
    """HTML: measured against planned, and the pictures of `bigtrain plan --pictures`; "" where there is no plan.

    That is of a run on CPUs or on unknown cards, and of an LSTM.
    """
    from bigtrain.plan.comparison import cluster_of_run, compare
    from bigtrain.plan.estimate import estimate
    from bigtrain.plan.job import job_of
    from bigtrain.plan.pictures import draw_all

    try:
        config = load(run.path / "config.toml")
        cluster = cluster_of_run(run.path)
        if config.model.kind == "lstm":
            return ""
        plan = estimate(config, job_of(config, cluster.gpus), cluster)
        found = compare(config, cluster, read_records(run.path / "metrics.jsonl"))
        with tempfile.TemporaryDirectory() as folder:
            drawn = "".join(_image(path) for path in draw_all(plan, Path(folder)))
    except (UserError, OSError) as e:
        _log.info("no plan in the report: %s", e)
        return ""
    text = f"<pre>{escape(str(found))}</pre>" if found is not None else ""
    return text + drawn


def _image(path: Path) -> str:
    title = _TITLES[path.stem]
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure class="plan"><figcaption>{title}</figcaption>'
        f'<img alt="{title}" src="data:image/png;base64,{data}"></figure>'
    )
