"""Checks before hours are spent: by all ranks of a job together, in less than a minute.

What a rank can find out alone (`node_checks`) is asked side by side, each in a thread: a store or a file system that
does not answer is then a finding that names the node, not a job that hangs. What needs all ranks (their clocks, their
network) comes after that, under the watchdog.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed

from launchers import is_message
from launchers.job import PreflightError
from launchers.node_checks import CHECKS, CLOCK_ADVICE, CLOCK_S, Answer, Check
from pipeline import ranks
from pipeline.config import Training
from pipeline.model.scan_cpp import COMPILE_SECONDS
from pipeline.ranks import Ranks
from pipeline.watchdog import Watchdog

LIMIT_S = 60.0  # for all checks together; then the watchdog ends the process
ALONE_S = 45.0  # of it, for what each rank finds out alone; a dead S3 server is given up after about 40
NUMBERS = 1 << 20  # sent, of float32: 4 MB
SLOW_TIMES, SLOW_S = 3.0, 0.05  # a node is slow that takes so many times the median, and so much longer than it
CRAWL_S = 1.0  # an all-reduce of 4 MB; slower than that, no run gets anywhere


@dataclass(frozen=True)
class Finding:
    """What a check found on a node.

    Attributes:
        check: its name.
        ok: whether a run may begin.
        said: in one line what was found, and if that is not ok, what is allowed and what to do.
        node: name of the node.
        seconds: that it took.
    """

    check: str
    ok: bool
    said: str
    node: str
    seconds: float


def preflight(config: Training, place: Ranks) -> list[Finding]:
    """Check that a run can begin; rank 0 tells what is not ok. Collective, after `ranks.init`.

    Returns:
        The findings of all ranks, the same on all.

    Raises:
        PreflightError: something is not ok. On all ranks.
    """
    stacks = Path(config.run) / "logs" / f"stacks-rank-{place.rank}.txt"
    with Watchdog(COMPILE_SECONDS, stacks):  # at its first use on a machine the scan is compiled
        asked("scan", lambda: CHECKS["scan"](config, place))
        ranks.agree(True)
    began = time.monotonic()
    with Watchdog(LIMIT_S, stacks):
        mine = alone(config, place)
        mine += [asked("clocks", lambda: clocks(place)), asked("network", lambda: network(place))]
        findings = [finding for some in ranks.everyone(mine) for finding in some if finding.said]
    if place.rank == 0:
        checks, nodes = {finding.check for finding in findings}, {finding.node for finding in findings}
        bad = once([finding for finding in findings if not finding.ok])
        count = f"{len(checks)} checks on {len(nodes)} node{'s' if len(nodes) > 1 else ''}"
        lines = [table(bad)] if bad else []
        print("\n".join([*lines, f"preflight: {count}, {time.monotonic() - began:.1f} s"]), file=sys.stderr, flush=True)
    if any(not finding.ok for finding in findings):
        raise refusal(findings)
    return findings


def table(findings: Sequence[Finding]) -> str:
    """Findings as text, a line each."""
    node = max(len(finding.node) for finding in findings)
    check = max(len(finding.check) for finding in findings)
    return "\n".join(
        f"{'ok' if one.ok else 'NOT OK':<6}  {one.node:<{node}}  {one.check:<{check}}  {one.said} ({one.seconds:.1f} s)"
        for one in findings
    )


def asked(name: str, check: Callable[[], Answer | None]) -> Finding:
    """A check's answer, with nothing said where it had none; if it raises, that is its answer."""
    began = time.monotonic()
    try:
        ok, said = check() or (True, "")
    except Exception as error:
        ok, said = False, _told(error)
    return Finding(name, ok, said, ranks.node_name(), time.monotonic() - began)


def _told(error: Exception) -> str:
    """An error in one line. Only ours, the system's and torch's are quoted: others may hold credentials."""
    if is_message(error):
        return " ".join(str(error).split())
    if isinstance(error, OSError | RuntimeError):
        return " ".join(f"{type(error).__name__}: {error}".split())
    return f"{type(error).__name__} inside of this check, which could not be made; please report it"


def alone(config: Training, place: Ranks, checks: Mapping[str, Check] = CHECKS) -> list[Finding]:
    """What this rank finds out without the others: all checks side by side, of which any may not end."""
    found: dict[str, Finding] = {}

    def ask(name: str, check: Check) -> None:
        found[name] = asked(name, lambda: check(config, place))

    # Daemons: the end of the process does not wait for one that hangs.
    threads = [threading.Thread(target=ask, args=item, name=item[0], daemon=True) for item in checks.items()]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + ALONE_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    hangs = f"no answer in {ALONE_S:g} s: a store, file system or device hangs, or answers too slowly to train with"
    return [found.get(name, Finding(name, False, hangs, ranks.node_name(), ALONE_S)) for name in checks]


