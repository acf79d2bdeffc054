"""What a run may be told: every field, its checks, and which fields make a run."""

from dpo_flax.config.schema import default as default
from dpo_flax.config.schema import get as get
from dpo_flax.config.schema import identity_of as identity_of
from dpo_flax.config.schema import shared as shared
