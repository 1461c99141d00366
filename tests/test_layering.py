"""Modules import strictly downwards; this table is the map of the package."""

import ast
from pathlib import Path

import pytest
from conftest import python

import mera_tl

PACKAGE = Path(mera_tl.__file__).parent
ROOMS = (
    "storage organism plots",
    "models tasks",
    "inference",
    "probes",
    "steering",
    "certificate sae",
    # The workbench; nothing above this line imports from below it.
    "methods evals",
    "benchmark",
    "report",
    "live",
    "cli",
)
"""From the ground up: a room imports rooms of lower floors only, and itself."""
FLOOR_OF = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms.split()}
DOORS = {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}
"""The public face and `python -m mera_tl`: no rooms."""
MODULES = sorted(set(PACKAGE.rglob("*.py")) - DOORS)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(source: str) -> set[str]:
    """Dotted names of what a source imports from mera_tl, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.removeprefix("mera_tl.") for name in names if name.startswith("mera_tl.")}
    return found


def test_the_finder_sees_every_kind_of_import():
    source = "import mera_tl.a\nfrom mera_tl import b\ndef f():\n    from mera_tl.c.d import e\n"
    assert imports_of(source) == {"a", "b", "c.d.e"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_strictly_downwards(path):
    room = room_of(path)
    assert room in FLOOR_OF, f"give {room} a place in the table"
    for name in {name.split(".")[0] for name in imports_of(path.read_text(encoding="utf-8"))}:
        assert name == room or FLOOR_OF[name] < FLOOR_OF[room], f"{room} imports {name}"


def longest_chains() -> dict[str, int]:
    """Floor of every module: the longest chain of imports below it; a circle never ends."""
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in MODULES}
    below = {
        name: {
            part
            for imported in imports_of(path.read_text(encoding="utf-8"))
            for part in (imported, imported.rpartition(".")[0])
            if part in names and part != name
        }
        for name, path in names.items()
    }
    floors: dict[str, int] = {}
    while len(floors) < len(below):
        ready = [n for n in below if n not in floors and below[n] <= floors.keys()]
        assert ready, f"these import each other in a circle: {sorted(below.keys() - floors.keys())}"
        floors |= {n: 1 + max((floors[b] for b in below[n]), default=0) for n in ready}
    return floors


def test_no_module_imports_in_a_circle():
    assert longest_chains()


def test_the_root_is_small_and_every_room_says_what_is_in_it():
    assert len([path for path in PACKAGE.glob("*.py")]) <= 5 and len(ROOMS) <= 11
    for room in FLOOR_OF.keys() - {"storage"}:
        text = (PACKAGE / room / "__init__.py").read_text(encoding="utf-8")
        assert len(ast.get_docstring(ast.parse(text)) or "") > 60, room


def test_only_the_models_import_transformer_lens():
    assert {room_of(path) for path in MODULES if "transformer_lens" in _roots(path)} == {"models"}


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
        ("import mera_tl.organism", ("torch",)),
        ("import mera_tl.tasks", ("torch", "datasets", "pandas", "pyarrow", "yaml")),
        ("import mera_tl.certificate.sample_sizes", ("torch", "pandas")),
        ("import mera_tl.certificate.monitor", ("torch", "pandas", "plotly")),
        ("import mera_tl.certificate.certificate", ("torch", "pandas", "plotly")),
        ("import mera_tl.methods.methods, mera_tl.inference.activations", ("sae_lens", "ray")),
    ],
)
def test_heavy_packages_are_imported_only_where_they_are_needed(statement, banned):
    script = f"{statement}\nimport sys\nprint([m for m in {banned!r} if m in sys.modules])"
    assert python(script).stdout.strip() == "[]"


def test_public_names_are_sorted_documented_and_there():
    assert mera_tl.__all__ == sorted(mera_tl.__all__)
    for name in mera_tl.__all__:
        assert getattr(mera_tl, name).__doc__, name
    with pytest.raises(AttributeError, match="steer_everything"):
        mera_tl.steer_everything  # noqa: B018
