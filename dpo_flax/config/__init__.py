"""The fields of a run: every field, its checks, and which fields make a run."""

from dpo_flax.config.checks import validate as validate
from dpo_flax.config.identity import identity_of as identity_of
from dpo_flax.config.identity import shared as shared
from dpo_flax.config.schema import Settings as Settings
from dpo_flax.config.schema import default as default
from dpo_flax.config.schema import get as get
