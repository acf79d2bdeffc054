"""Paths on a file system and in an object store; faults/bucket.py trains in one."""

import os
import pathlib

import fsspec
import pytest
from gcsfs.retry import HttpError

from dpo_flax.files.paths import absolute, access_errors, is_link, is_remote


def test_a_path_in_an_object_store_stays_as_it_is(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for path in ('gs://bucket/run', 's3://bucket/run'):
    assert is_remote(path)
    assert os.fspath(absolute(path)) == path
    assert not is_link(path)


def test_what_others_write_to_an_object_store_is_seen():
  assert not fsspec.filesystem(
    'gs', token='anon', finalize_on_close=True
  ).dircache.use_listings_cache


@pytest.mark.parametrize('error', [HttpError(), PermissionError()])
def test_what_the_client_of_an_object_store_raises_is_an_error_of_access(error):
  assert not isinstance(ValueError(), access_errors())
  assert isinstance(error, access_errors())


def test_a_local_path_begins_at_the_root_behind_all_links(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'real').mkdir()
  (tmp_path / 'link').symlink_to('real')
  assert pathlib.Path(absolute('link/run')) == tmp_path.resolve() / 'real' / 'run'
  assert pathlib.Path(absolute('~/run')) == pathlib.Path.home().resolve() / 'run'
  assert is_link(tmp_path / 'link')
  assert not is_link(tmp_path / 'real')
  assert not is_remote('link/run')
