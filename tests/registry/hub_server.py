"""A stand-in for the Hugging Face Hub on loopback: the requests by which its own client uploads and downloads.

It keeps every commit, takes weights by the large file protocol and all else in the commit, as the hub does, and
refuses who has no token, a commit upon another than the newest, and a tag that is taken.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_test"


class Repo:
    def __init__(self, private):
        self.private = private
        self.commits = []  # {name: bytes}, the oldest first
        self.tags = {}
        self.messages = []
        self.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")

    def commit(self, files, message):
        self.commits.append(files)
        self.messages.append(message)

    @property
    def oids(self):
        return [hashlib.sha1(str(n).encode()).hexdigest() for n in range(len(self.commits))]

    def at(self, revision):
        oid = {"main": self.oids[-1], **self.tags}.get(revision, revision)
        return oid, self.commits[self.oids.index(oid)]


class Hub:
    def __init__(self):
        self.repos = {}
        self.large = {}  # sha256 -> bytes
        self.refuse = lambda method, path: False
        self.url = ""


@contextmanager
def running_hub():
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = hub
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, value=None, code=200, data=None, **headers):
        data = json.dumps(value).encode() if data is None else data
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def serve(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, hub = unquote(urlsplit(self.path).path), self.server.hub
        if hub.refuse(self.command, path):
            return self.answer({"error": "out of order"}, 418)
        if self.command == "PUT":  # to an address that holds its own permission
            digest = path.split("/")[-1]
            assert hashlib.sha256(body).hexdigest() == digest
            hub.large[digest] = body
            return self.answer({})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        for pattern, act in ROUTES:
            if match := re.fullmatch(pattern, path):
                return act(self, body, *match.groups())
        return self.answer({"error": f"unknown: {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = serve


def _create(handler, body):
    asked = json.loads(body)
    name = f"{asked['organization']}/{asked['name']}"
    hub = handler.server.hub
    code = 409 if name in hub.repos else 200
    hub.repos.setdefault(name, Repo(asked.get("private") or asked.get("visibility") == "private"))
    handler.answer({"url": f"{hub.url}/{name}"}, code)


def _refs(handler, body, name):
    repo = handler.server.hub.repos[name]
    main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.oids[-1]}
    tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": oid} for tag, oid in repo.tags.items()]
    handler.answer({"branches": [main], "tags": tags, "converts": []})


def _tree(handler, body, name, revision):
    _, files = handler.server.hub.repos[name].at(revision)
    handler.answer([{"type": "file", "path": path, "size": len(data), "oid": "0"} for path, data in files.items()])


def _yaml(handler, body):
    front = json.loads(body)["content"].split("---\n")[1]
    errors = [] if isinstance(yaml.safe_load(front), dict) else [{"message": "no front matter"}]
    handler.answer({"errors": errors, "warnings": []}, 400 if errors else 200)


def _preupload(handler, body, name, revision):
    _, files = handler.server.hub.repos[name].at(revision)
    modes = []
    for asked in json.loads(body)["files"]:
        is_large, there = asked["path"].endswith(".safetensors"), files.get(asked["path"])
        mode = {"path": asked["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
        modes.append({**mode, "oid": None if there is None else _oid(there, is_large)})
    handler.answer({"files": modes})


def _oid(data, is_large):
    return hashlib.sha256(data).hexdigest() if is_large else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _batch(handler, body, name):
    hub = handler.server.hub
    objects = []
    for each in json.loads(body)["objects"]:
        upload = {"upload": {"href": f"{hub.url}/large/{each['oid']}"}}
        objects.append({**each, **({} if each["oid"] in hub.large else {"actions": upload})})
    handler.answer({"transfer": "basic", "objects": objects})


def _commit(handler, body, name, revision):
    hub = handler.server.hub
    repo = hub.repos[name]
    header, *lines = [json.loads(line) for line in body.splitlines()]
    if header["value"].get("parentCommit") not in (None, repo.oids[-1]):
        return handler.answer({"error": "A commit has happened since. Please refresh and try again."}, 412)
    files = dict(repo.commits[-1])
    for line in lines:
        value = line["value"]
        if line["key"] == "deletedFile":
            del files[value["path"]]
        else:
            large = line["key"] == "lfsFile"
            files[value["path"]] = hub.large[value["oid"]] if large else base64.b64decode(value["content"])
    repo.commit(files, header["value"]["summary"])
    return handler.answer({"commitUrl": f"{hub.url}/{name}/commit/{repo.oids[-1]}", "commitOid": repo.oids[-1]})


def _tag(handler, body, name, revision):
    repo, tag = handler.server.hub.repos[name], json.loads(body)["tag"]
    if tag in repo.tags:
        return handler.answer({"error": "Tag reference exists already"}, 409)
    repo.tags[tag] = repo.at(revision)[0]
    return handler.answer({})


def _info(handler, body, name, revision):
    oid, files = handler.server.hub.repos[name].at(revision)
    handler.answer({"id": name, "sha": oid, "siblings": [{"rfilename": path} for path in files]})


def _resolve(handler, body, name, revision, path):
    oid, files = handler.server.hub.repos[name].at(revision)
    if path not in files:
        return handler.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
    etag = f'"{hashlib.sha256(files[path]).hexdigest()}"'
    return handler.answer(data=files[path], ETag=etag, X_Repo_Commit=oid)


_NAME = "([^/]+/[^/]+)"
ROUTES = [
    ("/api/repos/create", _create),
    ("/api/validate-yaml", _yaml),
    (f"/api/models/{_NAME}/refs", _refs),
    (f"/api/models/{_NAME}/tree/(.+)", _tree),
    (f"/api/models/{_NAME}/preupload/(.+)", _preupload),
    (f"/{_NAME}.git/info/lfs/objects/batch", _batch),
    (f"/api/models/{_NAME}/commit/(.+)", _commit),
    (f"/api/models/{_NAME}/tag/(.+)", _tag),
    (f"/api/models/{_NAME}/revision/(.+)", _info),
    (f"/{_NAME}/resolve/([^/]+)/(.+)", _resolve),
]
