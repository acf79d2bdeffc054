"""A file is there whole, under its name and on disk, or as it was before."""

import errno
import hashlib
import os

import pytest
from etils import epath

from dpo_flax.files import atomic
from dpo_flax.files.atomic import sha256_of, write_file

LOCAL = type(epath.Path('.'))
CONTENTS = ['one\nétwo', b'\x00\xff', lambda file: file.write(b'written by a function')]


@pytest.mark.parametrize('content', CONTENTS, ids=['text', 'bytes', 'function'])
@pytest.mark.parametrize('concurrent', [False, True])
def test_a_file_replaces_the_one_before_and_its_digest_is_returned(tmp_path, content, concurrent):
  path = tmp_path / 'file'
  path.write_text('before')
  digest = write_file(path, content, concurrent=concurrent)
  assert digest == hashlib.sha256(path.read_bytes()).hexdigest() == sha256_of(path)
  assert path.read_bytes() != b'before'
  assert os.listdir(tmp_path) == ['file']


def half(file):
  file.write(b'half')
  raise OSError(errno.ENOSPC, 'No space left on device')


def interrupt(_):
  raise KeyboardInterrupt


def fail(*_):
  raise OSError(errno.EIO, 'Input/output error')


@pytest.mark.parametrize('fault', ['write', 'fsync', 'replace', 'interrupt'])
@pytest.mark.parametrize('concurrent', [False, True])
def test_what_fails_leaves_the_old_content_and_nothing_else(
  tmp_path, monkeypatch, fault, concurrent
):
  path = tmp_path / 'file'
  path.write_text('before')
  content = {'write': half, 'interrupt': interrupt}.get(fault, 'after')
  with monkeypatch.context() as broken:
    if fault == 'fsync':
      broken.setattr(os, 'fsync', fail)
    if fault == 'replace':
      broken.setattr(LOCAL, 'replace', fail)
    with pytest.raises((OSError, KeyboardInterrupt)):
      write_file(path, content, concurrent=concurrent)
  assert path.read_text() == 'before'
  assert os.listdir(tmp_path) == ['file']


def test_content_is_on_disk_before_the_name_and_the_name_on_return(tmp_path, monkeypatch):
  path, events = tmp_path / 'file', []
  fsync, replace = os.fsync, LOCAL.replace

  def note_sync(descriptor):
    events.append(os.readlink(f'/proc/self/fd/{descriptor}'))
    fsync(descriptor)

  def note_replace(source, target):
    events.append('renamed')
    return replace(source, target)

  monkeypatch.setattr(os, 'fsync', note_sync)
  monkeypatch.setattr(LOCAL, 'replace', note_replace)
  write_file(path, 'content')
  assert events == [f'{path}.tmp', 'renamed', str(tmp_path)]


def test_a_digest_may_wait_until_the_file_is_on_disk(tmp_path, monkeypatch):
  (tmp_path / 'file').write_bytes(b'x' * 10)
  monkeypatch.setattr(atomic, '_CHUNK', 4)
  synced, fsync = [], os.fsync
  monkeypatch.setattr(os, 'fsync', lambda descriptor: (synced.append(1), fsync(descriptor)))
  expected = hashlib.sha256(b'x' * 10).hexdigest()
  assert sha256_of(tmp_path / 'file') == expected and not synced
  assert sha256_of(tmp_path / 'file', synced=True) == expected and synced


def test_an_object_is_uploaded_only_once_all_of_it_is_known(monkeypatch):
  stored = {}
  kind = type(epath.Path('gs://bucket/file'))
  monkeypatch.setattr(kind, 'write_bytes', lambda path, data: stored.update({str(path): data}))
  with pytest.raises(OSError, match='No space'):
    write_file('gs://bucket/file', half)
  assert not stored
  digest = write_file('gs://bucket/file', 'text')
  assert stored == {'gs://bucket/file': b'text'}
  assert digest == hashlib.sha256(b'text').hexdigest()
