"""What the commands of `mcf` have in common. Standard library only until one runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


class Help(argparse.HelpFormatter):
    """Keeps the lines of descriptions as they are written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


def add_config(parser: argparse.ArgumentParser, stage: str) -> None:
    """Arguments of a command that takes a config: CONFIG, key=value, --dry-run, and a --help that lists the fields."""
    parser.add_argument("-h", "--help", action=ConfigHelp, stage=stage)
    parser.add_argument("config", metavar="CONFIG", help="preset name or YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the config, by dotted path")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")


class ConfigHelp(argparse.Action):
    """`--help` of a stage: usage, then the fields of its config with their defaults."""

    def __init__(self, option_strings: Sequence[str], dest: str, stage: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show this help and exit")
        self.stage = stage

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Prints it and ends the program."""
        import configs

        parser.print_help()
        presets = [name for name in configs.presets() if configs.stage_of(name) == self.stage]
        print(f"\npresets: {', '.join(presets)}\n\nfields of CONFIG, or key=value [default]:")
        print(configs.describe(self.stage))
        parser.exit()


def load(parsed: argparse.Namespace, stage: str) -> Any:
    """The config that a command was given.

    Raises:
        ConfigError: it cannot be used, or is of another stage.
    """
    import configs

    config = configs.load(parsed.config, parsed.overrides)
    if config.stage != stage:
        raise configs.ConfigError(f"{parsed.config}: a config of stage {config.stage!r}; this command runs {stage!r}")
    return config
