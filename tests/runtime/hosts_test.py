"""Whom a process joins; multihost_test.py joins real ones."""

import pathlib
import types

import jax
import pytest

from dpo_flax.runtime import hosts


@pytest.fixture
def joined(monkeypatch):
  """The arguments of each call that would have joined other processes."""
  calls = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *args, **kw: calls.append((args, kw)))
  monkeypatch.setattr(hosts, '_peers', hosts.Peers())
  return calls


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'num_processes': 2}, 'also needs --coordinator, --process_id'),
    ({'process_id': 0}, 'also needs --coordinator, --num_processes'),
    ({'coordinator': 'a:1', 'num_processes': 2, 'process_id': 2}, 'it is one of 0 ... 1'),
    ({'coordinator': 'a', 'num_processes': 2, 'process_id': 0}, 'expected host:port'),
    ({'coordinator': 'a:', 'num_processes': 2, 'process_id': 0}, 'expected host:port'),
  ],
)
def test_incomplete_flags_are_refused(joined, given, message):
  with pytest.raises(ValueError, match=message):
    hosts.connect(**given)
  assert not joined


def test_a_run_that_is_told_nothing_joins_nobody(joined):
  hosts.connect()
  assert not joined


def test_the_coordinator_listens_on_its_given_address_alone(joined):
  hosts.connect('10.0.0.1:8476', 2, 1)
  [(args, kwargs)] = joined
  assert args == ('10.0.0.1:8476', 2, 1)
  assert kwargs['coordinator_bind_address'] == '10.0.0.1:8476'


def test_what_fails_on_the_first_process_fails():
  assert hosts.first_does(lambda: None) is None
  with pytest.raises(FileNotFoundError):
    hosts.first_does(lambda: pathlib.Path('nowhere').read_text())


@pytest.mark.parametrize(
  ('environment', 'platforms', 'joins'),
  [
    ({'TPU_ML_PLATFORM': 'JAX'}, 'tpu,cpu', True),
    ({'TPU_ML_PLATFORM': 'JAX'}, None, True),
    ({'TPU_ML_PLATFORM': 'JAX'}, 'cpu', False),
    ({'TPU_ML_PLATFORM': 'JAX', 'TPU_SKIP_MDS_QUERY': '1'}, None, False),
    (
      {'TPU_ML_PLATFORM': 'JAX', 'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'a,b'},
      None,
      True,
    ),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, None, False),
  ],
)
def test_cloud_tpu_workers_find_each_other(monkeypatch, joined, environment, platforms, joins):
  for name in ('TPU_ML_PLATFORM', 'TPU_SKIP_MDS_QUERY', 'TPU_WORKER_HOSTNAMES'):
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(hosts, '_own_address', lambda: '10.0.0.7')
  config = types.SimpleNamespace(jax_platforms=platforms, update=lambda *_: None)
  monkeypatch.setattr(
    hosts, 'jax', types.SimpleNamespace(config=config, distributed=jax.distributed)
  )
  hosts.connect()
  addresses = [kwargs['coordinator_bind_address'] for _, kwargs in joined]
  assert addresses == (['10.0.0.7:8482'] if joins else [])
