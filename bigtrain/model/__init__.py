"""Single-device PyTorch models. Nothing here knows of ranks, DeepSpeed or a kernel's hardware."""
