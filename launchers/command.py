"""The command line, `mcf`. Imports only the standard library until a command runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launchers import is_message

STAGES = {
    "pretrain": "self-supervised pretraining (CMSS) on unlabeled shards",
    "finetune": "train for land cover, from a checkpoint or from scratch",
    "evaluate": "metrics of a finetuned checkpoint on labelled samples",
}
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


class Help(argparse.HelpFormatter):
    """Keeps the lines of descriptions as they are written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code.

    Returns:
        0; 1 when something, or a part of it, cannot be done (one message on stderr); 2 for a mistake in the command
        itself; 85 when it was told to stop, saved, and can go on.
    """
    parsed = _parse(arguments)
    try:
        return int(parsed.run(parsed) or 0)
    except KeyboardInterrupt:
        print("mcf: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if not is_message(error):
            raise
        print(f"mcf: {error}", file=sys.stderr)
        return 85 if type(error).__name__ == "Stopped" else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; `key=value` may also stand after options, where argparse no longer expects any."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    given = next((vars(parsed)[name] for name in ("overrides", "settings") if name in parsed), None)
    if rest and (given is None or any(item.startswith("-") or "=" not in item for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if given is not None:
        given.extend(rest)
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "mcf",
        formatter_class=Help,
        description="Multimodal pretraining for Earth observation: scenes in, maps out.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="the whole pipeline on a made-up archive: no network, no GPU, minutes")
    demo.add_argument("out", nargs="?", default="demo", help="folder for everything it makes [demo]")
    demo.set_defaults(run=_demo)
    _add_shards(commands)
    for name, text in STAGES.items():
        stage = commands.add_parser(name, help=text, formatter_class=Help, add_help=False)
        _add_config(stage, name)
        stage.add_argument("--on", choices=("here", "local", "slurm"), default="here", help="where to run [here]")
        stage.add_argument("--processes", type=int, default=2, help="ranks with --on local [2]")
        stage.add_argument("--slurm", default="slurm", metavar="CONFIG", help="config of --on slurm [preset slurm]")
        if name != "evaluate":
            described = "kill a short run beside this one, here or local, and prove that it goes on exactly"
            stage.add_argument("--resume-check", action="store_true", help=described)
            described = "run a few steps beside this run and tell on a page where their time goes"
            stage.add_argument("--profile", action="store_true", help=described)
        stage.set_defaults(run=_stage, stage=name)
    _add_predict(commands)
    export = commands.add_parser("export", help="a run's newest checkpoint to a release folder")
    export.add_argument("checkpoint", metavar="RUN", help="run or checkpoint folder")
    export.add_argument("out", metavar="OUT", help="release folder to write")
    export.set_defaults(run=_export)
    convert = commands.add_parser("convert", help="a public MCF-Mamba or VMamba checkpoint to a release folder")
    convert.add_argument("checkpoint", metavar="CHECKPOINT", help="file of torch.save or safetensors")
    convert.add_argument("out", metavar="OUT", help="release folder to write")
    described = "bands=NAME:COUNT,...: the modalities; a VMamba backbone needs them"
    convert.add_argument("settings", nargs="*", metavar="key=value", help=described)
    convert.set_defaults(run=_convert)
    return parser


def _add_shards(commands: Any) -> None:
    shards = commands.add_parser("shards", help="build, join, check and look into datasets of shards")
    verbs = shards.add_subparsers(required=True, metavar="VERB")
    for name, text in SHARDS_CONFIG.items():
        verb = verbs.add_parser(name, help=text, formatter_class=Help, add_help=False)
        _add_config(verb, "shards")
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


def _add_config(parser: argparse.ArgumentParser, stage: str) -> None:
    parser.add_argument("-h", "--help", action=_ConfigHelp, stage=stage)
    parser.add_argument("config", metavar="CONFIG", help="preset name or YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the config, by dotted path")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")


def _add_predict(commands: Any) -> None:
    predict = commands.add_parser("predict", help="a land-cover map of a whole scene")
    predict.add_argument("checkpoint", metavar="CHECKPOINT", help="finetuned run, checkpoint or release folder")
    predict.add_argument("--scene", action="append", required=True, metavar="SENSOR=PATH", help="once per modality")
    predict.add_argument("--out", required=True, metavar="MAP", help="GeoTIFF to write")
    predict.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the predict config")
    predict.set_defaults(run=_predict)


class _ConfigHelp(argparse.Action):
    """`--help` of a stage: usage, then the fields of its config with their defaults."""

    def __init__(self, option_strings: Sequence[str], dest: str, stage: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show this help and exit")
        self.stage = stage

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import configs

        parser.print_help()
        presets = [name for name in configs.presets() if configs.stage_of(name) == self.stage]
        print(f"\npresets: {', '.join(presets)}\n\nfields of CONFIG, or key=value [default]:")
        print(configs.describe(self.stage))
        parser.exit()


def _load(parsed: argparse.Namespace, stage: str) -> Any:
    import configs

    config = configs.load(parsed.config, parsed.overrides)
    if config.stage != stage:
        raise configs.ConfigError(f"{parsed.config}: a config of stage {config.stage!r}; this command runs {stage!r}")
    return config


def _demo(parsed: argparse.Namespace) -> int:
    from launchers.demo import demo

    return demo(Path(parsed.out))


def _build(parsed: argparse.Namespace) -> int:
    import configs
    from shards.build import build, plan

    config = _load(parsed, "shards")
    if parsed.dry_run:
        planned = plan(config)
        print(configs.dump(config))
        print(f"{planned.items} tiles in {planned.shards} shards from {len(planned.views)} views")
        for reason, count in planned.reasons().items():
            print(f"  left out: {count} x {reason}, such as {', '.join(planned.examples().get(reason, [])[:3])}")
        for problem in planned.problems:
            print(f"  skipped: {problem}")
        return 0
    tally = build(config)
    rows = tally.table()
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    if int(config.part.split("/")[1]) == 1:
        _show_dataset(config.out)
    else:
        print("".join(f"  skipped: {reason}\n" for reason in tally.skipped), end="")
    return _incomplete(len(tally.skipped))


def _merge(parsed: argparse.Namespace) -> int:
    from shards.build import merge

    config = _load(parsed, "shards")
    if parsed.dry_run:
        return 0
    merge(config)
    return _incomplete(len(_show_dataset(config.out)["builds"][config.name]["skipped"]))


def _index(parsed: argparse.Namespace) -> int:
    from shards.index import index

    config = _load(parsed, "shards")
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


def _stage(parsed: argparse.Namespace) -> int:
    config = _load(parsed, parsed.stage)
    if getattr(parsed, "resume_check", False):
        return _resume_check(parsed, config)
    return _profile(parsed, config) if getattr(parsed, "profile", False) else _run(parsed, config)


def _run(parsed: argparse.Namespace, config: Any) -> int:
    import configs

    if parsed.dry_run:
        print(configs.dump(config))
    if parsed.on == "slurm":
        return _on_slurm(parsed, config)
    if parsed.dry_run:
        return 0
    if parsed.on == "local":
        from launchers.local import run

        return run(config, parsed.processes, Path(config.run) / "logs")
    from launchers.job import Job

    print(Job(config)())
    return 0


def _resume_check(parsed: argparse.Namespace, config: Any) -> int:
    import configs
    from launchers import resume_check

    if parsed.profile:
        raise configs.ConfigError("--profile and --resume-check given; each is a run of its own, so give one of them")
    if parsed.on == "slurm":
        raise configs.ConfigError("--on slurm given; --resume-check runs here, or with --on local --processes N")
    if parsed.dry_run:
        print(configs.dump(resume_check.experiment(config, "killed")))
        return 0
    return resume_check.check(config, parsed.processes if parsed.on == "local" else 1, parsed.config)


def _profile(parsed: argparse.Namespace, config: Any) -> int:
    from pipeline import profiling

    config = profiling.short(config)
    if not parsed.dry_run:
        profiling.clear(Path(config.run))
    code = _run(parsed, config)
    if code == 0 and not parsed.dry_run:
        when = "when the job is done, " if parsed.on == "slurm" else ""
        print(f"{when}where a step goes: {profiling.page(config)}")
    return code


def _on_slurm(parsed: argparse.Namespace, config: Any) -> int:
    import configs
    from launchers import slurm

    where, folder = configs.load(parsed.slurm), Path(config.run) / "logs"
    if parsed.dry_run:
        print(slurm.script(config, where, folder))
        return 0
    print(slurm.submit(config, where, folder))
    return 0


def _predict(parsed: argparse.Namespace) -> int:
    import configs
    from pipeline.predict import predict

    scenes = [item.partition("=") for item in parsed.scene]
    if wrong := [item for item in parsed.scene if "=" not in item]:
        raise configs.ConfigError(f"--scene {wrong[0]!r}: write SENSOR=PATH")
    given = [f"checkpoint={parsed.checkpoint}", f"out={parsed.out}", *parsed.overrides]
    given += [f"scene.{sensor}={path}" for sensor, _, path in scenes]
    print(predict(configs.load("predict", given)))
    return 0


def _export(parsed: argparse.Namespace) -> int:
    from pipeline.export import export

    print(export(parsed.checkpoint, Path(parsed.out)))
    return 0


def _convert(parsed: argparse.Namespace) -> int:
    from pipeline.model.convert import convert, parse_settings

    print(convert(parsed.checkpoint, parsed.out, parse_settings(parsed.settings)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
