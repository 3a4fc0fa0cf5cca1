"""``moetrain routers`` and ``moetrain routers compare``."""

from __future__ import annotations

from pathlib import Path

from moetrain.arguments import Parser, asked_world
from moetrain.compose import ROUTER, compose
from moetrain.parity.record import read_record, write_record
from moetrain.problems import nearest
from moetrain.survey.catalogue import catalogue
from moetrain.survey.references import measured_again
from moetrain.survey.report import write_reports
from moetrain.survey.runs import Asked, carry_out, launcher, notes_of, plan_comparison
from moetrain.survey.table import as_json, print_table
from moetrain.types import ConfigError, Problem

COMPARE = "compare"
FAILED = 1


def routers(arguments: list[str]) -> int:
    """The table, or a comparison. Returns the exit code. Raises ConfigError."""
    if arguments[:1] == [COMPARE]:
        return _compare(arguments[1:])
    if arguments and "=" not in arguments[0] and not arguments[0].startswith(("-", "~")):
        raise ConfigError([_no_command(arguments[0])])
    description = f"Every option of conf/router and what is known of it. See also: moetrain routers {COMPARE} --help."
    parser = Parser("routers", description)
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    text = "compare with the blocks of transformers here and now, instead of telling what was recorded"
    parser.add_argument("--measure", action="store_true", help=text)
    text = "measure, and replace moetrain's record, for those who change moetrain"
    parser.add_argument("--record", action="store_true", help=text)
    parsed = parser.parse_intermixed_args(arguments)
    if ours := [text for text in parsed.overrides if text.startswith((f"{ROUTER}=", f"{ROUTER}."))]:
        fix = f"leave it out; to train some of them: moetrain routers {COMPARE} router=a,b"
        raise ConfigError([Problem(ROUTER, ours[0], "the table shows every option as its file says", fix)])
    record = measured_again() if parsed.measure or parsed.record else read_record()
    if parsed.record:
        write_record(list(record.cases))
    rows = catalogue(compose(parsed.overrides, None, parsed.config_dir), parsed.config_dir)
    if parsed.json:
        print(as_json(rows, record))
    else:
        print_table(rows, record)
    return 0


def _no_command(word: str) -> Problem:
    near = nearest(word, [COMPARE])
    fix = f"write moetrain routers {near} router=a,b" if near else "moetrain routers alone lists all of them"
    return Problem("command", f"routers {word}", f"the only sub-command of moetrain routers is {COMPARE}", fix)


def _compare(arguments: list[str]) -> int:
    parser = Parser(f"routers {COMPARE}", "Train routers at equal budget and seeds, and write one report.")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each, from run.seed on (default 3)")
    parser.add_argument("--world", type=int, metavar="N", help="ranks of each run (default: recipe.world)")
    out = "folder of the runs and the report; what it holds is not done again (default outputs/routers)"
    parser.add_argument("--out", type=Path, default=Path("outputs/routers"), metavar="DIR", help=out)
    text = "published: each router with the balance option its file names; same: the recipe's, as all capacity is"
    parser.add_argument("--balance", choices=("published", "same"), default="published", help=text)
    parsed = parser.parse_intermixed_args(arguments)
    world = asked_world(parsed.world)
    asked = Asked(tuple(parsed.overrides), parsed.config_dir, parsed.out, world, parsed.seeds, parsed.balance)
    comparison = plan_comparison(asked)
    for note in notes_of(comparison):
        print(note)
    failures = carry_out(comparison, launcher(comparison.world, asked.config_dir), lambda line: print(line, flush=True))
    words = ["moetrain", "routers", COMPARE, *arguments]
    print(f"report in {write_reports(comparison, failures, asked.balance, words, asked.out)}")
    for failure in failures:
        print(f"\n{failure.name} FAILED, log in {failure.log}:\n  " + "\n  ".join(failure.tail))
    return FAILED if failures else 0
