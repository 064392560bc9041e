"""moto's S3 server over HTTP, which can refuse a request or do something during it."""

import itertools
import threading
from collections.abc import Callable, Iterable
from typing import Any

import fsspec
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

_BUCKETS = itertools.count()


class Quiet(WSGIRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


class Store:
    """An S3 server; `before_put` is called before it takes an object and may refuse with PermissionError."""

    def __init__(self) -> None:
        self.before_put: Callable[[], None] | None = None
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Quiet)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "PUT" and self.before_put:
            try:
                self.before_put()
            except PermissionError:
                start_response("403 Forbidden", [("Content-Type", "application/xml")])
                return [b"<Error><Code>AccessDenied</Code><Message>no more objects</Message></Error>"]
        return self._moto(environ, start_response)  # type: ignore[no-any-return]

    def new_bucket(self, monkeypatch: pytest.MonkeyPatch) -> str:
        """Its address; the environment points at this server."""
        for key, value in {
            "AWS_ENDPOINT_URL": self.address,
            "AWS_ACCESS_KEY_ID": "ada",
            "AWS_SECRET_ACCESS_KEY": "lovelace",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(key, value)
        bucket = f"bucket-{next(_BUCKETS)}"
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # they talk to the servers of tests before
        fsspec.filesystem("s3").mkdir(bucket)
        return f"s3://{bucket}"
