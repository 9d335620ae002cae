"""Triton kernels for language models: tensors in, tensors out, nothing of bigtrain imported."""
