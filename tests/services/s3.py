"""A real S3 server: OpenStack Swift from PyPI with its s3api, in a virtual environment of its own.

Swift and not an imitation, because it checks signatures and checksums, keeps its data when killed, and
answers ranged reads exactly. One replica on one disk, which must have extended attributes; no memcached.
"""

import hashlib
import http.client
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.services import ServiceError, root
from tests.services.daemon import Daemon, install, run

VERSION = "2.38.3"
STORAGE = ("object", "container", "account")
HASH, POWER = "tests", 4  # how names are dealt to 2**POWER partitions


@dataclass(frozen=True)
class Swift:
    """One server; several may run side by side.

    Attributes:
        folder: where it keeps everything but the virtual environment, which all share.
        ports: of the S3 side, and of the servers behind it as in `STORAGE`.
    """

    folder: Path
    ports: tuple[int, int, int, int] = (18081, 18200, 18201, 18202)

    @property
    def endpoint(self) -> str:
        """The address of the S3 side."""
        return f"http://127.0.0.1:{self.ports[0]}"

    def environment(self) -> dict[str, str]:
        """Returns the variables through which any S3 client finds this server. The secret protects only tests."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test:tester",
            "AWS_SECRET_ACCESS_KEY": "testing-on-loopback",
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Installs, configures and starts the server; does nothing where it runs.

        Raises:
            ServiceError: it cannot be installed, the disk has no extended attributes, or it does not come up.
        """
        for name in ("etc", "disk/d1", "log"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._check_disk()
        _install()
        self._write_config()
        for daemon in self.daemons():
            daemon.start()
        self.daemons()[-1].wait_until(self.available)

    def stop(self) -> None:
        """Ends what `start` started."""
        for daemon in reversed(self.daemons()):
            daemon.stop()

    def kill(self) -> None:
        """Ends every process of the server without warning, as a power cut would, and waits until all are gone."""
        for pid in [daemon.pid() for daemon in self.daemons()]:
            if pid is not None:
                os.killpg(pid, signal.SIGKILL)  # each daemon leads a group of its own, with its workers
        while any(daemon.pid() is not None for daemon in self.daemons()):
            time.sleep(0.01)

    def enter(self, bucket: str, keys: Iterable[str]) -> None:
        """Writes keys without objects into a bucket's listing; a thousand objects would take half a minute."""
        account = f"AUTH_{self.environment()['AWS_ACCESS_KEY_ID'].split(':')[0]}"
        place = hashlib.md5(f"{HASH}/{account}/{bucket}{HASH}".encode(), usedforsecurity=False).digest()[0] >> 8 - POWER
        facts = {"X-Size": "0", "X-Content-Type": "text/plain", "X-Etag": hashlib.md5(b"").hexdigest()}
        server = http.client.HTTPConnection("127.0.0.1", self.ports[1 + STORAGE.index("container")])
        for key in keys:
            path = f"/d1/{place}/{account}/{bucket}/{key}"
            server.request("PUT", path, headers={"X-Timestamp": f"{time.time():.5f}", **facts})
            answer = server.getresponse()
            answer.read()
            if answer.status != 201:
                raise ServiceError(f"PUT {path}: {answer.status} {answer.reason}")
        server.close()

    def available(self) -> bool:
        """Returns whether the server answers."""
        try:
            with urllib.request.urlopen(f"{self.endpoint}/info", timeout=3) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def daemons(self) -> list[Daemon]:
        """Returns the three storage servers, and the proxy, which speaks S3, last."""
        daemons = []
        for name in (*STORAGE, "proxy"):
            config = self.folder / "etc" / f"{name}-server.conf"
            command = (str(_program(f"swift-{name}-server")), str(config), "--verbose")
            daemons.append(Daemon(self.folder / "log", name, command))
        return daemons

    def _check_disk(self) -> None:
        """Raises ServiceError where the file system keeps no extended attributes."""
        try:
            os.setxattr(self.folder / "disk", "user.swift.test", b"1")
        except OSError as error:
            raise ServiceError(
                f"{self.folder}: the S3 server needs extended attributes on its disk ({error}). "
                "Set MCF_SERVICES to a folder on another file system, such as ext4 or xfs"
            ) from error

    def _write_config(self) -> None:
        """Writes the configuration, and the rings (which partition lies on which server) once."""
        etc, disk = self.folder / "etc", self.folder / "disk"
        (etc / "swift.conf").write_text(SWIFT_CONF)
        key = self.environment()
        user = f"user_{key['AWS_ACCESS_KEY_ID'].replace(':', '_')} = {key['AWS_SECRET_ACCESS_KEY']} .admin"
        (etc / "proxy-server.conf").write_text(PROXY_CONF.format(etc=etc, port=self.ports[0], user=user))
        for name, port in zip(STORAGE, self.ports[1:], strict=True):
            config = STORAGE_CONF.format(etc=etc, disk=disk, name=name, port=port)
            (etc / f"{name}-server.conf").write_text(config)
            if not (etc / f"{name}.ring.gz").exists():
                builder = [_program("swift-ring-builder"), etc / f"{name}.builder"]
                (etc / f"{name}.builder").unlink(missing_ok=True)
                run([*builder, "create", str(POWER), "1", "0"])
                run([*builder, "add", f"r1z1-127.0.0.1:{port}/d1", "1"])
                run([*builder, "rebalance"])


def shared() -> Swift:
    """Returns the server that `python -m tests.services` starts."""
    return Swift(root() / "s3")


def _program(name: str) -> Path:
    return root() / "swift-venv" / "bin" / name


def _install() -> None:
    """Makes the virtual environment and installs Swift, with the user's own pip settings."""
    venv = root() / "swift-venv"
    if _program("swift-proxy-server").exists():
        return
    try:
        import ensurepip  # noqa: F401  Debian ships it apart
    except ImportError:
        install({"(ensurepip)": "python3-venv"})
    print(f"installing swift=={VERSION}", flush=True)
    run([sys.executable, "-m", "venv", "--clear", venv])
    run([_program("python"), "-m", "pip", "install", "--quiet", f"swift=={VERSION}"])


SWIFT_CONF = f"""\
[swift-hash]
swift_hash_path_prefix = {HASH}
swift_hash_path_suffix = {HASH}
"""

STORAGE_CONF = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {etc}
devices = {disk}
mount_check = false
user = root
workers = 1
log_level = WARNING
log_address = /dev/null
fallocate_reserve = 0
disable_fallocate = true
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""

PROXY_CONF = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {etc}
user = root
workers = 2
log_level = WARNING
log_address = /dev/null
[pipeline:main]
pipeline = catch_errors listing_formats bulk s3api tempauth copy slo dlo versioned_writes symlink proxy-server
[app:proxy-server]
use = egg:swift#proxy
allow_account_management = true
account_autocreate = true
[filter:tempauth]
use = egg:swift#tempauth
{user}
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
s3_acl = false
dns_compliant_bucket_names = false
check_bucket_owner = false
[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_object_versioning = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
[filter:symlink]
use = egg:swift#symlink
"""
