"""The outside world's files: Hugging Face checkpoints and PEFT adapters."""
