"""Changes to configs that tests make."""

from ml_collections import ConfigDict


def set_field(settings: ConfigDict, field: str, value):
  """Sets a dotted field of a config to a value of any type."""
  *sections, name = field.split('.')
  for section in sections:
    settings = settings[section]
  with settings.ignore_type():
    settings[name] = value
