"""Modules import strictly downwards; this table is the map of the package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mera_tl

PACKAGE = Path(mera_tl.__file__).parent
LAYERS = (
    "bounds catalogue cluster config organism outcomes page plots progress rotary rules scoring "
    "plain sources spaces sparse splits store",
    "checkpoints monitor planning protocol solvers subcommands tasks tracking",
    "certificate logistic models wide",
    "calibration decoding folds sae",
    "readout",
    "evaluation",
    "activations continuations sae_training",
    "probes",
    "directions probing steering",
    "gains latents reach",
    "candidates ledger",
    "search",
    "flip methods",
    "controlled",
    "benchmark",
    "doctor frames grid memory shards",
    "report",
    "commands",
    "cli",
)
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names.split()}
MODULES = sorted(path for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imports_of(source: str) -> set[str]:
    """Names of mera_tl modules that a source imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "mera_tl":
                names = [f"mera_tl.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("mera_tl.")}
    return found


def test_the_finder_sees_every_kind_of_import():
    source = "import mera_tl.a\nfrom mera_tl import b\ndef f():\n    from mera_tl.c.d import e\n"
    assert imports_of(source) == {"a", "b", "c"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_go_strictly_downwards(path):
    assert path.stem in LAYER_OF, f"give {path.stem} a place in the table"
    for name in imports_of(path.read_text(encoding="utf-8")):
        assert LAYER_OF[name] < LAYER_OF[path.stem], f"{path.stem} imports {name}"


def test_only_three_modules_import_transformer_lens():
    users = {path.stem for path in MODULES if "transformer_lens" in _roots(path)}
    assert users == {"models", "checkpoints", "plain"}


def _roots(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    froms = {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    plain = {
        a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names
    }
    return froms | plain


@pytest.mark.parametrize(
    ("statement", "banned"),
    [
        ("import mera_tl", ("torch", "pandas", "transformers")),
        ("import mera_tl.cli", ("torch", "pandas", "transformers", "plotly")),
        ("import mera_tl.tasks", ("torch", "datasets", "pandas")),
        ("import mera_tl.planning", ("torch", "pandas")),
        ("import mera_tl.activations, mera_tl.methods", ("sae_lens", "ray")),
    ],
)
def test_heavy_packages_are_imported_only_where_they_are_needed(statement, banned):
    script = f"{statement}\nimport sys\nprint([m for m in {banned!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_public_names_are_sorted_documented_and_there():
    assert mera_tl.__all__ == sorted(mera_tl.__all__)
    for name in mera_tl.__all__:
        assert getattr(mera_tl, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'steer_everything'"):
        mera_tl.steer_everything  # noqa: B018
