"""Gradients -> weights: ReferenceEngine (plain torch, one process), ZeroEngine (DeepSpeed), one protocol."""

from bigtrain.engine.protocol import Engine, StepResult, build_device, check_engine, engine_name, make_engine

__all__ = ["Engine", "StepResult", "build_device", "check_engine", "engine_name", "make_engine"]
