"""Scorers grade replies as their tables say; scored tasks are tasks like any other."""

import json

import pytest

from mera_tl.tasks import SCORERS, Scorer, load_task

SCHEMA = {"type": "object", "required": ["answer"], "properties": {"answer": {"type": "string"}}}
TABLE = [
    ("exact_match", {}, "Paris", {"paris": 1, " The  Paris. ": 1, "It is Paris": 0, "": 0}),
    ("exact_match", {}, "two|2", {"2": 1, "Two!": 1, "3": 0}),
    ("exact_match", {}, "+", {"+": 1, " + ": 1, "": 0, "-": 0}),
    ("contains", {}, "cat", {"A Cat sat": 1, "concatenate": 0, "cats": 0, "cat.": 1}),
    ("contains", {"text": "indeed"}, "", {"Indeed, so": 1, "in deed": 0}),
    ("contains", {"text": "?"}, "", {"Really?": 1, "Is it? Yes": 1, "no": 0}),
    ("contains", {"text": "C++"}, "", {"in c++11 or so": 1, "ABC++": 0, "C": 0}),
    ("lacks", {"text": "war"}, "", {"peace": 1, "wary": 1, "the War": 0}),
    ("lacks", {"text": "!"}, "", {"Yes.": 1, "Yes!": 0, "Oh! Well.": 0}),
    ("regex", {"pattern": r"^\d{4}$"}, "", {"1234": 1, "12345": 0}),
    ("numeric", {}, "so it is 1,204", {"1204": 1, "first 3, then 1,204.": 1, "12": 0, "no": 0}),
    ("numeric", {}, "6", {"5-6": 1, "10-4=6": 1, "-6": 0, "it is -6": 0, "x-6": 1}),
    ("numeric", {}, "-5", {"\u22125": 1, "5": 0, "it is 3 \u2212 8 = \u22125.": 1}),
    ("numeric", {"tolerance": 0.1}, "0.01", {"0.0105": 1, "0.05": 0, "0": 0}),
    ("numeric", {"tolerance": 0.1}, "0", {"0.05": 1, "0.2": 0}),
    ("numeric", {"tolerance": 0.01}, "3.14", {"3.15": 1, "3.2": 0, "-3.14": 0}),
    ("begins_with", {}, "yes", {"Yes, it is": 1, '"yes"': 1, "yesterday": 0, "Oh yes": 0}),
    ("ends_with", {"text": "I hope this helps."}, "", {"So. I hope this helps!": 1, "helps.": 0}),
    ("begins_with", {"text": "* "}, "", {"* one": 1, " *one": 1, "one": 0}),
    ("begins_with", {"text": '"'}, "", {'"Yes"': 1, "Yes": 0}),
    ("ends_with", {}, "8", {"It is 8.": 1, "8": 1, "It is 18.": 0}),
    ("ends_with", {"text": "!"}, "", {"Yes!": 1, '"Yes!"': 1, "Yes.": 0, "": 0}),
    ("json_schema", {}, "", {'{"a": 1}': 1, "[]": 1, "3": 0, '{"a": NaN}': 0, "{'a': 1}": 0}),
    ("json_schema", {}, '{"n": null}', {'{"n": null}': 1, "{}": 0, '{"n": 0}': 0}),
    (
        "json_schema",
        {"schema": SCHEMA},
        '{"answer": "Paris"}',
        {
            '{"answer": "paris."}': 1,
            '```json\n{"answer": "Paris"}\n```': 1,
            '{"answer": "Rome"}': 0,
            '{"answer": 1}': 0,
            'Sure: {"answer": "Paris"}': 0,
            '{"answer": "Paris"': 0,
        },
    ),
    ("words", {"most": 3}, "", {"one two three": 1, "- one two three": 1, "a b c d": 0, "": 0}),
    ("one_word", {}, "", {"Paris.": 1, "  Paris ": 1, "It is": 0, "...": 0}),
    ("sentences", {"most": 1}, "", {"It is 3.5 long.": 1, "One. Two.": 0, "One. Tw": 0, "": 0}),
    ("lower_case", {}, "", {"all is well.": 1, "All is well": 0, "123": 0}),
    ("no_comma", {}, "", {"red and blue": 1, "red, blue": 0, "": 0}),
    (
        "numbered_list",
        {"items": 2},
        "",
        {"1. a\n2. b": 1, "1) a\n2) b": 1, "1. a": 0, "1. a\n2. b\n3. c": 0, "1. a\n3. b": 0},
    ),
    (
        "every",
        {"scorers": [{"name": "lower_case"}, {"name": "words", "most": 2}]},
        "",
        {"two words": 1, "Two words": 0, "now three words": 0},
    ),
]


