"""A user's own data set: the keys of a TOML or YAML file, checked one by one."""

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mera_tl.tasks import scored
from mera_tl.tasks.datasets import FIELD, Dataset, Form, Hub, Plain, nearest
from mera_tl.tasks.files import read_keys, read_template
from mera_tl.tasks.scorers import SCORERS, Scorer, arguments_of

_FORM_KEYS = tuple(each.name for each in fields(Form) if each.name != "prepare")
_KINDS: dict[str, type] = {
    "options": list,
    **dict.fromkeys(("data", "hub", "config", "split", "encoding", *_FORM_KEYS), str),
    **dict.fromkeys(("columns", "labels", "keep"), dict),
    "label_in_prompt": bool,
}
"""What each key of a file holds."""


def read_own(path: Path, *, trusted: bool = False) -> Dataset:
    """Read a data set from a task file; its wording may be a file of its own, `template_file`.

    Raises:
        ValueError: if the file cannot be read, or as `definition`.
    """
    keys = read_keys(path)
    if {"template", "template_file"} <= keys.keys():
        raise ValueError(f"{path} has template and template_file; leave one of them out.")
    if "template_file" in keys:
        keys["template"] = read_template(path.parent / str(keys.pop("template_file")))
    return definition(keys, str(path), trusted=trusted)


def definition(keys: Mapping[str, Any], title: str, *, trusted: bool = False) -> Dataset:
    """Make a data set of the keys in a user's file.

    A file with the key `scorer` is a scored task: beside it stand the scorer's arguments and, if
    any, `instruction` and `reference` (a column); it has no options and no labels.
    Others have `options`. All have `template` and either `data` (the path of a csv, tsv, jsonl or
    parquet file) or `hub` (a data set's id on the Hugging Face hub, with `split` and `config`);
    and, where they differ from the defaults, `encoding` and the fields of `Form`.

    Raises:
        ValueError: if a key is missing, unknown or ill-typed, or options and labels do not fit.
    """
    if "scorer" in keys:
        return _scored_definition(keys, title, trusted)
    _check_kinds(keys, title)
    for key in ("options", "template"):
        if not keys.get(key):
            raise ValueError(f"{title} has no {key!r}; a task needs options, template and data.")
    if ("data" in keys) == ("hub" in keys):
        raise ValueError(
            f"{title} has {'both' if 'data' in keys else 'neither'} 'data' (a file) and 'hub' (an "
            "id on the Hugging Face hub); a task needs one of them."
        )
    _check_tables(keys, title)
    options, labels = tuple(keys["options"]), keys.get("labels", {})
    for word in (*options, *labels.values()):
        if not isinstance(word, str):
            raise ValueError(
                f"{title} has the option {word!r}, which is not text; put it in quotes "
                '(YAML reads a bare yes or no as true or false: write "yes").'
            )
    if len({option.strip().casefold() for option in options} - {""}) < max(2, len(options)):
        raise ValueError(f"{title} has options {options}; give two or more different ones.")
    if unknown := set(labels.values()) - set(options):
        raise ValueError(
            f"{title} maps labels to {', '.join(sorted(unknown))}, but the options are "
            f"{', '.join(options)}; map every label to an option."
        )
    form = Form(**{key: keys[key] for key in _FORM_KEYS if key in keys})
    form.check(title)
    if "hub" in keys:
        hub = Hub(keys["hub"], keys.get("split", "train"), form, keys.get("config"))
        return Dataset(options, hub=hub)
    return Dataset(options, Plain("", keys["data"], form, encoding=keys.get("encoding", "utf-8")))


def _scored_definition(keys: Mapping[str, Any], title: str, trusted: bool) -> Dataset:
    """Make a scored data set of a user's keys."""
    name, rest = str(keys["scorer"]), {k: v for k, v in keys.items() if k != "scorer"}
    for key in ("options", "label", "labels"):
        if key in rest:
            raise ValueError(
                f"{title} has a scorer and {key!r}; a scored task has a `reference` column instead."
            )
    path, colon, call = name.rpartition(":")
    if colon and path.endswith(".py"):
        scorer = Scorer("function", {"file": str(Path(title).parent / path), "call": call})
    else:
        taken = arguments_of(name) if name in SCORERS else ()
        given = {key: rest.pop(key) for key in taken if key in rest}
        try:
            scorer = Scorer(name, given)
            _ = scorer.own_code  # names and arguments of several scorers are looked at, too
        except ValueError as error:
            raise ValueError(f"{title}: {error}") from None
    if scorer.own_code and not trusted:
        raise ValueError(
            f"{title} scores replies by code of its own ({', '.join(scorer.own_code)}); read it, "
            "and pass --trust-task-code (trust_task_code=True) to let it run."
        )
    told = {key: rest.pop(key) for key in ("instruction", "reference") if key in rest}
    for key, value in told.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{title} has {key} = {value!r}; write text there.")
    # The rest is what every task file has.
    plain = definition({**rest, "options": list(scored.OPTIONS)}, title)
    grading = scored.Grading(scorer, **told)

    def unlabelled(source: Any) -> Any:
        return source and replace(source, form=replace(source.form, label=""))

    return Dataset(scored.OPTIONS, unlabelled(plain.plain), unlabelled(plain.hub), grading)


def _check_tables(keys: Mapping[str, Any], title: str) -> None:
    """Check what `columns`, `keep` and `labels` hold."""
    used = FIELD.findall(keys["template"])
    for name, columns in keys.get("columns", {}).items():
        listed = columns if isinstance(columns, list) else [columns]
        if not listed or not all(isinstance(column, str) and column for column in listed):
            raise ValueError(f"{title} has columns.{name} = {columns!r}; write columns' names.")
        if name not in used:
            raise ValueError(
                f"{title} has columns.{name}, but the template has no field {{{name}}}"
                f"{nearest(str(name), used)}"
            )
    for column, pattern in keys.get("keep", {}).items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"{title} has keep.{column} = {pattern!r}, which is no pattern ({error})."
            ) from None
    given = [str(value).strip().casefold() for value in keys.get("labels", {})]
    if len(set(given)) < len(given):
        raise ValueError(f"{title} has a label twice in 'labels'; case does not count.")


def _check_kinds(keys: Mapping[str, Any], title: str) -> None:
    """Check that every key is known, and holds what it should."""
    for key, value in keys.items():
        if key not in _KINDS:
            raise ValueError(f"{title} has an unknown key {key!r}{nearest(key, _KINDS)}")
        if not isinstance(value, _KINDS[key]):
            words = {list: "a list", dict: "a table", str: "text", bool: "true or false"}
            raise ValueError(f"{title} has {key} = {value!r}; write {words[_KINDS[key]]} there.")
        if isinstance(value, str) and key != "text" and not value.strip():
            raise ValueError(f"{title} has an empty {key!r}; write it out, or leave the key out.")
