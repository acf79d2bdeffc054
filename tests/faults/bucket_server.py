"""An object store on loopback, as far as gcsfs, TensorStore and tensorboardX speak with one.

It serves the objects of one bucket by Google Cloud Storage's JSON API
(cloud.google.com/storage/docs/json_api/v1/objects), in memory; a second bucket denies everything, a
third knows nobody.
"""

import datetime
import http.server
import itertools
import json
import re
import threading
import urllib.parse
from collections.abc import Mapping
from typing import Any

BUCKET, DENIED, UNKNOWN = 'bucket', 'denied', 'unknown'

_OBJECT = re.compile(
  r'(?:/download)?/storage/v1/b/(?P<bucket>[^/]+)/o/(?P<name>[^/]+)'
  r'(?:/(?P<verb>moveTo|rewriteTo/b/[^/]+|copyTo/b/[^/]+)/o/(?P<other>[^/]+))?'
)
_LIST = re.compile(r'/storage/v1/b/(?P<bucket>[^/]+)/o')
_UPLOAD = re.compile(r'/upload/storage/v1/b/(?P<bucket>[^/]+)/o')
_RANGE = re.compile(r'bytes=(\d+)-(\d*)')

_Answer = tuple[int, bytes | dict[str, Any], Mapping[str, str]]  # status, content, headers


class BucketServer:
  """Serves `objects` while it is entered; they may be looked at and damaged meanwhile."""

  def __init__(self):
    self.objects: dict[str, bytes] = {}
    self.generations: dict[str, int] = {}
    self.uploads: dict[str, tuple[str, bytearray]] = {}  # id -> name and what has come of it
    self.lock = threading.RLock()
    self._numbers = itertools.count(1)

  def __enter__(self) -> 'BucketServer':
    handler = type('Handler', (_Handler,), {'bucket': self})
    self._server = _Server(('127.0.0.1', 0), handler)
    threading.Thread(target=self._server.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *_):
    self._server.shutdown()
    self._server.server_close()

  def environment(self) -> Mapping[str, str]:
    """Returns the variables by which the libraries find this server, without credentials."""
    url = f'http://127.0.0.1:{self._server.server_port}'
    return {
      'STORAGE_EMULATOR_HOST': url,
      'TENSORSTORE_GCS_HTTP_URL': url,
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',
      'GOOGLE_CLOUD_PROJECT': 'none',
      'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',  # asks by gRPC what kind a bucket is
    }

  def put(self, name: str, content: bytes):
    """Stores an object under a new generation."""
    with self.lock:
      self.objects[name], self.generations[name] = content, next(self._numbers)

  def remove(self, name: str):
    """Deletes an object."""
    with self.lock:
      del self.objects[name], self.generations[name]

  def resource(self, name: str) -> dict[str, Any]:
    """Returns what the API tells of an object."""
    now = datetime.datetime.now(datetime.UTC).isoformat().replace('+00:00', 'Z')
    return {
      'kind': 'storage#object',
      'bucket': BUCKET,
      'name': name,
      'size': str(len(self.objects[name])),
      'generation': str(self.generations[name]),
      'metageneration': '1',
      'timeCreated': now,
      'updated': now,
    }


class _Server(http.server.ThreadingHTTPServer):
  def handle_error(self, *_):
    """Stays silent: a client that was killed leaves its connections behind."""


