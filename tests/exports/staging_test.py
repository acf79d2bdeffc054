"""What exports replace, and what they leave alone."""

import os

import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from dpo_flax.exports.staging import check_replaceable, check_writable, new_directory
from dpo_flax.huggingface.tensor_files import write_tensors


def write_export(directory, value=0.0):
  """Writes an export of one number."""
  with new_directory(directory) as staging:
    array = np.array([value], np.float32)
    write_tensors(staging / 'model.safetensors', {'a': (array.dtype, array.shape)}, [array])
    (staging / 'README.md').write_text('a card')
    (staging / 'config.json').write_text('{}')


def exported(directory):
  return float(safetensors.numpy.load_file(directory / 'model.safetensors')['a'][0])


def test_export_replaces_an_earlier_one_and_leaves_nothing_beside_it(tmp_path):
  for value in (1.0, 2.0):
    write_export(tmp_path / 'out', value)
    assert exported(tmp_path / 'out') == value
  assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_failed_export_leaves_the_earlier_one_and_nothing_else(tmp_path):
  write_export(tmp_path / 'out', 1.0)
  with pytest.raises(OSError, match='disk full'), new_directory(tmp_path / 'out') as staging:
    (staging / 'half').write_text('')
    raise OSError('disk full')
  assert exported(tmp_path / 'out') == 1.0
  assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_leftovers_of_a_killed_export_are_in_nobodys_way(tmp_path):
  for name in ('.out.new', '.out.old'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'model.safetensors').write_text('half a file')
  write_export(tmp_path / 'out')
  assert [path.name for path in tmp_path.iterdir()] == ['out']


def write_foreign(directory):
  directory.mkdir()
  safetensors.numpy.save_file({'a': np.zeros(1)}, directory / 'model.safetensors')


def write_home(directory):
  directory.mkdir()
  (directory / 'thesis.txt').write_text('years of work')


def write_configs(directory):
  directory.mkdir()
  (directory / 'settings.json').write_text('{}')


def write_extended_export(directory):
  write_export(directory)
  (directory / 'notes.txt').write_text('of the evaluation')


def write_damaged(directory):
  write_export(directory)
  (directory / 'model.safetensors').write_bytes(b'12345678')


@pytest.mark.parametrize(
  'write', [write_foreign, write_home, write_configs, write_extended_export, write_damaged]
)
def test_what_no_export_wrote_is_never_replaced(tmp_path, write):
  out = tmp_path / 'out'
  write(out)
  before = {path: path.read_bytes() for path in out.iterdir()}
  with pytest.raises(ValueError, match=r'out (holds|exists).*choose another'), new_directory(out):
    pass
  assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_file_in_the_way_is_refused_and_an_empty_directory_is_not(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='no directory'):
    check_replaceable(tmp_path / 'file')
  (tmp_path / 'empty').mkdir()
  write_export(tmp_path / 'empty', 3.0)
  assert exported(tmp_path / 'empty') == 3.0


def test_a_place_that_cannot_be_written_is_known_beforehand(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match=r'file/out cannot be written: .*Not a directory'):
    check_writable(tmp_path / 'file' / 'out')
  leftover = tmp_path / '.out.new'
  check_writable(tmp_path / 'out')
  assert not leftover.exists()
  leftover.mkdir()
  check_writable(tmp_path / 'out')
  assert leftover.exists()


def test_a_mount_point_is_no_place(tmp_path, monkeypatch):
  monkeypatch.setattr(os.path, 'ismount', lambda path: str(path) == f'{tmp_path}/out')
  with pytest.raises(ValueError, match=r'out is a mount point'):
    check_writable(tmp_path / 'out')


@pytest.mark.parametrize('place', ['.out.new', '.out.old'])
def test_what_lies_where_exports_are_made_is_kept(tmp_path, place):
  (tmp_path / place).mkdir()
  (tmp_path / place / 'thesis.txt').write_text('years of work')
  with pytest.raises(ValueError, match=rf'{place} holds thesis\.txt'):
    check_writable(tmp_path / 'out')
  with pytest.raises(ValueError, match=rf'{place} holds thesis\.txt'):
    write_export(tmp_path / 'out', 1.0)
  assert (tmp_path / place / 'thesis.txt').read_text() == 'years of work'


def test_link_to_an_export_stays_a_link(tmp_path):
  (tmp_path / 'disk').mkdir()
  write_export(tmp_path / 'disk' / 'out', 1.0)
  os.symlink('disk/out', tmp_path / 'link')
  write_export(epath.Path(tmp_path / 'link'), 2.0)
  assert (tmp_path / 'link').is_symlink()
  assert exported(tmp_path / 'disk' / 'out') == 2.0
