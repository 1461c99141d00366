"""From a command line to one of the dataclasses that run, in groups and with short names."""

import ast
import difflib
import inspect
import io
import json
import re
import sys
import textwrap
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from functools import lru_cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args

import tyro
import yaml

from mera_tl.benchmark.config import check
from mera_tl.cli import carried, live, results, steps

COMMANDS = (
    steps.Run,
    steps.Demo,
    results.Report,
    results.Table,
    results.Recommend,
    results.Explain,
    live.Explore,
    steps.Benchmark,
    steps.Preflight,
    steps.Collect,
    steps.Fit,
    steps.Calibrate,
    steps.Evaluate,
    steps.Sae,
    carried.Generate,
    carried.Eval,
    carried.Export,
    results.Plan,
    results.Monitor,
    results.Tasks,
    results.Methods,
    results.Models,
    results.Doctor,
)
DESCRIPTION = """Steer a language model away from its own errors, where that is shown to help.

  $ mera demo
  $ mera run -m organism -t spam_cue
  $ mera run --help
  $ mera --version"""
EXIT_CODES = """Exit codes:
  0    done
  1    a job failed, a guarantee is withdrawn, or a run does not fit
  2    what was asked for cannot be done; one sentence says why
  130  interrupted; a run resumes when it is started again"""
OVERVIEW = {
    "Begin": "demo preflight run benchmark",
    "Look at results": "report recommend explain table explore",
    "Use a certified steering": "generate eval export monitor",
    "One step at a time": "collect fit calibrate evaluate sae",
    "Plan, list, check": "plan tasks methods models doctor",
}
"""Headings of `mera --help`; a command that is in none of them stands under "More"."""
GROUPS = {
    "required": "action model models task tasks steering",
    "data": "data_dir template train calibration test limit seed seeds truncate free_text "
    "other_tasks file trust_task_code",
    "model": "chat system readout answer_prefix max_new_tokens reply_tokens temperature dtype "
    "engine device n_devices anyway",
    "steering": "methods layers positions probe_position probe_penalty strength pairs space spaces "
    "sae sae_sibling sae_correction search_budget",
    "certificate": "min_gain delta max_regressions max_risk primary metric thresholds bound",
    "speed": "batch_size batch_tokens cache shards ray gpus",
    "output": "out config overwrite dry_run strict json verbose quiet",
}
"""Headings of `--help`; what is in none of them stands under "more"."""
ALIASES = {
    "model": ("-m",),
    "models": ("-m", "--model"),
    "task": ("-t", "--tasks"),
    "tasks": ("-t", "--task"),
    "methods": ("--method",),
    "seeds": ("--seed",),
    "spaces": ("--space",),
    "out": ("-o", "--output-path"),
    "verbose": ("-v",),
    "quiet": ("-q",),
    "run": (),
    "shots": ("--num-fewshot",),
}
"""Short names, and what users of lm-evaluation-harness type (`_` and `-` are the same)."""
DEFAULTS = ("--chat", "--apply-chat-template", "--apply_chat_template")
"""Flags that say what holds anyway: taken, and passed over. The opposite is --no-chat."""
HELP = ("help", "-h", "--help")
LISTS = ("--seeds", "--seed", "--spaces", "--space", "--kinds", "--pilot")
"""Options that take several values, with spaces or commas between; names are split later."""
METAVARS = {
    "runs": "FOLDER [FOLDER ...]",
    "run": "FOLDER",
    "prompts": "[PROMPT ...]",
    "seeds": "N[,N...]",
    "spaces": "{raw,sae}[,...]",
    "kinds": "KIND[,KIND...]",
    "pilot": "N N N",
    "train": "N|ROWS",
    "calibration": "N|ROWS",
    "test": "N|ROWS",
    "layers": "LAYERS",
    "search_budget": "TIME",
    "data_dir": "FOLDER",
    "template": "FILE",
    "config": "FILE",
    "out": "PATH",
    "batch_size": "N|auto",
    "methods": "NAME[,NAME...]",
    "models": "NAME[,NAME...]",
    "tasks": "NAME[,NAME...]",
    "task": "NAME[,NAME...]",
    "other_tasks": "NAME[,NAME...]",
}
_TESTS = " free_text other_tasks"
HIDDEN = {
    "Preflight": GROUPS["steering"] + " " + GROUPS["certificate"] + _TESTS,
    "Collect": GROUPS["steering"] + " " + GROUPS["certificate"] + _TESTS,
    "Fit": GROUPS["certificate"] + " methods positions strength search_budget" + _TESTS,
    "Calibrate": _TESTS,
}
"""Options of the folder's configuration that mean nothing to a step: taken, but not shown."""
LEFT_OUT = {
    "Sae": GROUPS["certificate"] + " positions probe_position strength pairs space sae_correction"
    " calibration test free_text other_tasks search_budget",
    "Doctor": GROUPS["certificate"] + " strength pairs",
}
"""Options that a command inherits and has no use for."""


