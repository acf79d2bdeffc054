"""How XLA says that something does not fit into a device's memory."""


def is_out_of_memory(error: Exception) -> bool:
  """Whether a jax.errors.JaxRuntimeError says so. It has a text and no code.

  >>> is_out_of_memory(RuntimeError('RESOURCE_EXHAUSTED: Attempting to allocate 20.0G'))
  True
  """
  return 'RESOURCE_EXHAUSTED' in str(error)