def test_replies_score_as_the_table_says():
    for name, arguments, reference, replies in TABLE:
        scorer = Scorer(name, arguments)
        for reply, expected in replies.items():
            assert scorer(reply, reference) == expected, (name, reply)
    assert {row[0] for row in TABLE} | {"function"} == SCORERS.keys()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("one_wrd", {}, "nearest: one_word"),
        ("words", {"maximum": 3}, "no argument 'maximum'; it takes most, least"),
        ("words", {"most": "three"}, "most = 'three'"),
        ("every", {}, "needs 'scorers'"),
    ],
)
def test_what_no_scorer_takes_is_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        Scorer(name, arguments)


def test_generated_tasks_are_the_same_every_time_and_splits_share_no_question():
    for name in ("ifeval_like_json", "ifeval_like_mixture", "arithmetic_words"):
        task = load_task(name)
        assert task.scored and task.data_hash == load_task(name).data_hash
        splits = task.split(seed=1, train=100, calibration=60, test=60)
        asked = [{e.prompt for e in split.without_instruction().examples} for split in splits]
        assert sum(map(len, asked)) == len(set().union(*asked)) == 220
    assert load_task("arithmetic_words").examples[0].score("so 1 and 0") in (0.0, 1.0)


def test_taking_the_instruction_off_leaves_the_question():
    task = load_task("ifeval_like_one_word")
    example, bare = task.examples[0], task.without_instruction().examples[0]
    assert example.prompt == f"{bare.prompt} {example.instruction}"
    assert example.key == bare.key  # the same text for splits and certificates
    with pytest.raises(ValueError, match="no instruction"):
        load_task("spam_cue").without_instruction()


def test_the_hash_of_a_task_knows_its_scorer():
    from dataclasses import replace

    task = load_task("ifeval_like_words")
    other = replace(task.examples[0], scorer=Scorer("one_word"))
    assert replace(task, examples=(other, *task.examples[1:])).data_hash != task.data_hash


@pytest.fixture
def folder(tmp_path):
    rows = [{"q": f"What is {i} + 1?", "a": i + 1} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_a_task_file_names_a_scorer_and_its_arguments(folder):
    path = folder / "sums.toml"
    path.write_text(
        'data = "rows.jsonl"\ntemplate = "{q}"\nscorer = "numeric"\ntolerance = 0.1\n'
        'reference = "a"\ninstruction = "Reply with a number."\n'
    )
    example = load_task(str(path)).examples[3]
    assert example.prompt == "What is 3 + 1? Reply with a number."
    assert example.options == ("wrong", "right") and example.reference == "4"
    assert example.score("It is 4.") == 1 and example.score("5") == 0
    shown = path.read_text().replace("{q}", "{q} {a}")
    path.write_text(shown)
    with pytest.raises(ValueError, match="is the column 'a', the true answer"):
        load_task(str(path))
    path.write_text(f"{shown}label_in_prompt = true\n")  # such as a word that is to be used
    assert load_task(str(path)).examples[3].prompt == "What is 3 + 1? 4 Reply with a number."
    path.write_text(shown.replace(" {a}", ""))
    lines = [{"q": f"{a}?", "a": a} for a in (1, None, float("nan"), " ", 5)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = load_task(str(path))  # a reference that is missing is not the word None
    assert [example.reference for example in task.examples] == ["1", "5"]
    assert task.source["left_out"] == {"with a blank a": 3}
    path.write_text('data = "rows.jsonl"\ntemplate = "{q}"\nscorer = "numeric"\nreference = "b"\n')
    with pytest.raises(ValueError, match="no column 'b'"):
        load_task(str(path))
    path.write_text('data = "rows.jsonl"\ntemplate = "{q}"\nscorer = "words"\nmst = 3\n')
    with pytest.raises(ValueError, match="unknown key 'mst'"):
        load_task(str(path))


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ('"lacks"', "no reference, and no argument"),  # every reply would be right
        ('"contains"\ntext = " "', "no reference, and no argument"),
        ('"exact_match"', "no reference, and no argument"),
        ('"regex"', "neither a pattern nor a reference"),
        ('"regex"\npattern = "(a"', "missing \\)"),
        ('"numeric"\nreference = "q"', "has no number"),
        ('"json_schema"\nschema = {type = "objekt"}', "objekt"),
        ('"every"\nscorers = [{name = "lacks"}]', "no reference, and no argument"),
        ('"every"\nscorers = []', "Error"),
    ],
)
def test_a_scorer_that_can_grade_no_reply_is_found_when_the_task_is_loaded(folder, scorer, message):
    path = folder / "t.toml"
    (folder / "rows.jsonl").write_text('{"q": "What is it?"}')
    head = 'data = "rows.jsonl"\ntemplate = "{q} ?"\nlabel_in_prompt = true\nscorer = '
    path.write_text(f'{head}"lacks"\ntext = "war"\n')
    assert len(load_task(str(path))) == 1  # the control
    path.write_text(f"{head}{scorer}\n")
    with pytest.raises(ValueError, match=f"row 0 .*{message}"):
        load_task(str(path))


