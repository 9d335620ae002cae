"""Gradients -> weights: ReferenceEngine (plain torch, one process), ZeroEngine (DeepSpeed), one protocol."""

from bigtrain.engine.protocol import Engine, StepResult, engine_name, make_engine

__all__ = ["Engine", "StepResult", "engine_name", "make_engine"]