class _Handler(http.server.BaseHTTPRequestHandler):
  """One request; the server's lock makes each of them atomic, as the store's are."""

  protocol_version = 'HTTP/1.1'
  wbufsize = -1  # headers and content together: the other side would delay its reply to the first
  bucket: BucketServer

  def log_message(self, *_):
    """Stays silent."""

  def _serve(self):
    url = urllib.parse.urlsplit(self.path)
    self.query = {name: values[0] for name, values in urllib.parse.parse_qs(url.query).items()}
    body = self._body()
    with self.bucket.lock:
      self._answer(*self._route(self.command, url.path, body))

  do_GET = do_POST = do_PUT = do_DELETE = _serve

  def _body(self) -> bytes:
    if self.headers.get('Transfer-Encoding') != 'chunked':
      return self.rfile.read(int(self.headers.get('Content-Length', 0)))
    parts = []
    while size := int(self.rfile.readline(), 16):
      parts.append(self.rfile.read(size))
      self.rfile.readline()
    self.rfile.readline()
    return b''.join(parts)

  def _route(self, method: str, path: str, body: bytes) -> _Answer:
    if path == '/batch/storage/v1':
      return self._batch(body)
    found = _OBJECT.fullmatch(path) or _LIST.fullmatch(path) or _UPLOAD.fullmatch(path)
    if found is None:
      return _error(404, f'{method} {path} is not served here')
    if found['bucket'] != BUCKET:
      return _NO_BUCKETS.get(found['bucket'], _error(404, 'The specified bucket does not exist.'))
    if found.re is _UPLOAD:
      return self._upload(body)
    if found.re is _LIST:
      return 200, self._list(), {}
    return self._of_an_object(method, path, found)

  def _of_an_object(self, method: str, path: str, found: re.Match[str]) -> _Answer:
    name = urllib.parse.unquote(found['name'])
    if name not in self.bucket.objects:
      return _error(404, f'No such object: {BUCKET}/{name}')
    if found['verb']:
      return 200, self._move(name, urllib.parse.unquote(found['other']), found['verb']), {}
    if method == 'DELETE':
      return self._delete(name)
    if path.startswith('/download/') or self.query.get('alt') == 'media':
      return self._read(name)
    return 200, self.bucket.resource(name), {}

  def _refusal(self, name: str) -> _Answer | None:
    """The answer to a request whose condition on the object's generation does not hold."""
    generation = str(self.bucket.generations.get(name, 0))
    if self.query.get('ifGenerationMatch', generation) != generation:
      return _error(412, 'conditionNotMet')
    if self.query.get('ifGenerationNotMatch') == generation:
      return 304, b'', {}
    return None

  def _read(self, name: str) -> _Answer:
    if refusal := self._refusal(name):
      return refusal
    content = self.bucket.objects[name]
    headers = {
      'x-goog-generation': str(self.bucket.generations[name]),
      'x-goog-stored-content-length': str(len(content)),
    }
    wanted = _RANGE.fullmatch(self.headers.get('Range', ''))
    if not wanted:
      return 200, content, headers
    first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
    if first > last:
      return _error(416, 'The requested range cannot be satisfied.')
    headers['Content-Range'] = f'bytes {first}-{last}/{len(content)}'
    return 206, content[first : last + 1], headers

  def _delete(self, name: str) -> _Answer:
    if refusal := self._refusal(name):
      return refusal
    self.bucket.remove(name)
    return 204, b'', {}

  def _move(self, name: str, other: str, verb: str) -> dict[str, Any]:
    self.bucket.put(other, self.bucket.objects[name])
    if verb == 'moveTo':
      self.bucket.remove(name)
      return self.bucket.resource(other)
    return {'done': True, 'resource': self.bucket.resource(other)}

  def _list(self) -> dict[str, Any]:
    prefix, delimiter = self.query.get('prefix', ''), self.query.get('delimiter')
    start, end = self.query.get('startOffset', ''), self.query.get('endOffset')
    items, prefixes = [], set()
    for name in sorted(self.bucket.objects):
      if not name.startswith(prefix) or name < start or (end and name >= end):
        continue
      inside, found, _ = name[len(prefix) :].partition(delimiter or '\n')
      if found:
        prefixes.add(prefix + inside + delimiter)
      else:
        items.append(self.bucket.resource(name))
    return {'kind': 'storage#objects', 'items': items, 'prefixes': sorted(prefixes)}

  def _upload(self, body: bytes) -> _Answer:
    if 'upload_id' in self.query:
      return self._go_on(body)
    name, kind = self.query.get('name'), self.query['uploadType']
    if kind == 'multipart':
      about, body = _parts(body, self.headers['Content-Type'])
      name = json.loads(about)['name']
    elif kind == 'resumable':
      name = name or json.loads(body)['name']
      upload = str(len(self.bucket.uploads))
      self.bucket.uploads[upload] = name, bytearray()
      query = f'uploadType=resumable&upload_id={upload}'
      return (
        200,
        {},
        {'Location': f'http://{self.headers["Host"]}{self.path.split("?")[0]}?{query}'},
      )
    if refusal := self._refusal(name):
      return refusal
    self.bucket.put(name, body)
    return 200, self.bucket.resource(name), {}

  def _go_on(self, body: bytes) -> _Answer:
    name, come = self.bucket.uploads[self.query['upload_id']]
    come += body
    if self.headers.get('Content-Range', '').endswith('/*'):  # its length is not known yet
      return 308, b'', {'Range': f'bytes=0-{len(come) - 1}'}
    self.bucket.put(name, bytes(come))
    return 200, self.bucket.resource(name), {}

  def _batch(self, body: bytes) -> _Answer:
    """Answers several requests in one, as `rm` of many objects sends them."""
    answers = []
    for method, url in re.findall(rb'^(\w+) (\S+) HTTP/1.1', body, re.MULTILINE):
      status, _, _ = self._route(method.decode(), urllib.parse.urlsplit(url.decode()).path, b'')
      answers.append(f'--answer\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} -\r\n')
    content = ''.join(answers) + '--answer--'
    return 200, content.encode(), {'Content-Type': 'multipart/mixed; boundary=answer'}

  def _answer(self, status: int, content: bytes | dict, headers: Mapping[str, str]):
    kind = 'application/octet-stream'
    if isinstance(content, dict):
      content, kind = json.dumps(content).encode(), 'application/json'
    self.send_response(status)
    for name, value in {'Content-Type': kind, **headers}.items():
      self.send_header(name, value)
    self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    self.wfile.write(content)


def _error(status: int, message: str) -> _Answer:
  return status, {'error': {'code': status, 'message': message}}, {}


def _parts(body: bytes, kind: str) -> list[bytes]:
  """Returns the contents of a multipart body, byte for byte."""
  boundary = re.search(r'boundary="?([^";]+)', kind)[1].encode()
  found = []
  for part in body.split(b'--' + boundary)[1:-1]:
    line = b'\r\n' if part.startswith(b'\r\n') else b'\n'
    found.append(part.split(line * 2, 1)[1].removesuffix(line))
  return found


_NO_BUCKETS = {
  DENIED: _error(403, "Permission 'storage.objects.get' denied on resource"),
  UNKNOWN: _error(401, 'Anonymous caller does not have storage.objects.get access'),
}