def test_code_of_a_task_runs_only_where_it_is_trusted(folder):
    (folder / "mine.py").write_text("def grade(reply, reference):\n    return 1 / len(reply)\n")
    path = folder / "mine.toml"
    path.write_text('data = "rows.jsonl"\ntemplate = "{q}"\nscorer = "mine.py:grade"\n')
    with pytest.raises(ValueError, match="--trust-task-code"):
        load_task(str(path))
    example = load_task(str(path), trust_task_code=True).examples[5]
    assert example.score("ab") == 0.5
    with pytest.raises(ValueError, match="row 5 with the reply '' .ZeroDivisionError"):
        example.score("")
    (folder / "nan.py").write_text("def grade(reply, reference):\n    return float('nan')\n")
    path.write_text('data = "rows.jsonl"\ntemplate = "{q}"\nscorer = "nan.py:grade"\n')
    with pytest.raises(ValueError, match="row 0 .*it returned NaN"):
        load_task(str(path), trust_task_code=True).examples[0].score("x")


@pytest.mark.parametrize(
    "scorer",
    [
        'scorer = "function"\nfile = {file}\ncall = "grade"',
        'scorer = "every"\nscorers = [{{name = "function", file = {file}, call = "grade"}}]',
    ],
)
def test_code_does_not_run_under_the_name_of_the_scorer_that_runs_it(folder, scorer):
    ran, code, path = (folder / name for name in ("ran", "evil.py", "evil.toml"))
    code.write_text(f"open({str(ran)!r}, 'w')\ndef grade(reply, reference):\n    return 1\n")
    scorer = scorer.format(file=json.dumps(str(code)))
    path.write_text(f'data = "rows.jsonl"\ntemplate = "{{q}}"\n{scorer}\n')
    with pytest.raises(ValueError, match="code of its own .*evil.py"):
        load_task(str(path)).examples[0].score("x")
    assert not ran.exists()
    load_task(str(path), trust_task_code=True).examples[0].score("x")
    assert ran.exists()  # the control


def test_a_task_is_another_one_when_the_code_that_scores_it_changes(folder):
    (folder / "own.toml").write_text(
        'data = "rows.jsonl"\ntemplate = "{q}"\nscorer = "own.py:grade"\n'
    )

    def found(code):
        (folder / "own.py").write_text(f"def grade(reply, reference):\n    {code}\n")
        task = load_task(str(folder / "own.toml"), trust_task_code=True)
        return task.data_hash, task.examples[0].score("x")

    first, again, changed = map(found, ("return 1", "return 1", "return 0.25"))
    assert first == again and changed[0] != first[0]
    assert (first[1], changed[1]) == (1, 0.25)


def test_rows_of_ifeval_are_scored_where_every_instruction_is_known(tmp_path):
    none = dict.fromkeys(("end_phrase", "keywords", "relation", "num_words"))
    rows = [
        {
            "prompt": "Write about rain.",
            "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
            "kwargs": [none, none | {"relation": "less than", "num_words": 4}],
        },
        {"prompt": "A poem.", "instruction_id_list": ["language:response"], "kwargs": [{}]},
    ]
    (tmp_path / "ifeval").mkdir()
    (tmp_path / "ifeval" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = load_task("ifeval", data_dir=tmp_path)
    assert len(task) == 1 and sum(task.source["left_out"].values()) == 1
    example = task.examples[0]
    assert [example.score(r) for r in ("it falls down", "it, falls", "it falls down here")] == [
        1,
        0,
        0,
    ]
