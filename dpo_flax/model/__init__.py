"""The network: a Llama-class transformer with adapters. Knows nothing of preferences."""
