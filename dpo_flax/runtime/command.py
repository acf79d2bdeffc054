"""How every command starts and fails: its flags, its config, one paragraph for a mistake.

A mistake of the user's (a ValueError, a missing file, a flag that does not exist) ends with exit
code 2 and one message; --verbose shows the traceback. A run that was stopped from outside ends with
one of the codes in peers.py: the same command goes on.
"""

import difflib
import functools
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from dpo_flax.config.schema import ROWS
from dpo_flax.files.messages import without_secrets
from dpo_flax.files.paths import access_errors, keep_no_listings
from dpo_flax.runtime import hosts
from dpo_flax.runtime.peers import MISTAKE, PREEMPTED, end
from dpo_flax.runtime.preemption import Preempted

INTERRUPTED = 130  # exit code: 128 + SIGINT, as shells have it
# The text of XLA errors, ValueErrors too, about a collective that another process has left.
_STATUS = re.compile(r'\b(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ')
_MISTAKES = (ValueError, FloatingPointError, ImportError)


@functools.cache
def _define_flags():
  """Defines the flags of all commands: as one starts, so that importing this library has none."""
  flags.DEFINE_bool('verbose', False, "Show libraries' messages, and the traceback of an error.")
  flags.DEFINE_string(
    'coordinator', None, 'host:port where process 0 listens, and on no other address.'
  )
  flags.DEFINE_integer('num_processes', None, 'Processes of the run, all together.')
  flags.DEFINE_integer('process_id', None, 'This one among them, from 0.')
  help_text = 'Seconds until all processes of the run must have come.'
  flags.DEFINE_integer('join_timeout', hosts.JOIN_TIMEOUT, help_text, lower_bound=1)


def run(command: Callable[[ConfigDict], object], *, on_every_host: bool = False):
  """Parses the command line and calls `command` with its config.

  With `on_every_host`, it first joins the same command on the run's other hosts.
  """
  try:
    config = config_flags.DEFINE_config_file('config', help_string='A file of configs/.')
  except flags.Error as error:  # of a --flagfile, which it reads
    _fail(str(error))
  flags.mark_flag_as_required('config')

  def run_config():
    if not isinstance(config.value, ConfigDict):
      raise ValueError(f'--config: get_config() returned {config.value!r}, which is no ConfigDict')
    command(config.value)

  run_flags(run_config, on_every_host=on_every_host)


def required(flag: flags.FlagHolder[str | None]) -> str:
  """Returns a flag's value; ValueError where it has none."""
  if not flag.value:
    raise ValueError(f'--{flag.name} is not set')
  return flag.value


def run_flags(command: Callable[[], object], *, on_every_host: bool = False):
  """Parses the command line and calls a command that has flags of its own and no config."""
  _define_flags()
  keep_no_listings()

  def main(argv: list[str]):
    if len(argv) > 1:
      _fail(f'unexpected arguments: {" ".join(argv[1:])}')
    given = flags.FLAGS
    if not given.verbose:
      _quieten_libraries()
    try:
      if on_every_host:
        hosts.connect(
          given.coordinator, given.num_processes, given.process_id, join_timeout=given.join_timeout
        )
      command()
    except Preempted as stopped:
      _leave(PREEMPTED, f'told to stop (SIGTERM), {stopped}: the same command goes on.')
    except KeyboardInterrupt:
      _leave(INTERRUPTED, 'interrupted (SIGINT)')
    except Exception as error:
      is_mistake = isinstance(error, (*_MISTAKES, *access_errors()))
      if not is_mistake or _STATUS.search(str(error)):
        hosts.peers().wait_for_verdict()  # a collective fails where another process has died
      if not is_mistake:
        hosts.peers().leave(1, f'{type(error).__name__}: {error}')
        raise
      if given.verbose:
        traceback.print_exc()
      _leave(MISTAKE, f'{type(error).__name__}: {error}{_hint(error)}')
    hosts.peers().close()

  app.run(main, flags_parser=_parse)


def _quieten_libraries():
  """Leaves to Orbax, asyncio and gcsfs only what they raise, which `run_flags` reports.

  When Orbax cannot write, it also leaves coroutines and callbacks behind, which print messages of
  their own.
  """

  def is_shown(record):
    library = record.name.partition('.')[0]
    return '/orbax/' not in record.pathname and library not in ('asyncio', 'gcsfs')

  def report(unraisable):
    if 'Event loop is closed' not in str(unraisable.exc_value):
      sys.__unraisablehook__(unraisable)

  logging.set_verbosity(logging.WARNING)
  logging.get_absl_handler().addFilter(is_shown)
  sys.unraisablehook = report
  warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)


def _hint(error: Exception) -> str:
  """Returns what may help, where a library's own message does not."""
  if isinstance(error, ImportError) and 'gcsfs' in str(error):
    return ": pip install 'dpo_flax[gcs]' brings what reads gs:// paths"
  if isinstance(error, OSError) and str(error).startswith('Forbidden'):
    return '. May this account read and write there?'
  return ''


def _leave(code: int, message: str) -> NoReturn:
  message = without_secrets(message)
  hosts.peers().leave(code, message)
  if hosts.peers().count > 1:
    end(message, code)  # without waiting for those that are stuck
  _fail(message, code)


def _parse(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    _fail(_without_traceback(str(error)))
  except (AttributeError, KeyError, TypeError) as error:  # ml_collections: no such field
    _fail(_unknown_field(argv) or f'{_position(error)}{type(error).__name__}: {error}')
  except FileNotFoundError as error:
    _fail(f'--config: {error}')
  except Exception as error:  # whatever a config file raises
    _fail(f'--config: {_position(error)}{type(error).__name__}: {error}')


def _position(error: Exception) -> str:
  """Returns 'file:line: ' of a config file that failed; '' where that is not it."""
  if isinstance(error, SyntaxError):  # whose text has the position
    return ''
  last = traceback.extract_tb(error.__traceback__)[-1]
  is_library = 'site-packages' in last.filename or last.filename == __file__
  return '' if is_library else f'{last.filename}:{last.lineno}: '


def _without_traceback(message: str) -> str:
  """Says in one line what a config file raised, of which ml_collections quotes all."""
  _, quotes, quoted = message.partition('Traceback (most recent call last):')
  if not quotes:
    return message
  file, line = re.findall(r'^  File "(.+)", line (\d+)', quoted, re.MULTILINE)[-1]
  error = re.split(r'\n(?=\S)', quoted.strip())[-1]
  return f'--config: {file}:{line}: {error}'


def _unknown_field(argv: list[str]) -> str | None:
  """Finds the override of a field that the config does not have."""
  for argument in argv:
    match = re.match(r'--(?:no)?config\.([\w.]+)', argument)
    if match and (field := match.group(1)) not in ROWS:
      section = field.rpartition('.')[0]
      beside = [other for other in ROWS if other.rpartition('.')[0] == section]
      near = difflib.get_close_matches(field, ROWS, n=3) or beside
      return f'the config has no field {field}. Did you mean {", ".join(near)}?'
  return None


def _fail(message: str, code: int = MISTAKE) -> NoReturn:
  print(without_secrets(message), file=sys.stderr)
  sys.exit(code)
