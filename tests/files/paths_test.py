"""Paths on a file system and in an object store; faults/bucket.py trains in one."""

import os
import pathlib

import fsspec
import fsspec.config
import pytest
from etils import epath
from etils.epath import backend
from gcsfs.retry import HttpError

from dpo_flax.files.paths import (
  absolute,
  access_errors,
  fresh,
  is_link,
  is_remote,
  keep_no_listings,
)


def test_a_path_in_an_object_store_stays_as_it_is(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for path in ('gs://bucket/run', 's3://bucket/run'):
    assert is_remote(path)
    assert os.fspath(absolute(path)) == path
    assert not is_link(path)


def test_what_others_write_to_an_object_store_is_seen_by_a_command(monkeypatch):
  monkeypatch.setattr(fsspec.config, 'conf', {})
  keep_no_listings()
  assert not fsspec.filesystem(
    'gs', token='anon', finalize_on_close=True
  ).dircache.use_listings_cache


def test_what_others_write_to_an_object_store_is_seen_by_this_library(monkeypatch):
  monkeypatch.setattr(fsspec.config, 'conf', {})
  store = fsspec.filesystem('gs', token='anon', skip_instance_cache=True)
  store.dircache['bucket/run'] = [{'name': 'bucket/run/1'}]
  monkeypatch.setattr(backend.fsspec_backend, 'fs', lambda path: store)
  path = epath.Path('gs://bucket/run')
  assert 'bucket/run' in store.dircache
  assert fresh(path) is path
  assert 'bucket/run' not in store.dircache
  store.dircache['bucket/run'] = [{'name': 'bucket/run/1'}]
  assert 'bucket/run' not in store.dircache
  assert fsspec.filesystem('gs', token='anon').dircache.use_listings_cache  # another's


def test_local_paths_and_stores_without_a_client_have_nothing_to_forget():
  for path in ('run', '/run', 's3://bucket/run'):
    assert fresh(epath.Path(path)) == epath.Path(path)


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
