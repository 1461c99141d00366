"""The list of mutants keeps up with the code."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_mutant_names_one_place():
    listed = (ROOT / "experiments/mutants.toml").read_text(encoding="utf-8")
    mutants = tomllib.loads(listed)["mutant"]
    assert len(mutants) > 60 and len({each["says"] for each in mutants}) == len(mutants)
    for each in mutants:
        text = (ROOT / each["file"]).read_text(encoding="utf-8")
        assert text.count(each["old"]) == 1, f"{each['file']}: {each['says']}"
        assert all((ROOT / part).exists() for part in each["tests"].split() if ".py" in part)