def once(findings: Sequence[Finding]) -> list[Finding]:
    """The first of each check on each node, whose ranks fail alike."""
    first: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        first.setdefault((finding.node, finding.check), finding)
    return list(first.values())


def refusal(findings: Sequence[Finding]) -> PreflightError:
    """The error for findings of which some are not ok."""
    everywhere, faulty, lines = {finding.node for finding in findings}, set[str](), []
    for check in dict.fromkeys(finding.check for finding in findings):
        bad = once([finding for finding in findings if finding.check == check and not finding.ok])
        nodes = {finding.node for finding in bad}
        if len(everywhere) > 1 and nodes == everywhere:
            lines.append(f"{check} on all {len(nodes)} nodes: {bad[0].said}")
            continue
        lines += [f"{check} on {finding.node}: {finding.said}" for finding in bad]
        faulty |= nodes if nodes != everywhere else set()
    return PreflightError(f"the run does not begin; {'; '.join(lines)}", tuple(sorted(faulty)))


def clocks(place: Ranks) -> Answer | None:
    """How far the nodes' clocks are apart. Collective."""
    ranks.agree(True)  # so that all look at their clocks at once
    by_node = dict(ranks.everyone((ranks.node_name(), time.time())))
    if len(by_node) == 1:
        return None
    spread = max(by_node.values()) - min(by_node.values())
    own = by_node[ranks.node_name()] - statistics.median(by_node.values())
    # Of two nodes both are half of it off: neither is blamed here, but `clock` compares each with the store.
    if spread <= CLOCK_S or abs(own) < spread / 3:
        return True, f"nodes {spread:.1f} s apart"
    return False, f"the nodes' clocks are {spread:.1f} s apart; {CLOCK_ADVICE}"


def network(place: Ranks) -> Answer:
    """Whether the ranks see each other: the time of an all-reduce, and nodes that are slower than others. Collective.

    In an all-reduce everyone waits for the slowest, so that its times do not tell who that is. Therefore the nodes also
    send 4 MB to and fro in pairs, in a ring: a link is slow if either end is, so a node's time is that of its better
    link. Of two nodes neither can be blamed.
    """
    if place.world == 1:
        return True, "skipped: one rank"
    device = ranks.device(place) if distributed.get_backend() == "nccl" else torch.device("cpu")
    sums = [_all_reduce(place, device) for _ in range(3)]
    best = max(ranks.everyone(min(seconds for seconds, _ in sums)))
    names = ranks.everyone(ranks.node_name())
    links = _links(place, [names.index(name) for name in dict.fromkeys(names)], device)
    by_node = {node: own for node, own in ranks.everyone((ranks.node_name(), min(links, default=0.0))) if own}
    median = statistics.median_low(by_node.values() or [0.0])
    slow = {node for node, own in by_node.items() if own > max(SLOW_TIMES * median, SLOW_S + median)}
    if not all(right for _, right in sums):
        return False, "the ranks add up to a wrong sum: memory or network of a node damages data; look for its errors"
    if ranks.node_name() in slow:
        took = f"{by_node[ranks.node_name()] * 1e3:.0f} ms, {median * 1e3:.0f} ms is the median"
        return (
            False,
            f"4 MB to another node and back take {took}; look at this node's network and load, or leave it out",
        )
    said = f"an all-reduce of 4 MB by {place.world} ranks takes {best * 1e3:.0f} ms"
    if best > CRAWL_S and not slow:
        return (
            False,
            f"{said}; at most {CRAWL_S * 1e3:g} ms are allowed, look at NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME",
        )
    return True, said


def _all_reduce(place: Ranks, device: torch.device) -> tuple[float, bool]:
    """Seconds of one, and whether the sum is right."""
    numbers = torch.full((NUMBERS,), place.rank + 1.0, device=device)
    ranks.agree(True)
    began = time.monotonic()
    distributed.all_reduce(numbers)
    right = bool((numbers == place.world * (place.world + 1) / 2).all())  # which also waits for a GPU
    return time.monotonic() - began, right


def _links(place: Ranks, firsts: Sequence[int], device: torch.device) -> list[float]:
    """Best seconds of three, to and fro, of each link of this rank in the ring of the nodes' first ranks."""
    numbers, found = torch.zeros(NUMBERS, device=device), []
    for here, there in zip(firsts, [*firsts[1:], firsts[0]], strict=True):
        if place.rank in (here, there) and here != there:
            times = [_to_and_fro(numbers, place.rank == here, there if place.rank == here else here) for _ in range(4)]
            found.append(min(times[1:]))  # the first also connects, and waits until the other comes
    return found


def _to_and_fro(numbers: Tensor, first: bool, other: int) -> float:
    """Seconds to send the numbers to another rank and to get them back, or the other way round."""
    began = time.monotonic()
    for sends in (first, not first):
        if sends:
            distributed.send(numbers, other)
        else:
            distributed.recv(numbers, other)
    numbers[0].item()  # waits for a GPU
    return time.monotonic() - began
