"""Other people's formats: Hugging Face directories both ways, torch.distributed.checkpoint inwards."""
