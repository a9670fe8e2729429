"""`mcf shards ...`: build, join, check and look into datasets. Standard library only until a command runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launchers.arguments import Help, add_config, load

SHARDS_CONFIG = {
    "build": "tile an archive into shards",
    "merge": "join a build made in parts",
    "index": "a manifest over an archive of tars, which stay as they are",
}
SHARDS_DATA = {
    "verify": "check hashes, keys, checksums and contents",
    "stats": "print the statistics of every band",
    "order": "print which samples each rank sees at which step",
    "show": "pictures and a page: contact sheet, map of footprints, histograms",
}


def add_shards(commands: Any) -> None:
    """The command and its verbs."""
    shards = commands.add_parser("shards", help="build, join, check and look into datasets of shards")
    verbs = shards.add_subparsers(required=True, metavar="VERB")
    for name, text in SHARDS_CONFIG.items():
        verb = verbs.add_parser(name, help=text, formatter_class=Help, add_help=False)
        add_config(verb, "shards")
        if name == "build":
            verb.add_argument("--on", choices=("here", "slurm"), default="here", help="where to run [here]")
            verb.add_argument("--slurm", default="slurm", metavar="CONFIG", help="config of --on slurm [preset slurm]")
            verb.add_argument("--parts", type=int, default=8, metavar="N", help="jobs of the array on slurm [8]")
            verb.add_argument("--throttle", type=int, default=64, metavar="N", help="of them at once [64]")
        verb.set_defaults(run={"build": _build, "merge": _merge, "index": _index}[name])
    runs: dict[str, Callable[[argparse.Namespace], int]] = {
        "verify": _verify,
        "stats": _stats,
        "order": _order,
        "show": _show,
    }
    for name, text in SHARDS_DATA.items():
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("data", metavar="DATA", help="dataset folder, local or s3://")
        if name == "order":
            described = "global_batch=N seed=S step=K steps=M world=R rank=r lanes=L"
            verb.add_argument("settings", nargs="*", metavar="key=value", help=described)
        if name == "show":
            verb.add_argument("--out", default="show", metavar="FOLDER", help="folder to write into [show]")
            verb.add_argument("--samples", type=int, default=24, metavar="N", help="on the contact sheet [24]")
            described = "only some samples: split=train,val group=... key=... shard=... labelled=true"
            verb.add_argument("settings", nargs="*", metavar="key=value", help=described)
        verb.set_defaults(run=runs[name])


def _build(parsed: argparse.Namespace) -> int:
    import configs
    from shards.build import build, plan

    config = load(parsed, "shards")
    if parsed.dry_run:
        planned = plan(config)
        print(configs.dump(config))
        print(f"{planned.items} tiles in {planned.shards} shards from {len(planned.views)} views")
        for reason, count in planned.reasons().items():
            print(f"  left out: {count} x {reason}, such as {', '.join(planned.examples().get(reason, [])[:3])}")
        for problem in planned.problems:
            print(f"  skipped: {problem}")
        return 0
    if parsed.on == "slurm":
        return _build_on_slurm(parsed, config)
    tally = build(config)
    rows = tally.table()
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    if int(config.part.split("/")[1]) == 1:
        _show_dataset(config.out)
    else:
        print("".join(f"  skipped: {reason}\n" for reason in tally.skipped), end="")
    return _incomplete(len(tally.skipped))


def _build_on_slurm(parsed: argparse.Namespace, config: Any) -> int:
    """Submits an array of parts and a merge; prints their ids."""
    import configs
    from launchers import slurm

    if config.part != "1/1" or min(parsed.parts, parsed.throttle) < 1:
        raise configs.ConfigError(
            f"part={config.part}, --parts {parsed.parts}, --throttle {parsed.throttle}: with --on slurm the parts are "
            "made here; leave part= away, and give at least 1"
        )
    array, merge = slurm.submit_parts(config, configs.load(parsed.slurm), parsed.parts, parsed.throttle)
    left = f"array {array}" if array else "no part is left to build"
    print(
        f"{left}, then merge {merge}; logs in {slurm.logs_of(config)}. The same command repeats the parts that failed"
    )
    return 0


def _merge(parsed: argparse.Namespace) -> int:
    from shards.build import merge

    config = load(parsed, "shards")
    if parsed.dry_run:
        return 0
    merge(config)
    return _incomplete(len(_show_dataset(config.out)["builds"][config.name]["skipped"]))


def _index(parsed: argparse.Namespace) -> int:
    from shards.index import index

    config = load(parsed, "shards")
    return 0 if parsed.dry_run else _incomplete(len(_show_dataset(index(config))["skipped"]))


def _incomplete(skipped: int) -> int:
    """The exit code of a build that came to its end."""
    if skipped:
        files = f"{skipped} files were skipped (on_error=skip)"
        print(f"mcf: finished, but {files}; they are named above and in dataset.json", file=sys.stderr)
    return 1 if skipped else 0


def _show_dataset(data: str) -> dict[str, Any]:
    """Prints what a dataset holds and lacks; its `dataset.json`."""
    from shards.manifest import read_facts, summary
    from shards.store import open_store

    store = open_store(data)
    facts = read_facts(store)
    size = sum(shard["bytes"] for shard in facts["shards"].values())
    print(
        f"{data}: {facts['samples']} samples ({summary(store)}) in {len(facts['shards'])} shards, {size / 1e6:.1f} MB"
    )
    for reason, count in facts["left_out"].items():
        print(f"  left out: {count} x {reason}")
    for reason in facts["skipped"]:
        print(f"  skipped: {reason}")
    return facts


def _verify(parsed: argparse.Namespace) -> int:
    from shards.verify import registration, verify

    found = verify(parsed.data)
    print("\n".join([*(found or [f"{parsed.data}: sound"]), *registration(parsed.data)]))
    return 1 if found else 0


def _stats(parsed: argparse.Namespace) -> int:
    from shards.manifest import read_facts
    from shards.statistics import table
    from shards.store import open_store

    rows = table(read_facts(open_store(parsed.data)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
    return 0


def _order(parsed: argparse.Namespace) -> int:
    from shards.listing import listing, parse_data

    settings = dict(item.partition("=")[::2] for item in parsed.settings)
    for line in listing(parse_data(parsed.data), settings):
        print(json.dumps(line))
    return 0


def _show(parsed: argparse.Namespace) -> int:
    from shards.show import parse_where, show

    where = parse_where(parsed.settings)
    paths, missing = show(parsed.data, Path(parsed.out), samples=parsed.samples, where=where)
    print("\n".join([*map(str, paths), *missing]))
    return 0
