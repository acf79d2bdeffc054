"""Links and JSON of directories that come from anyone."""

import os

import pytest
from etils import epath

from dpo_flax.files import untrusted
from dpo_flax.files.untrusted import find_file, parse_json, read_json

REVISION, CONTENT = '5f' * 20, 'a0' * 32


@pytest.fixture
def home(tmp_path):
  """A directory beside a file that it must not lead to."""
  (tmp_path / 'secret.json').write_text('{}')
  (tmp_path / 'model').mkdir()
  (tmp_path / 'model' / 'own.json').write_text('{}')
  return epath.Path(tmp_path / 'model')


@pytest.mark.parametrize('target', ['../secret.json', '{}/secret.json', 'further', '../folder/x'])
def test_link_out_of_the_directory_is_refused(home, target):
  os.symlink(home.parent, home.parent / 'folder')
  (home.parent / 'x').write_text('')
  os.symlink('../secret.json', home / 'further')
  os.symlink(target.format(home.parent), home / 'config.json')
  with pytest.raises(ValueError, match=r'config\.json is a link to .*, outside its directory'):
    find_file(home, 'config.json')


def test_links_within_a_directory_that_is_itself_a_link_are_followed(home):
  os.symlink('own.json', home / 'config.json')
  os.symlink(home, home.parent / 'alias')
  for directory in (home, home.parent / 'alias'):
    assert find_file(directory, 'config.json').read_text() == '{}'
    assert find_file(directory, 'nothing.json') is None


def test_only_regular_files_are_read(home):
  os.mkfifo(home / 'config.json')
  (home / 'index.json').mkdir()
  os.symlink('loop.json', home / 'loop.json')
  for name in ('config.json', 'index.json'):
    with pytest.raises(ValueError, match=f'{name} is no regular file'):
      find_file(home, name)
  assert find_file(home, 'loop.json') is None


def make_cache(root, *, owner='models--owner--name', blob=CONTENT, folder='blobs'):
  """Returns a snapshot in the hub's layout whose config.json is a link to a blob."""
  repository = root / owner
  snapshot = repository / 'snapshots' / REVISION
  snapshot.mkdir(parents=True)
  (repository / folder).mkdir()
  (repository / folder / blob).write_text('{"a": 1}')
  os.symlink(f'../../{folder}/{blob}', snapshot / 'config.json')
  return epath.Path(snapshot)


def test_hub_cache_may_link_to_its_blobs(tmp_path):
  snapshot = make_cache(tmp_path)
  assert read_json(find_file(snapshot, 'config.json')) == {'a': 1}
  os.symlink('../../blobs/' + 'b' * 40, snapshot / 'missing.json')  # a download that was stopped
  assert find_file(snapshot, 'missing.json') is None


@pytest.mark.parametrize(
  'changes', [{'owner': 'mine'}, {'blob': 'id_rsa'}, {'folder': 'secrets'}], ids=str
)
def test_nothing_but_the_blobs_of_a_hub_cache_is_linked_to(tmp_path, changes):
  with pytest.raises(ValueError, match='outside its directory'):
    find_file(make_cache(tmp_path, **changes), 'config.json')


def test_blobs_that_are_a_link_themselves_are_refused(tmp_path):
  snapshot = make_cache(tmp_path)
  blobs = tmp_path / 'models--owner--name' / 'blobs'
  blobs.rename(tmp_path / 'elsewhere')
  blobs.symlink_to(tmp_path / 'elsewhere')
  with pytest.raises(ValueError, match='outside its directory'):
    find_file(snapshot, 'config.json')


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (b'{"a": 1, "b": {"c": 1, "c": 2}}', r"duplicate \['c'\]"),
    (b'{"\\ud800\\u001b": 1, "\\ud800\\u001b": 2}', r"duplicate \['.ud800.x1b'\]"),
    (b'[]', 'a JSON object is expected, not list'),
    (b'{"a": ' + b'9' * 5000 + b'}', 'not valid JSON'),
    (b'{"a": "\xff"}', 'not valid JSON'),
    (b'{"a": NaN}', 'NaN is no JSON'),
    (b'[' * 100_000, 'not valid JSON'),
    (b'{"a": [' + b'[],' * 999_999 + b'1]}', 'JSON of more than 1000000 values'),
  ],
  ids=['nested', 'unprintable', 'list', 'number', 'utf8', 'nan', 'depth', 'values'],
)
def test_json_that_is_refused(text, message):
  with pytest.raises(ValueError, match=message) as error:
    parse_json(text, epath.Path('x.json'))
  assert str(error.value).startswith('x.json: ')
  assert str(error.value).isprintable()


def test_large_json_is_not_read(tmp_path, monkeypatch):
  monkeypatch.setattr(untrusted, 'MAX_JSON_BYTES', 10)
  path = epath.Path(tmp_path / 'x.json')
  path.write_text('{"a": 1234}')
  with pytest.raises(ValueError, match='11 bytes of JSON, of which at most 10 are read'):
    read_json(path)
