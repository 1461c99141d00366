"""The README's Python runs as it stands, and prints what stands below it."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", README, flags=re.DOTALL)


def test_the_readme_runs_and_prints_what_it_says(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = blocks("python")
    names: dict = {}
    exec(first, names)
    said = capsys.readouterr().out.strip().splitlines()
    assert said == blocks("text")[0].strip().splitlines()
    # What one types first must show the tool doing something.
    assert said[0].startswith("STEER") and names["after"].accuracy > names["before"].accuracy + 0.2
    exec(second, names)  # "in your own code" goes on from there
    assert names["replies"][0].text.split()[0] in names["task"].options
    assert (tmp_path / "spam_cue-steering" / "README.md").exists()


def test_both_rules_are_told_and_a_base_rate_put_right_is_called_so():
    rules = README[: README.index("## Start")]
    assert "```math" in rules and "fixed length" in rules
    real = next(p for p in README.split("\n\n") if "14 of 30 messages right" in p)
    assert "base rate" in real.partition(".")[0]  # in the same sentence
    assert "/tmp" not in README and "/home" not in README


def test_it_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 150
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert len(links) > 4
    for link in links:
        assert (Path(__file__).parents[1] / link).exists(), link
