"""From a name or a file to a `Task`: built-in data sets, a user's own, the organism's questions."""

import logging
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from mera_tl.organism import prompts as organism
from mera_tl.storage import file_hash, fingerprint
from mera_tl.tasks import datasets, files, scored
from mera_tl.tasks.own import read_own
from mera_tl.tasks.task import All, Example, Task

logger = logging.getLogger(__name__)

ORGANISM_ROWS = 4000
"""How many questions an organism task has."""


def load_task(
    name: str,
    *,
    data_dir: str | Path | None = None,
    template: str | Path | None = None,
    trust_task_code: bool = False,
) -> Task[All]:
    """Load a task by its name, or a user's own by the path of its TOML or YAML file.

    Without `data_dir` rows come from the Hugging Face hub (a user's task: from beside its file).
    With it they come from plain files or a `save_to_disk` folder: `data_dir` is the data set's own
    folder or the one around it. Organism tasks are generated. `template` is a file with another
    wording: columns in braces, taken byte for byte. A scorer that is a function in a Python file
    beside the task's is only run with `trust_task_code`.

    Raises:
        ValueError: if the task is unknown, or its data or template are missing or do not fit.
    """
    if not isinstance(name, str | Path):
        raise ValueError(f'{name!r:.60} is no name of a task; pass one, as load_task("spam_cue").')
    if name in organism.TASKS or name in scored.GENERATED:
        if template:
            raise ValueError(f"{name} is generated with its prompts; leave the template out.")
        return _generated_task(name)
    base = Path(data_dir) if data_dir is not None else None
    if Path(name).suffix in (".toml", ".yaml", ".yml"):
        path = Path(name)
        dataset = read_own(path, trusted=trust_task_code)
        name, base = path.stem, base or (path.parent if dataset.plain else None)
    elif name in datasets.DATASETS:
        dataset = datasets.DATASETS[name]
    else:
        raise ValueError(f"There is no task {name!r}{datasets.nearest(name, task_names())}")
    table, form = _find(name, dataset, base)
    if template:
        form = replace(form, template=files.read_template(Path(template)))
    return _ask(name, table, form, dataset)


def _ask(
    name: str, table: files.Table, form: datasets.Form, dataset: datasets.Dataset
) -> Task[All]:
    """Ask every row that belongs to the task."""
    asked, left_out = datasets.questions(
        table.rows, table.title, form, dataset.options, dataset.grading
    )
    if left_out:
        logger.info("%s: rows left out: %s", name, left_out)
    source = {
        "from": table.title if not table.files else "files",
        "files": {path.name: file_hash(path) for path in table.files},
        "rows": len(asked),
        "left_out": left_out,
        "template": fingerprint(form.template),
    }
    return Task(name, tuple(asked), "all", source)


def _find(
    name: str, dataset: datasets.Dataset, folder: Path | None
) -> tuple[files.Table, datasets.Form]:
    """Find the rows: plain files first, then a `save_to_disk` folder; without a folder, the hub."""
    plain, hub = dataset.plain, dataset.hub
    if folder is None:
        assert hub is not None  # only a user's file has none, and its folder is known
        return files.read_hub(hub.id, hub.config, hub.split), hub.form
    if not folder.is_dir():
        raise ValueError(f"There is no data folder {folder}; check the path.")
    looked_for: list[str] = []
    if plain:
        looked_for.append(f"{plain.folder}/{plain.pattern}")
        for base in (folder / plain.folder, folder):
            # A user's path may be absolute, which no glob takes.
            paths = sorted(base.glob(plain.pattern)) if plain.folder else [base / plain.pattern]
            if paths:
                table = files.read_files(paths, line=plain.line, encoding=plain.encoding)
                return table, plain.form
    if hub:
        names = (name, hub.id.replace("/", "__"))
        looked_for.append(f"a save_to_disk folder {' or '.join(names)}")
        for base in (*(folder / each for each in names), folder):
            if files.is_saved(base):
                return files.read_saved(base, hub.split), hub.form
    raise ValueError(
        f"{folder} holds no data for {name}; put {' or '.join(looked_for)} there, "
        "or point to the folder that has it."
    )


@cache
def _generated_task(name: str) -> Task[All]:
    """Generate the questions of a scored task or of the organism's, always the same ones."""
    if name in scored.GENERATED:
        examples = tuple(scored.GENERATED[name]())
        return Task(name, examples, "all", {"from": "generated", "rows": len(examples)})
    options, asked = organism.TASKS[name].options, organism.generate(name, ORGANISM_ROWS, seed=0)
    examples = tuple(Example(row, text, options, label) for row, (text, label) in enumerate(asked))
    return Task(name, examples, "all", {"from": "organism", "rows": ORGANISM_ROWS, "seed": 0})


def task_names() -> list[str]:
    """List the tasks that `load_task` knows by name."""
    return [*datasets.DATASETS, *scored.GENERATED, *organism.TASKS]


def describe_tasks() -> list[dict[str, Any]]:
    """Say of each task its options and where its rows can come from."""
    rows: list[dict[str, Any]] = []
    for name, dataset in datasets.DATASETS.items():
        plain = f"{dataset.plain.folder}/{dataset.plain.pattern}" if dataset.plain else ""
        hub = dataset.hub.id if dataset.hub else ""
        rows.append({"name": name, "options": dataset.options, "plain": plain, "hub": hub})
    generated = {name: scored.OPTIONS for name in scored.GENERATED}
    generated |= {name: task.options for name, task in organism.TASKS.items()}
    for name, options in generated.items():
        whose = "organism" if name in organism.TASKS else "generated"
        rows.append({"name": name, "options": options, "plain": whose, "hub": ""})
    return [
        row | {"n_classes": len(row["options"]), "scored": row["options"] == scored.OPTIONS}
        for row in rows
    ]