def parse(argv: Sequence[str]) -> Any:
    """Return the command that was asked for; exit with 2 and a box that says what is wrong."""
    argv = _as_meant([word for word in _with_file(argv) if word not in DEFAULTS])
    by_name = {kind.__name__.lower(): kind for kind in COMMANDS}
    if not argv or argv[0] in HELP:
        print(_overview(by_name))
        sys.exit(0 if argv else 2)
    if argv[0] in by_name:
        kind = by_name[argv[0]]
        plain = (tyro.conf.FlagCreatePairsOff,)
        prog = f"mera {argv[0]}"
        helps = not {"-h", "--help"}.isdisjoint(argv)
        if helps:
            print(_about(kind) + "\n")
        with _short_usage():
            parsed = tyro.cli(
                _nested(kind, hide=helps), prog=prog, description="", args=argv[1:], config=plain
            )
        command = kind(**_flat(parsed))
        check(command)
        return command
    near = difflib.get_close_matches(argv[0].lower(), [*by_name, "help"], n=1)
    advice = f"did you mean `mera {near[0]}`?" if near else "`mera --help` lists the commands."
    raise ValueError(f"There is no command {argv[0]!r}; {advice}")


def _as_meant(argv: Sequence[str]) -> list[str]:
    """Return a command line as it is parsed, whichever of the usual ways it is written in."""
    first, rest = argv[:1], list(argv[1:])
    if rest and first[0] in HELP:
        first, rest = rest[:1], [*rest[1:], "--help"]
    if rest and not rest[0].startswith("-"):  # what these begin with may also be left out
        rest[:0] = {"explore": ["--run"], "models": ["--search"]}.get("".join(first), [])
    if first and first[0] in ("table", "report", "recommend", "explain"):
        rest = [word for word in rest if word not in ("--run", "--runs")]  # they go without
    parted: list[str] = []
    for word, before in zip(rest, ["", *rest], strict=False):
        parted += word.split(",") if before in LISTS else [word]
    return [*first, *parted]


def _overview(by_name: Mapping[str, type]) -> str:
    """Return what there is to do, in groups, a line or two per command."""
    listed = {name for names in OVERVIEW.values() for name in names.split()}
    more = {"More": " ".join(name for name in by_name if name not in listed)}
    lines = [DESCRIPTION]
    for title, names in (OVERVIEW | more).items():
        lines += [f"\n{title}:"] if names else []
        for name in names.split():
            first = (by_name[name].__doc__ or "").partition("\n")[0]
            hanging: Any = {"initial_indent": f"  {name:<11}", "subsequent_indent": " " * 13}
            lines.append(textwrap.fill(first, 80, **hanging))
    return "\n".join([*lines, f"\n{EXIT_CODES}"])


def _about(kind: type) -> str:
    """Return what a command does, in lines of 80 columns; examples stay as they are."""
    parts = inspect.cleandoc(kind.__doc__ or "").split("\n\n")
    return "\n\n".join(p if p.startswith(" ") else textwrap.fill(p, 80) for p in parts)


@contextmanager
def _short_usage() -> Iterator[None]:
    """Print what is printed meanwhile, a usage line in lines of 80 columns: tyro's has no end."""
    page, screen = io.StringIO(), sys.stdout
    page.isatty = screen.isatty  # colours as there
    sys.stdout = page
    try:
        yield
    finally:
        sys.stdout = screen
        usage, rest, after = page.getvalue().partition("\n")
        whole = re.sub(r"\[-[^]]*\]", lambda option: option[0].replace(" ", "\xa0"), usage)
        usage = textwrap.fill(whole, 80, subsequent_indent="    ", break_on_hyphens=False)
        screen.write(usage.replace("\xa0", " ") + rest + after)


