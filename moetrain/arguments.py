"""What sub-commands have in common: Hydra overrides with a few options between them."""

from __future__ import annotations

import argparse
import os
from typing import NoReturn

from moetrain.compose import options
from moetrain.config import Config
from moetrain.types import ConfigError, Problem

OVERRIDES = """\
Overrides are those of Hydra. group=option chooses a file of conf/GROUP/ and replaces the whole section, whatever the
recipe says of it; section.key=value then sets one value. Folders named after the groups in --config-dir hold options
and recipes of your own. Groups:
  {groups}
"""


class Parser(argparse.ArgumentParser):
    """Options between overrides; a mistake is a ConfigError like any other, so that one rank tells it."""

    def __init__(self, command: str, description: str, *, overrides: bool = True, world: bool = False) -> None:
        shape = argparse.RawDescriptionHelpFormatter
        epilog = OVERRIDES.format(groups=", ".join(_group_names())) if overrides else None
        super().__init__(f"moetrain {command}", None, description, epilog, formatter_class=shape, allow_abbrev=False)
        self.add_argument("--config-dir", metavar="DIR", help="folder with group options of your own")
        if overrides:
            self.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="group=option or section.key=value")
        if world:
            text = "ranks to check for (default: WORLD_SIZE if set, else recipe.world)"
            self.add_argument("--world", type=int, metavar="N", help=text)

    def error(self, message: str) -> NoReturn:
        fix = f"see {self.prog} --help; overrides have no dashes: section.key=value"
        raise ConfigError([Problem("command line", self.prog, message, fix)])


def asked_world(asked: int | None) -> int | None:
    """``--world``, else the number of ranks that torchrun started, else None."""
    if asked is not None and asked < 1:
        raise ConfigError([Problem("--world", asked, "must be at least 1", "set --world 2, say")])
    return asked or environment_world()


def environment_world() -> int | None:
    """The number of ranks that torchrun started, or None when this process was not started by it."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None


def _group_names() -> list[str]:
    return [name for name in Config.__dataclass_fields__ if options(name)]
