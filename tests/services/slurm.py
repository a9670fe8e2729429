"""A real Slurm with accounting: munged, mariadbd, slurmdbd, slurmctld and four virtual nodes.

Virtual nodes are several `slurmd -N nodeK` on one machine, each with a port of its own. Their names do not
resolve: whoever connects them must go by address. munge and MariaDB run from our folder too, with a key, a
socket and a password of their own, so that those of the machine are neither needed nor touched.
"""

import os
import secrets
import signal
import socket
from contextlib import suppress
from pathlib import Path

from tests.services import ServiceError, root
from tests.services.daemon import Daemon, answers, install, run

NODES = 4
READY = ("idle", "mixed", "allocated")
DATABASE_PORT, SLURMDBD_PORT, SLURMCTLD_PORT = 13306, 16819, 16817
SLURMD_PORTS = f"17001-{17000 + NODES}"
PACKAGES = {
    "munged": "munge",
    "mariadbd": "mariadb-server",
    "slurmdbd": "slurmdbd",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sinfo": "slurm-client",
}
PLUGINS = {
    "cred_munge.so": "slurm-wlm-basic-plugins",
    "accounting_storage_mysql.so": "slurm-wlm-mysql-plugin",
}


def folder() -> Path:
    """Returns where this service keeps everything."""
    return root() / "slurm"


def environment() -> dict[str, str]:
    """Returns the variable through which Slurm's own commands (sbatch, sinfo, ...) find this cluster."""
    return {"SLURM_CONF": str(folder() / "slurm.conf")}


def start() -> None:
    """Installs, configures and starts the cluster; does nothing where it runs.

    Raises:
        ServiceError: something cannot be installed or does not come up.
    """
    install(PACKAGES | _missing_plugins())
    for name in ("state", "log", "run"):
        (folder() / name).mkdir(parents=True, exist_ok=True)
    _write_config()
    _start_munge()
    _start_database()
    _start(_slurm("slurmdbd"), "sacctmgr", "--noheader", "list", "cluster")
    _add_accounts()
    _start(_slurm("slurmctld"), "scontrol", "ping")
    for node in _nodes():
        node.start()
    _slurm("slurmctld").wait_until(lambda: _ready_nodes() == NODES)


def stop() -> None:
    """Ends the jobs and the daemons this module started, the last started first."""
    if available():
        _call("scancel", "--user", "root")
        _slurm("slurmctld").wait_until(lambda: not _call("squeue", "--noheader"))
    for daemon in (*_nodes(), _slurm("slurmctld"), _slurm("slurmdbd"), _database(), _munge()):
        daemon.stop()


def available() -> bool:
    """Returns whether the cluster answers."""
    config = folder() / "slurm.conf"
    return config.exists() and answers(["sinfo", "--noheader"], environment())


def lose_node(name: str) -> None:
    """Kills a node as a power cut would: its slurmd, and all that its jobs run on it."""
    number = int(name.removeprefix("node"))
    running = _nodes()[number - 1].pid()
    lost = {running} if running else set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"SLURMD_NODENAME={name}".encode() in path.read_bytes().split(b"\0"):
                lost |= {int(path.parent.name), *_step_daemon(path.parent)}
        except OSError:  # it has ended meanwhile
            continue
    for pid in lost:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _step_daemon(process: Path) -> list[int]:
    """The slurmstepd that is the parent of a process."""
    parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
    return [parent] if Path(f"/proc/{parent}/cmdline").read_bytes().startswith(b"slurmstepd") else []


def return_node(name: str) -> None:
    """Starts a lost node again and waits until it takes jobs."""
    node = _nodes()[int(name.removeprefix("node")) - 1]
    node.start()
    node.wait_until(lambda: _state(name) in READY, 90)


def _missing_plugins() -> dict[str, str]:
    """Returns file -> package for each package of plugins that is not installed."""
    found = {path.name for path in Path("/usr/lib").glob("*/slurm-wlm/*.so")}
    return {library: package for library, package in PLUGINS.items() if library not in found}


def _munge() -> Daemon:
    at = folder() / "munge"
    files = [f"--{name}={at}/{name}" for name in ("socket", "key-file", "pid-file", "seed-file")]
    return Daemon(folder() / "log", "munged", ("munged", "--foreground", "--num-threads=10", *files))


def _database() -> Daemon:
    at = folder()
    files = (f"--datadir={at}/database", f"--socket={at}/database.socket", f"--pid-file={at}/run/mariadbd")
    network = ("--bind-address=127.0.0.1", f"--port={DATABASE_PORT}", "--skip-name-resolve")
    options = ("--user=root", "--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900")
    return Daemon(at / "log", "mariadbd", ("mariadbd", "--no-defaults", *files, *network, *options))


def _slurm(name: str, *options: str) -> Daemon:
    """Returns one of Slurm's daemons, in the foreground (-D)."""
    return Daemon(folder() / "log", "-".join([name, *options[1:]]), (name, "-D", *options), environment())


def _nodes() -> list[Daemon]:
    return [_slurm("slurmd", "-N", f"node{number}") for number in range(1, NODES + 1)]


def _call(*command: str) -> str:
    """Runs one of Slurm's commands on this cluster and returns what it prints."""
    return run(command, environment())


