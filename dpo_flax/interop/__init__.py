"""The outside world's weight formats: Hugging Face checkpoints and PEFT adapters."""
