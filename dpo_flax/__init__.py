"""Align Llama-class language models to human preferences with DPO over LoRA adapters."""
