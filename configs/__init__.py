"""Runs to start from; installed as dpo_flax.configs."""
