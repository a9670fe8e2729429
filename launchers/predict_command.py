"""`mcf predict`: maps of scenes, here or as an array of jobs on Slurm. Standard library only until it runs."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from launchers.arguments import ConfigHelp, Help


def add_predict(commands: Any) -> None:
    """The command and its arguments."""
    text = "land-cover maps of whole scenes"
    predict = commands.add_parser("predict", help=text, formatter_class=Help, add_help=False)
    predict.add_argument("-h", "--help", action=ConfigHelp, stage="predict")
    predict.add_argument("checkpoint", metavar="CHECKPOINT", help="finetuned run, checkpoint or release folder")
    predict.add_argument("--scene", action="append", default=[], metavar="SENSOR=PATH", help="once per modality")
    predict.add_argument("--catalog", default="", metavar="TABLE", help="or a table of places, a map for each")
    predict.add_argument("--out", required=True, metavar="MAP", help="GeoTIFF to write; of a catalog the folder")
    predict.add_argument("--force", action="store_true", help="map data the model is not made for, and say so in it")
    predict.add_argument("--on", choices=("here", "slurm"), default="here", help="where to run [here]")
    predict.add_argument("--slurm", default="slurm", metavar="CONFIG", help="config of --on slurm [preset slurm]")
    predict.add_argument("--parts", type=int, default=8, metavar="N", help="jobs of the array on slurm [8]")
    predict.add_argument("--throttle", type=int, default=64, metavar="N", help="of them at once [64]")
    predict.add_argument("--dry-run", action="store_true", help="print the config, and do nothing")
    predict.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the config")
    predict.set_defaults(run=_predict)


def _predict(parsed: argparse.Namespace) -> int:
    import configs

    config = _config(parsed)
    if parsed.dry_run:
        print(configs.dump(config))
    elif parsed.on == "slurm":
        print(_submit(parsed, config))
    else:
        from pipeline.predict import predict

        out = predict(config)
        joined = f"part {config.part} is done; when all are, the same command without part= joins them"
        print(out if config.part.endswith("/1") else joined)
    return 0


def _config(parsed: argparse.Namespace) -> Any:
    """The config of what was asked; ConfigError when it cannot be."""
    import configs

    scenes = dict(item.partition("=")[::2] for item in parsed.scene)
    if wrong := [item for item in parsed.scene if "=" not in item]:
        raise configs.ConfigError(f"--scene {wrong[0]!r}: write SENSOR=PATH")
    if len(scenes) < len(parsed.scene):
        raise configs.ConfigError(f"--scene: a sensor twice in {', '.join(parsed.scene)}; a map is of one scene each")
    if not scenes and not parsed.catalog:
        raise configs.ConfigError("no scene: write --scene SENSOR=PATH, once per modality, or --catalog TABLE")
    given = {"checkpoint": parsed.checkpoint, "out": parsed.out, "scene": scenes, "catalog": parsed.catalog}
    preset = configs.to_dict(configs.load("predict", parsed.overrides))
    return configs.parse({**preset, **given, "force": parsed.force or preset["force"]})


def _submit(parsed: argparse.Namespace, config: Any) -> str:
    """Submits an array of parts with something left to do, and a job that joins them; what to say of it."""
    import configs
    from launchers import slurm
    from launchers.job import Job
    from pipeline.predict import unfinished_parts

    if config.part != "1/1" or min(parsed.parts, parsed.throttle) < 1:
        raise configs.ConfigError(
            f"part={config.part}, --parts {parsed.parts}, --throttle {parsed.throttle}: with --on slurm the parts are "
            "made here; leave part= away, and give at least 1"
        )
    left = unfinished_parts(config, parsed.parts)
    jobs = [Job(replace(config, part=f"{part}/{parsed.parts}")) for part in left]
    where, logs = configs.load(parsed.slurm), slurm.logs_of(config)
    array, join = slurm.submit_array(jobs, Job(config), where, logs, parsed.throttle, "mcf-predict")
    parts = f"array {array} of {len(jobs)}" if array else "no part is left to map"
    return f"{parts}, then {join} joins them; logs in {logs}. The same command repeats the parts that failed"
