"""Kernels run in Triton's interpreter where there is no GPU: tests/conftest.py sets TRITON_INTERPRET first."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="package", autouse=True)
def exact_bf16() -> None:
    from triton import knobs

    if knobs.runtime.interpret:
        from tests.kernels.exact_bf16 import install

        install()
