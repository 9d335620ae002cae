"""What only a GPU can show: the same weights and the same curve on CUDA as on the CPU."""

from __future__ import annotations

import pytest
import torch

from bigtrain.engine import make_engine
from bigtrain.engine.protocol import StepResult
from bigtrain.mesh import Mesh
from bigtrain.model.batch import Batch
from bigtrain.model.build import build_model
from bigtrain.place import Place
from tests.test_config import small

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def batches() -> list[Batch]:
    """Two microbatches of two packed rows."""
    made = torch.Generator().manual_seed(3)
    result = []
    for first in (0, 2):
        tokens = torch.randint(0, 64, (2, 17), generator=made)
        edges = torch.tensor([0, 5, 16, 25, 32], dtype=torch.int32)
        result.append(Batch(tokens[:, :-1], tokens[:, 1:].clone(), edges, torch.arange(first, first + 2)))
    return result


def curve(device: torch.device, precision: str) -> list[StepResult]:
    config = small(train={"precision": precision}, model={"kv_heads": 2, "qk_norm": True})
    model = build_model(config.model, config.loss, device=device, seed=1)
    engine = make_engine(model, config, Mesh(Place(0, 1, 0, 1, "single"), device, None))
    return [engine.train_step(batches(), 64, 1e-3) for _ in range(10)]


def test_initial_weights_are_the_same_bits() -> None:
    config = small()
    models = [build_model(config.model, device=device, seed=1) for device in (CPU, GPU)]
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b.cpu())


# fp32 sums in another order: 1e-5 as between layouts. bf16 rounds at 2^-8 in every layer.
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 2**-8)])
def test_the_curve_on_cuda_is_the_curve_on_the_cpu(precision: str, bound: float) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    for ours, reference in zip(curve(GPU, precision), curve(CPU, "fp32"), strict=True):
        assert ours.loss == pytest.approx(reference.loss, rel=bound)
