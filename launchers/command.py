"""The command line, `mcf`. Imports only the standard library until a command runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launchers import is_message
from launchers.arguments import ConfigHelp, Help, add_config, load
from launchers.predict_command import add_predict
from launchers.shards_command import add_shards

STAGES = {
    "pretrain": "self-supervised pretraining (CMSS) on unlabeled shards",
    "finetune": "train for land cover, from a checkpoint or from scratch",
    "evaluate": "metrics of a finetuned checkpoint on labelled samples",
}


JOBS = {
    "logs": "what its ranks have said, rank 0 first",
    "cancel": "let it save, and end it",
    "requeue": "let it save, and start it again",
}


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
    add_shards(commands)
    for name, text in STAGES.items():
        stage = commands.add_parser(name, help=text, formatter_class=Help, add_help=False)
        add_config(stage, name)
        stage.add_argument("--on", choices=("here", "local", "slurm"), default="here", help="where to run [here]")
        stage.add_argument("--processes", type=int, default=2, help="ranks with --on local [2]")
        stage.add_argument("--slurm", default="slurm", metavar="CONFIG", help="config of --on slurm [preset slurm]")
        if name != "evaluate":
            described = "kill a short run beside this one, here or local, and prove that it goes on exactly"
            stage.add_argument("--resume-check", action="store_true", help=described)
            described = "run a few steps beside this run and tell on a page where their time goes"
            stage.add_argument("--profile", action="store_true", help=described)
            described = "of one step, for the plan; what the run measured before, where it is not given"
            stage.add_argument("--step-seconds", type=float, metavar="S", help=described)
        stage.set_defaults(run=_stage, stage=name)
    chain = commands.add_parser(
        "run", help="stages one after the other, as a file says", formatter_class=Help, add_help=False
    )
    add_config(chain, "chain")
    chain.add_argument("--on", choices=("here", "local", "slurm"), default="here", help="where to run [here]")
    chain.add_argument("--processes", type=int, default=2, help="ranks of the training stages with --on local [2]")
    chain.set_defaults(run=_chain)
    _add_jobs(commands)
    doctor = commands.add_parser("doctor", help="look at this machine, and at what a run of a config needs of it")
    doctor.add_argument("config", nargs="?", metavar="CONFIG", help="preset name or YAML file")
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the config")
    doctor.add_argument("--slurm", metavar="CONFIG", help="where the run is to go: a config of stage slurm")
    doctor.set_defaults(run=_doctor)
    add_predict(commands)
    _add_export(commands)
    convert = commands.add_parser("convert", help="a public MCF-Mamba or VMamba checkpoint to a release folder")
    convert.add_argument("checkpoint", metavar="CHECKPOINT", help="file of torch.save or safetensors")
    convert.add_argument("out", metavar="OUT", help="release folder to write")
    described = "bands=NAME:COUNT,...: the modalities; a VMamba backbone needs them"
    convert.add_argument("settings", nargs="*", metavar="key=value", help=described)
    convert.set_defaults(run=_convert)
    return parser


def _add_jobs(commands: Any) -> None:
    jobs = commands.add_parser("jobs", help="what runs on Slurm; logs, cancel, requeue of a run")
    jobs.set_defaults(run=_jobs, verb="table")
    verbs = jobs.add_subparsers(metavar="VERB")
    for name, text in JOBS.items():
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("job", metavar="RUN", help="run folder or job id")
        if name == "logs":
            verb.add_argument("--follow", action="store_true", help="go on until the job ends")
        verb.set_defaults(run=_jobs, verb=name)


def _add_export(commands: Any) -> None:
    export = commands.add_parser("export", help="a checkpoint to a release", formatter_class=Help, add_help=False)
    export.add_argument("-h", "--help", action=ConfigHelp, stage="export")
    export.add_argument("checkpoint", metavar="RUN", help="run (its newest checkpoint), RUN/best, or checkpoint")
    export.add_argument("out", metavar="OUT", help="release to write, a folder or s3://")
    export.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the export config")
    export.set_defaults(run=_export)


def _demo(parsed: argparse.Namespace) -> int:
    from launchers.demo import demo

    return demo(Path(parsed.out))


def _stage(parsed: argparse.Namespace) -> int:
    config = load(parsed, parsed.stage)
    if getattr(parsed, "resume_check", False):
        return _resume_check(parsed, config)
    return _profile(parsed, config) if getattr(parsed, "profile", False) else _run(parsed, config)


def _run(parsed: argparse.Namespace, config: Any) -> int:
    import configs

    where = configs.load(parsed.slurm) if parsed.on == "slurm" else None
    if parsed.dry_run:
        return _dry_run(parsed, config, where)
    if where:
        return _on_slurm(parsed, config, where)
    if parsed.on == "local":
        from launchers.local import run

        return run(config, parsed.processes, Path(config.run) / "logs")
    from launchers.job import Job

    print(Job(config)())
    return 0


def _dry_run(parsed: argparse.Namespace, config: Any, where: Any) -> int:
    """Prints config, plan and batch script; 1 if the run cannot be."""
    import configs

    print(configs.dump(config))
    code = 0
    if parsed.stage != "evaluate":
        from launchers.plan import PlanError

        try:
            print(_plan(parsed, config, where))
        except Exception as error:
            if not is_message(error):
                raise
            code = int(isinstance(error, PlanError))  # data may be made by a job before
            print(f"mcf: {'this run cannot be' if code else 'no plan'}: {error}", file=sys.stderr)
    if where:
        from launchers import slurm

        print(f"\n{slurm.script(config, where, slurm.logs_of(config))}")
    return code


def _plan(parsed: argparse.Namespace, config: Any, where: Any) -> str:
    """What the run will take; an error where it cannot be."""
    from launchers.plan import plan

    ranks = where.nodes * where.ranks_per_node if where else parsed.processes if parsed.on == "local" else 1
    return plan(config, ranks, where, parsed.step_seconds).text()


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


def _on_slurm(parsed: argparse.Namespace, config: Any, where: Any) -> int:
    from launchers import slurm

    if parsed.stage != "evaluate":
        print(_plan(parsed, config, where), file=sys.stderr)
    print(slurm.submit(config, where, slurm.logs_of(config)))
    return 0


def _chain(parsed: argparse.Namespace) -> int:
    from launchers import chain

    config = load(parsed, "chain")
    if parsed.dry_run:
        print(chain.plan(config, parsed.on, parsed.processes))
        return 0
    if parsed.on == "slurm":
        print("\n".join(f"{name}: {job}" for name, job in chain.submit(config)))
        return 0
    return chain.run(config, parsed.processes if parsed.on == "local" else 0)


def _jobs(parsed: argparse.Namespace) -> int:
    from launchers import jobs

    if parsed.verb == "logs" and parsed.follow:
        jobs.follow(parsed.job)
    elif parsed.verb == "table":
        print(jobs.table())
    else:
        print({"logs": jobs.logs, "cancel": jobs.cancel, "requeue": jobs.requeue}[parsed.verb](parsed.job))
    return 0


def _doctor(parsed: argparse.Namespace) -> int:
    import configs
    from launchers.doctor import doctor
    from launchers.preflight import table

    config = configs.load(parsed.config, parsed.overrides) if parsed.config else None
    findings = doctor(config, configs.load(parsed.slurm) if parsed.slurm else None)
    print(table(findings))
    return int(any(not finding.ok for finding in findings))


def _export(parsed: argparse.Namespace) -> int:
    import configs
    from pipeline.export import export

    given = [f"checkpoint={parsed.checkpoint}", f"out={parsed.out}", *parsed.overrides]
    print(export(configs.load("export", given)))
    return 0


def _convert(parsed: argparse.Namespace) -> int:
    from pipeline.model.convert import convert, parse_settings

    print(convert(parsed.checkpoint, parsed.out, parse_settings(parsed.settings)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
