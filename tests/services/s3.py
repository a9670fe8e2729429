"""A real S3 server: OpenStack Swift from PyPI with its s3api, in a virtual environment of its own.

Swift and not an imitation, because it checks signatures and checksums, keeps its data when killed, and
answers ranged reads exactly. One replica on one disk, which must have extended attributes; no memcached.
"""

import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

from tests.services import ServiceError, root
from tests.services.daemon import Daemon, install, run

VERSION = "2.38.3"
PORT = 18081
SERVERS = {"account": 18202, "container": 18201, "object": 18200}
ENDPOINT = f"http://127.0.0.1:{PORT}"


def folder() -> Path:
    """Returns where this service keeps everything but its virtual environment."""
    return root() / "s3"


def environment() -> dict[str, str]:
    """Returns the variables through which any S3 client finds this server. The secret protects only tests."""
    return {
        "AWS_ENDPOINT_URL": ENDPOINT,
        "AWS_ACCESS_KEY_ID": "test:tester",
        "AWS_SECRET_ACCESS_KEY": "testing-on-loopback",
        "AWS_REGION": "us-east-1",
    }


def start() -> None:
    """Installs, configures and starts the server; does nothing where it runs.

    Raises:
        ServiceError: it cannot be installed, the disk has no extended attributes, or it does not come up.
    """
    for name in ("etc", "disk/d1", "log"):
        (folder() / name).mkdir(parents=True, exist_ok=True)
    _check_disk()
    _install()
    _write_config()
    daemons = _daemons()
    for daemon in daemons:
        daemon.start()
    daemons[-1].wait_until(available)


def stop() -> None:
    """Ends what `start` started."""
    for daemon in reversed(_daemons()):
        daemon.stop()


def available() -> bool:
    """Returns whether the server answers."""
    try:
        with urllib.request.urlopen(f"{ENDPOINT}/info", timeout=3) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _daemons() -> list[Daemon]:
    """Returns the three storage servers, and the proxy, which speaks S3, last."""
    daemons = []
    for name in (*SERVERS, "proxy"):
        server = root() / "swift-venv" / "bin" / f"swift-{name}-server"
        config = folder() / "etc" / f"{name}-server.conf"
        daemons.append(Daemon(folder() / "log", name, (str(server), str(config), "--verbose")))
    return daemons


def _check_disk() -> None:
    """Raises ServiceError where the file system keeps no extended attributes."""
    try:
        os.setxattr(folder() / "disk", "user.swift.test", b"1")
    except OSError as error:
        raise ServiceError(
            f"{folder()}: the S3 server needs extended attributes on its disk ({error}). "
            "Set MCF_SERVICES to a folder on another file system, such as ext4 or xfs"
        ) from error


def _install() -> None:
    """Makes the virtual environment and installs Swift, with the user's own pip settings."""
    venv = root() / "swift-venv"
    if (venv / "bin" / "swift-proxy-server").exists():
        return
    try:
        import ensurepip  # noqa: F401  Debian ships it apart
    except ImportError:
        install({"(ensurepip)": "python3-venv"})
    print(f"installing swift=={VERSION}", flush=True)
    run([sys.executable, "-m", "venv", "--clear", venv])
    run([venv / "bin" / "python", "-m", "pip", "install", "--quiet", f"swift=={VERSION}"])


def _write_config() -> None:
    """Writes the configuration, and the rings (which partition lies on which server) once."""
    etc, values = folder() / "etc", {"etc": folder() / "etc", "disk": folder() / "disk"}
    (etc / "swift.conf").write_text(SWIFT_CONF)
    key = environment()
    user = f"user_{key['AWS_ACCESS_KEY_ID'].replace(':', '_')} = {key['AWS_SECRET_ACCESS_KEY']} .admin"
    (etc / "proxy-server.conf").write_text(PROXY_CONF.format(**values, port=PORT, user=user))
    for name, port in SERVERS.items():
        (etc / f"{name}-server.conf").write_text(STORAGE_CONF.format(**values, name=name, port=port))
        if not (etc / f"{name}.ring.gz").exists():
            builder = [root() / "swift-venv" / "bin" / "swift-ring-builder", etc / f"{name}.builder"]
            (etc / f"{name}.builder").unlink(missing_ok=True)
            run([*builder, "create", "4", "1", "0"])
            run([*builder, "add", f"r1z1-127.0.0.1:{port}/d1", "1"])
            run([*builder, "rebalance"])


SWIFT_CONF = """\
[swift-hash]
swift_hash_path_prefix = tests
swift_hash_path_suffix = tests
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
