"""A proxy on loopback that spoils some of the requests it passes on: python -m tests.services.faults URL [options].

Which requests are spoilt, and how, is decided by the seed and the request's number alone. It is a process of its own,
as GDAL holds the interpreter's lock while it waits for an answer. Stdlib only.

| fault         | what happens                                                                              |
|---------------|-------------------------------------------------------------------------------------------|
| `500`, `503`  | this answer; the server behind never sees the request                                     |
| `slow`        | no answer before the client's patience ends; the server behind did what was asked         |
| `cut-request` | half of the body goes to the server behind, then both connections are cut                 |
| `cut-answer`  | all of the request is done, half of the answer's body is sent, then the connection is cut |

A request without body is cut before it is passed on; an answer without body is not sent at all.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

KINDS = ("500", "503", "slow", "cut-request", "cut-answer")
COUNTS = "/-/counts"  # asks the proxy itself
HOP = ("connection", "expect", "keep-alive")


class Proxy(ThreadingHTTPServer):
    """The listening side; `counts` says how many requests came and how many met each fault."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, given: argparse.Namespace) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = urlsplit(given.upstream)
        self.rate, self.kinds, self.seed = given.rate, tuple(given.kinds), given.seed
        self.delay, self.latency = given.delay, given.latency
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def fault(self) -> str:
        """The fault of the next request, or ""."""
        with self._lock:
            dice = random.Random(f"{self.seed} {self.counts['requests']}")
            self.counts["requests"] += 1
            found = dice.choice(self.kinds) if dice.random() < self.rate else ""
            if found:
                self.counts[found] += 1
            return found

    def handle_error(self, *_: object) -> None:
        """A client that has gone away is the point of it all."""


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    server: Proxy

    def _pass_on(self) -> None:
        if self.path == COUNTS:
            counts = json.dumps(self.server.counts).encode()
            self._answer(200, [("Content-Length", str(len(counts)))], counts)
            return
        fault = self.server.fault()
        time.sleep(self.server.latency)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault in ("500", "503"):
            self._answer(int(fault), [("Content-Length", "0")], b"")
        elif fault == "cut-request":
            self._half(body)
        else:
            self._whole(body, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

    def _half(self, body: bytes) -> None:
        if body:
            upstream = self._ask()
            upstream.send(body[: len(body) // 2])
            upstream.close()
        self._cut()

    def _whole(self, body: bytes, fault: str) -> None:
        upstream = self._ask()
        upstream.send(body)
        reply = upstream.getresponse()
        headers = [(name, value) for name, value in reply.getheaders() if name.lower() not in HOP]
        if not fault:
            self._answer(reply.status, headers, b"")
            shutil.copyfileobj(reply, self.wfile, 1 << 20)
            upstream.close()
            return
        answer = reply.read()
        upstream.close()
        if fault == "slow":
            time.sleep(self.server.delay)
        elif answer:
            self._answer(reply.status, headers, answer[: len(answer) // 2])
        self._cut()

    def _ask(self) -> http.client.HTTPConnection:
        """A connection to the server behind, which has the head of this request already."""
        at = self.server.upstream
        upstream = http.client.HTTPConnection(at.hostname or "", at.port, timeout=60)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in HOP:
                upstream.putheader(name, value)
        upstream.endheaders()
        return upstream

    def _answer(self, status: int, headers: Sequence[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _cut(self) -> None:
        """Ends the connection as a crash would: without a farewell, what is under way is lost."""
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@dataclass(frozen=True)
class Faults:
    """A proxy that runs: its address, and what it did so far."""

    url: str

    def counts(self) -> Counter[str]:
        """Requests, and faults by kind."""
        with urllib.request.urlopen(self.url + COUNTS, timeout=10) as answer:
            return Counter(json.load(answer))

    def faults(self) -> int:
        """Requests that were spoilt."""
        return sum(number for name, number in self.counts().items() if name != "requests")


@contextmanager
def faults(
    upstream: str,
    *,
    rate: float = 0.05,
    kinds: Sequence[str] = KINDS,
    seed: int = 0,
    delay: float = 5,
    latency: float = 0,
) -> Iterator[Faults]:
    """Runs a proxy before `upstream`.

    Args:
        upstream: address of the real server, http://HOST:PORT.
        rate: share of the requests to spoil, 0 to 1.
        kinds: of the table above, equally likely.
        seed: decides which.
        delay: seconds that `slow` takes; more than the client's patience.
        latency: seconds for which every request is held back.
    """  # fmt: skip
    command = [sys.executable, "-m", "tests.services.faults", upstream, "--rate", str(rate), "--seed", str(seed)]
    with subprocess.Popen(
        [*command, "--delay", str(delay), "--latency", str(latency), "--kinds", *kinds],
        stdout=subprocess.PIPE,
        text=True,
    ) as proxy:
        try:
            assert proxy.stdout is not None
            yield Faults(f"http://127.0.0.1:{int(proxy.stdout.readline())}")
        finally:
            proxy.kill()


def main() -> None:
    """Prints the port and serves until it is killed."""
    parser = argparse.ArgumentParser("python -m tests.services.faults")
    parser.add_argument("upstream")
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--delay", type=float, default=5)
    parser.add_argument("--latency", type=float, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    with Proxy(parser.parse_args()) as proxy:
        print(proxy.server_port, flush=True)
        proxy.serve_forever()


if __name__ == "__main__":
    main()