def _start(daemon: Daemon, *command: str) -> None:
    """Starts a daemon and waits until one of Slurm's commands ends well."""
    daemon.start()
    daemon.wait_until(lambda: answers(command, environment()))


def _state(node: str) -> str:
    return _call("sinfo", "--noheader", "--partition=main", "--nodes", node, "--format", "%T").strip()


def _ready_nodes() -> int:
    states = _call("sinfo", "--noheader", "--Node", "--partition=main", "--format", "%T").split()
    return sum(state in READY for state in states)


def _start_munge() -> None:
    """Starts munged with a key made at the first start; its folder must be open to all, writable by root."""
    at = folder() / "munge"
    at.mkdir(mode=0o755, exist_ok=True)
    _secret(at / "key-file")
    _munge().start()
    command = ("munge", "--no-input", f"--socket={at}/socket")
    _munge().wait_until(lambda: answers(command))


def _start_database() -> None:
    """Starts MariaDB with its own data folder, and makes slurmdbd's database and user."""
    at = folder()
    if not (at / "database").exists():
        options = ["--no-defaults", f"--datadir={at}/database.new", "--user=root", "--skip-test-db"]
        run(["mariadb-install-db", *options, "--auth-root-authentication-method=socket"])
        (at / "database.new").rename(at / "database")
    _database().start()
    client = ["mariadb", "--no-defaults", f"--socket={at}/database.socket", "--user=root", "--execute"]
    _database().wait_until(lambda: answers([*client, "select 1"]))
    password = _secret(at / "database.password")
    run([*client, "create database if not exists slurm"])
    run([*client, f"create user if not exists slurm@'127.0.0.1' identified by '{password}'"])
    run([*client, "grant all on slurm.* to slurm@'127.0.0.1'"])


def _secret(path: Path) -> str:
    """Returns what a file of mode 600 holds: 64 random characters, made at the first call."""
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
    return path.read_text()


def _add_accounts() -> None:
    """Makes the cluster, an account `tests` and its user root known, so that any other account is refused."""
    if "mcf" not in _call("sacctmgr", "--noheader", "list", "cluster", "format=cluster").split():
        _call("sacctmgr", "--immediate", "add", "cluster", "mcf")
    if "tests" not in _call("sacctmgr", "--noheader", "list", "account", "format=account").split():
        _call("sacctmgr", "--immediate", "add", "account", "tests")
    if "tests" not in _call("sacctmgr", "--noheader", "list", "user", "format=defaultaccount").split():
        _call("sacctmgr", "--immediate", "add", "user", "root", "account=tests", "defaultaccount=tests")


def _write_config() -> None:
    """Writes slurmdbd.conf and slurm.conf; raises ServiceError for a folder that Slurm cannot name."""
    at, host = folder(), socket.gethostname().split(".")[0]
    if " " in str(at):
        raise ServiceError(f"{at}: Slurm takes no folder with a blank in its name")
    password = _secret(at / "database.password")
    (at / "slurmdbd.conf").touch(mode=0o600)
    (at / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(at=at, host=host, password=password))
    (at / "slurm.conf").write_text(SLURM_CONF.format(at=at, host=host, interface=_interface(host)))


def _interface(host: str) -> str:
    """Returns the setting that binds the daemons to the address of the host's name, where that is loopback.

    Elsewhere they must listen on every interface to be reached by 127.0.0.1; munge then keeps strangers out.
    """
    try:
        loopback = socket.gethostbyname(host).startswith("127.")
    except OSError:
        loopback = False
    return "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny\n" if loopback else ""


SLURMDBD_CONF = f"""\
AuthType=auth/munge
AuthInfo=socket={{at}}/munge/socket
DbdHost={{host}}
DbdAddr=127.0.0.1
DbdPort={SLURMDBD_PORT}
SlurmUser=root
PidFile={{at}}/run/slurmdbd
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={DATABASE_PORT}
StorageUser=slurm
StoragePass={{password}}
StorageLoc=slurm
"""

# What is not obvious: cred_expire makes a requeued job start at once instead of after two minutes;
# config_overrides lets a virtual node claim more than the machine has; linuxproc and task/none do without
# cgroups; MinJobAge keeps ended jobs visible; associations and qos refuse unknown ones; AccountingStoragePass is
# munge's socket; jobs in `spare` give way to those in `urgent`, nobody else does.
SLURM_CONF = f"""\
ClusterName=mcf
SlurmctldHost={{host}}(127.0.0.1)
SlurmctldPort={SLURMCTLD_PORT}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={{at}}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmctldPidFile={{at}}/run/slurmctld
SlurmdPidFile={{at}}/run/slurmd.%n
StateSaveLocation={{at}}/state
SlurmdSpoolDir={{at}}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={SLURMDBD_PORT}
AccountingStoragePass={{at}}/munge/socket
AccountingStorageEnforce=associations,qos
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=defer,sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{{interface}}MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
JobRequeue=1
ReturnToService=2
MinJobAge=3600
SlurmdTimeout=8
SlurmdParameters=config_overrides
NodeName=DEFAULT CPUs=4 RealMemory=4096 State=UNKNOWN
NodeName=node[1-{NODES}] NodeHostname={{host}} NodeAddr=127.0.0.1 Port=[{SLURMD_PORTS}]
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE State=UP
PartitionName=main Default=YES PreemptMode=OFF
PartitionName=spare PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent PriorityTier=2 PreemptMode=OFF
"""