def _nested(kind: Any, *, hide: bool = False) -> Any:
    """Return a dataclass like `kind` whose fields lie in groups; a small one stays flat."""
    texts, name = _help_texts(kind), kind.__name__
    hidden, left_out = HIDDEN.get(name, "").split(), LEFT_OUT.get(name, "").split()
    groups: dict[str, list[Any]] = {}
    for option in fields(kind):
        if option.name not in left_out:
            inside = (group for group, names in GROUPS.items() if option.name in names.split())
            made = _option(option, texts[option.name], shown=not (hide and option.name in hidden))
            groups.setdefault(next(inside, "more"), []).append(made)
    if len(fields(kind)) < 12:
        own = [each for group in groups.values() for each in group]
    else:
        own = [_group(g, groups[g]) for g in (*GROUPS, "more") if g in groups]
    return make_dataclass(name, own, kw_only=True, namespace={"__doc__": ""})


def _group(name: str, own: list[Any]) -> Any:
    made = make_dataclass(name, own, kw_only=True)
    needed = any(each[2].default is MISSING for each in own)
    name = "run" if name == "required" and not needed else name
    default = field() if needed else field(default_factory=made)
    return name, tyro.conf.OmitArgPrefixes[made], default


def _option(option: Any, text: str, *, shown: bool) -> Any:
    kind, default = option.type, option.default
    if option.name == "batch_size":
        kind, default = int | Literal["auto"], "auto"
    plain = option.default in (None, MISSING, (), "") or isinstance(option.default, bool)
    about = tyro.conf.arg(
        help=text,
        aliases=ALIASES.get(option.name),
        metavar=METAVARS.get(option.name) or _metavar(kind),
        help_behavior_hint="" if plain or "Default:" in text else None,
        constructor=_typed(kind),
    )
    kind = Annotated[kind, about]
    return option.name, kind if shown else tyro.conf.Suppress[kind], field(default=default)


def _typed(kind: Any) -> Any:
    """Return what may be typed for an option that may be None, which is its default only."""
    given = [each for each in get_args(kind) if each is not NoneType]
    return given[0] if NoneType in get_args(kind) else None


def _metavar(kind: Any) -> str | None:
    """Return a short word for optional values, where tyro's would name None too."""
    names = {str | None: "TEXT", int | None: "N", float | None: "X", Path | None: "PATH"}
    return (names | {str: "TEXT", int: "N", float: "X", Path: "PATH"}).get(kind)


@lru_cache(maxsize=64)
def _help_texts(kind: type) -> dict[str, str]:
    """Return the text below every field of a dataclass and of those it inherits from."""
    texts: dict[str, str] = {}
    for each in reversed([c for c in kind.__mro__ if is_dataclass(c)]):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        body = node.body if isinstance(node, ast.ClassDef) else []
        for option, below in zip(body, body[1:], strict=False):
            if isinstance(option, ast.AnnAssign) and isinstance(below, ast.Expr):
                text = ast.literal_eval(below.value)
                texts[ast.unparse(option.target)] = " ".join(text.split())
    return texts


def _flat(parsed: Any) -> dict[str, Any]:
    """Return the values of all groups; names that come in commas are taken apart."""
    values = {**vars(parsed)}
    for group in [value for value in values.values() if is_dataclass(value)]:
        values |= vars(group)
    values = {name: value for name, value in values.items() if not is_dataclass(value)}
    if values.get("batch_size") == "auto":
        values["batch_size"] = None
    for name in {"methods", "models", "tasks"} & values.keys():
        values[name] = tuple(part for text in values[name] for part in text.split(","))
    return values


def _with_file(argv: Sequence[str]) -> list[str]:
    """Put the options of `--config FILE` before those of the command line, which override them."""
    split = [text.split("=", 1) if text.startswith("--config=") else [text] for text in argv]
    argv = [part for parts in split for part in parts]
    if "--config" not in argv[:-1]:
        return argv
    path = Path(argv[argv.index("--config") + 1])
    readers = {".toml": tomllib.loads, ".json": json.loads}
    try:
        values = readers.get(path.suffix, yaml.safe_load)(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as options ({reason}); correct it.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no options; write them as `name: value`, one a line.")
    told: list[str] = []
    for name, value in values.items():
        if value is False and f"--{name}" in DEFAULTS:
            told.append(f"--no-{name}")
        if value is None or value is False:
            continue
        listed = value if isinstance(value, list) else [] if value is True else [value]
        told += ["--" + str(name).replace("_", "-"), *map(str, listed)]
    return [*argv[:1], *told, *argv[1:]]
