"""Paths on a file system and in an object store; faults/bucket.py trains in one."""

import os
import pathlib

import fsspec

from dpo_flax.places import absolute, is_link, is_remote


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


def test_a_local_path_begins_at_the_root_behind_all_links(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'real').mkdir()
  (tmp_path / 'link').symlink_to('real')
  assert pathlib.Path(absolute('link/run')) == tmp_path.resolve() / 'real' / 'run'
  assert pathlib.Path(absolute('~/run')) == pathlib.Path.home().resolve() / 'run'
  assert is_link(tmp_path / 'link')
  assert not is_link(tmp_path / 'real')
  assert not is_remote('link/run')
