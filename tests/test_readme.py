"""The README's Python runs as it stands."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_readme_runs(capsys):
    code = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(code) == 1
    exec(code[0], {})
    decision, _, accuracy = capsys.readouterr().out.strip().splitlines()
    assert decision.startswith(("STEER", "ABSTAIN"))
    assert 0.3 < float(accuracy) <= 1


def test_ten_lines_are_enough():
    code = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
