"""Event files are written without the whole of tensorboardX, which stays as others know it."""

import subprocess
import sys

WRITE = """
import sys
from etils import epath
from dpo_flax.training.tensorboard import EventFiles

before = dict(sys.modules)
first = EventFiles(epath.Path(sys.argv[1]), purge_step=0)
first.write(1, {'train/dpo_loss': 0.5})
first.close()
assert 'torch' not in sys.modules
assert not [name for name in sys.modules if name.startswith('tensorboardX')]

import tensorboardX.proto.event_pb2
from tensorboardX import SummaryWriter  # by another part of the program, whole
SummaryWriter(sys.argv[1] + '/other').close()
assert tensorboardX.proto.event_pb2.Event(step=1).step == 1
second = EventFiles(epath.Path(sys.argv[1] + '/second'), purge_step=0)
second.write(2, {'train/dpo_loss': 0.25})
second.close()
"""


def test_neither_torch_nor_the_package_is_left_imported(tmp_path):
  command_line = [sys.executable, '-c', WRITE, str(tmp_path / 'first')]
  done = subprocess.run(command_line, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  for directory in (tmp_path / 'first', tmp_path / 'first' / 'second'):
    (file,) = directory.glob('events*')
    assert b'dpo_loss' in file.read_bytes()
