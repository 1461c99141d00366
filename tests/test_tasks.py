"""Tasks: no text in two splits, prompts byte for byte, rows numbered as at their source."""

import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pytest
import yaml
from conftest import SHARED

from mera_tl.organism import generate
from mera_tl.tasks import Example, Task, load_task, loading
from mera_tl.tasks import datasets as catalogue

DATA = SHARED / "data"
SMS = DATA / "sms_spam" / "SMSSpamCollection"
SMS_TEMPLATE = SHARED / "models" / "sms-llama" / "prompt_template.txt"
real_data = pytest.mark.skipif(not SMS.exists(), reason="needs ../shared/data")


def make_task(texts: list[str], labels: list[int] | None = None) -> Task:
    options = ("ham", "spam")
    labels = labels or [row % 2 for row in range(len(texts))]
    examples = [
        Example(row, f"Message: {text}\nAnswer:", options, label, text)
        for row, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]
    return Task("toy", tuple(examples), "all")


def with_duplicates(n: int = 200) -> Task:
    """Every third text recurs, in another case and with wider gaps."""
    return make_task([f"Text {i}" if i % 3 else f"tExt   {i - i % 9}" for i in range(n)])


def straddles(*parts: Task) -> bool:
    keys = [{example.key for example in part.examples} for part in parts]
    return len(set.union(*keys)) < sum(map(len, keys))


def rows(task: Task) -> list[int]:
    return [example.row for example in task.examples]


# --- splits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sizes", [{}, {"train": 90, "calibration": 30, "test": 30}, {"test": 20}])
def test_no_row_and_no_text_is_in_two_splits(seed: int, sizes: dict[str, int]) -> None:
    task = with_duplicates()
    blind = [task.subset(range(start, start + 50)) for start in (0, 50, 100)]
    assert straddles(*blind)  # the danger is real: cutting by rows does share texts
    parts = task.split(seed, **sizes)
    assert not straddles(*parts)
    assert len({row for part in parts for row in rows(part)}) == sum(map(len, parts))
    for role, size in sizes.items():
        assert len(getattr(parts, role)) == size
    assert [part.role for part in parts] == ["train", "calibration", "test"]


def test_a_split_is_its_seed() -> None:
    task = with_duplicates()
    assert task.split(3) == task.split(3)
    assert rows(task.split(3).test) != rows(task.split(4).test)
    few = task.split(3, train=40, calibration=20, test=30)
    many = task.split(3, train=80, calibration=40, test=30)
    assert few.test == many.test
    assert rows(few.train) != sorted(rows(few.train))  # shuffled, so that a prefix is a sample


def test_default_shares_leave_no_example_out_when_texts_differ() -> None:
    parts = make_task([str(i) for i in range(100)]).split()
    assert [len(part) for part in parts] == [60, 20, 20]
    assert parts.train.source["split"]["unused"] == 0


def test_ranges_take_rows_as_given_and_a_recurring_text_once() -> None:
    task = make_task(["a", "b", "c", "A ", "d", "x", "e", "c", "X"])
    parts = task.split(train="0-2", calibration="3-5", test="6-8")
    assert straddles(task.subset([0, 1, 2]), task.subset([3, 4, 5]))
    assert [rows(part) for part in parts] == [[1], [3, 4], [6, 7, 8]]
    assert parts.train.source["split"]["dropped"] == {"test": 0, "calibration": 1, "train": 2}
    assert rows(task.split(train="4-4,1-1", calibration="3-3", test="8-8").train) == [4, 1]
    with pytest.raises(ValueError, match="leaves no example of toy"):
        task.split(train="0-0", calibration="3-3", test="6-6")


@real_data
def test_reference_split_of_sms_spam() -> None:
    task = load_task("sms_spam", data_dir=DATA, template=SMS_TEMPLATE)
    parts = task.split(train="0-599", calibration="3150-3299", test="3000-3149")
    assert rows(parts.calibration) == list(range(3150, 3300))
    assert rows(parts.test) == list(range(3000, 3150))
    assert set(rows(parts.train)) <= set(range(600)) and len(parts.train) == 596
    assert not straddles(*parts)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"train": 190, "calibration": 20, "test": 20}, "200 examples .* too few for 190 train"),
        ({"test": 200}, "too few"),
        ({"train": 0}, "`train=0`"),
        ({"train": "0-9"}, "for train only"),
        ({"train": "0-9", "calibration": "5-19", "test": "20-29"}, "Row 5 is in train"),
        ({"train": "0-9", "calibration": "10-19", "test": "20-200"}, "numbered 0 to 199"),
        ({"train": "9-0", "calibration": "10-19", "test": "20-29"}, "neither a number"),
        ({"train": "a few", "calibration": "10-19", "test": "20-29"}, "neither a number"),
        ({"train": "0-9,9-12", "calibration": "13-19", "test": "20-29"}, "names a row twice"),
    ],
)
def test_impossible_splits_are_refused(wanted: dict[str, int | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_duplicates().split(**wanted)  # pyright: ignore[reportArgumentType]


def test_a_split_is_not_split_again() -> None:
    parts = with_duplicates().split()
    with pytest.raises(ValueError, match="calibration split of toy is a split already"):
        parts.calibration.split()


def test_roles_differ_for_a_type_checker(tmp_path: Path) -> None:
    snippet = tmp_path / "snippet.py"
    snippet.write_text(
        "from mera_tl.tasks import Splits, Task, Train\n"
        "def search(task: Task[Train]) -> None: ...\n"
        "def use(parts: Splits) -> None:\n"
        "    search(parts.train)\n"
        "    search(parts.train.subset([0]).with_instruction(''))\n"
        "    search(parts.test.subset([0], role='train'))\n"
        "    search(parts.calibration)\n"
    )
    command = [sys.executable, "-m", "pyright", "--outputjson", str(snippet)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if not result.stdout.startswith("{"):
        pytest.skip("pyright does not run here")
    errors = json.loads(result.stdout)["generalDiagnostics"]
    assert [error["range"]["start"]["line"] for error in errors] == [6]


def copies(n: int, k: int) -> Task:
    """Each of n texts k times, in another case."""
    return make_task(
        [["text", "TEXT", "Text"][c % 3] + f" {i}" for i in range(n) for c in range(k)]
    )


@pytest.mark.parametrize("how", ["shares", "sizes", "ranges"])
@pytest.mark.parametrize("k", [1, 3])
def test_evidence_rests_on_distinct_texts(how: str, k: int) -> None:
    task = copies(100, k)
    wanted = {
        "shares": {},
        "sizes": {"calibration": 20, "test": 30},
        "ranges": {"train": f"0-{40 * k - 1}", "calibration": f"{40 * k}-{60 * k - 1}"}
        | {"test": f"{60 * k}-{100 * k - 1}"},
    }[how]
    parts = task.split(1, **wanted)  # pyright: ignore[reportArgumentType]
    for part in (parts.calibration, parts.test):
        assert len({example.key for example in part.examples}) == len(part) >= 20
        repeated = part.source["split"]["repeated"][part.role]
        assert repeated == (k - 1) * len(part)  # told; positive control: none where texts differ
        taken = {example.row % k for example in part.examples}
        assert len(taken) == k  # by choice, not the first of each
    assert len({example.key for example in parts.train.examples}) * k == len(parts.train)


def test_a_subset_that_becomes_evidence_has_each_text_once() -> None:
    task = copies(20, 3)
    assert len(task.subset(range(30), role="train")) == 30
    assert len(task.subset(range(30), role="calibration")) == 10
    assert len(task.subset(range(30), role="test")) == 10


def test_a_task_is_a_sequence_of_examples_and_a_slice_of_it_a_task() -> None:
    train = make_task(["a", "b", "c", "d"]).split(train="0-1", calibration="2-2", test="3-3").train
    assert train[0] is train.examples[0] and train[-1] is train.examples[1]
    assert list(train) == list(train.examples) and train.examples[1] in train
    assert train[1:] == train.subset([1]) and train[1:].source == train.source
    with pytest.raises(ValueError, match="holds no example"):
        train[2:]
    with pytest.raises(IndexError):
        train[2]


def test_who_is_taken_of_equal_texts_is_its_seed() -> None:
    chosen = [rows(copies(60, 3).split(seed, test=10).test) for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]


# --- values ---------------------------------------------------------------------------------------


def test_hash_changes_with_data_and_order_alone() -> None:
    task = make_task(["a", "b", "c"])
    renamed = Task("other", task.examples, "test", {"from": "elsewhere"})
    assert renamed.data_hash == task.data_hash
    changed = [
        make_task(["a", "b", "d"]),
        make_task(["a", "b", "c"], [0, 1, 1]),
        task.subset([0, 1]),
        task.subset([0, 2, 1]),
        task.with_instruction("Think."),
    ]
    assert len({task.data_hash, *(other.data_hash for other in changed)}) == 1 + len(changed)


def test_one_class_is_refused_where_classes_are_required() -> None:
    task = make_task(["a", "b", "c"], [0, 1, 1])
    task.require_classes()
    with pytest.raises(ValueError, match="only examples labelled 'spam'"):
        task.subset([1, 2]).require_classes()


def test_impossible_tasks_are_refused() -> None:
    example = Example(0, "p", ("a", "b"), 0)
    for examples, message in [
        ((), "holds no example"),
        ((Example(0, "p", ("a", "b"), 2),), "label 2"),
        ((example, Example(1, "p", ("a", "c"), 0)), "same options"),
        ((example, example), "holds a row twice"),
    ]:
        with pytest.raises(ValueError, match=message):
            Task("toy", examples, "all")


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("Q? Answer: A. ANSWER:\n ", "", "Q? Answer: A. Think. ANSWER:\n "),
        ("Q? answer :", "", "Q? Think. answer :"),
        ("Q? ", "", "Q? Think. "),
        ("Say: the answer: is x. Reply", "the answer: is x", "Say: the answer: is x. Reply Think."),
    ],
)
def test_instruction_goes_before_the_last_cue(prompt: str, text: str, expected: str) -> None:
    assert Example(0, prompt, ("a", "b"), 0, text).with_instruction("Think.").prompt == expected


def test_shortening_changes_the_text_alone() -> None:
    example = make_task(["a long message"]).examples[0]
    assert example.with_text("a long").prompt == "Message: a long\nAnswer:"
    with pytest.raises(ValueError, match="Row 7 has no text"):
        Example(7, "Q? Answer:", ("a", "b"), 0).with_text("shorter")


# --- prompts --------------------------------------------------------------------------------------


@real_data
def test_sms_template_comes_out_byte_for_byte() -> None:
    task = load_task("sms_spam", data_dir=DATA, template=SMS_TEMPLATE)
    template = SMS_TEMPLATE.read_bytes()
    assert template.startswith(b"\n") and template.endswith(b" ")  # else there is nothing to strip
    lines = SMS.read_bytes().removesuffix(b"\n").split(b"\n")
    assert rows(task) == list(range(5574))
    for example, line in zip(task.examples, lines, strict=True):
        label, message = line.split(b"\t")
        message = message.decode().strip().encode()  # blanks around a message are no part of it
        assert example.prompt.encode() == template.replace(b"{text}", message)
        assert example.options[example.label] == label.decode()
        assert example.text == message.decode()


def test_braces_and_quotes_in_data_are_data() -> None:
    text = '{text} {label} {0} {{"a": \\1}} %s'
    form = catalogue.Form('{"text": "{text}", "n": {1}} {id}\nAnswer:')
    row = {"text": text, "label": "ham", "id": "{text}"}
    asked, _ = catalogue.questions([row], "toy", form, ("ham", "spam"))
    assert asked[0].prompt == f'{{"text": "{text}", "n": {{1}}}} {{text}}\nAnswer:'


@pytest.mark.parametrize("label", ["Yes", " yes ", 1, 1.0, "1", True, "TRUE"])
def test_labels_are_read_whatever_their_type(label: object) -> None:
    labels = {"1": "yes", "0": "no", "true": "yes", "false": "no"}
    form = catalogue.Form("{text} Answer:", labels=labels)
    asked, _ = catalogue.questions([{"text": "a", "label": label}], "toy", form, ("no", "yes"))
    assert asked[0].label == 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{texts} Answer:", r"asks for \{texts\}, but the fields of toy are text, id"),
        ("Spam or ham? Answer:", "names no column"),
        ("{text} is {label}. Answer:", r"asks for \{label\}"),  # the true answer, of all things
    ],
)
def test_templates_that_do_not_fit_are_refused(template: str, message: str) -> None:
    row = {"text": "a", "label": "ham", "id": 7}
    with pytest.raises(ValueError, match=message):
        catalogue.questions([row], "toy", catalogue.Form(template), ("ham", "spam"))


@real_data
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("sms_spam", {"ham": 4827, "spam": 747}),
        ("sentiment_analysis", {"neutral": 2146, "positive": 887, "negative": 420}),
        ("yes_no_question", {"yes": 2033, "no": 1237}),
        ("mmlu_high_school", None),
        ("mmlu_professional", None),
    ],
)
def test_plain_files_of_every_task(name: str, counts: dict[str, int] | None) -> None:
    task = load_task(name, data_dir=DATA)
    folder = catalogue.DATASETS[name].plain.folder  # pyright: ignore[reportOptionalMemberAccess]
    assert load_task(name, data_dir=DATA / folder) == task
    assert rows(task) == list(range(len(task)))
    assert all(example.prompt.endswith("Answer:") for example in task.examples)
    if counts:
        assert Counter(task.options[label] for label in task.labels) == counts
    else:
        subject = name.removeprefix("mmlu_")
        files = sorted((DATA / "mmlu" / "test").glob(f"{subject}_*.csv"))
        with open(files[-1], encoding="utf-8", newline="") as file:
            last = list(csv.DictReader(file))[-1]
        assert all(last[f"choice{n}"] in task.examples[-1].prompt for n in range(4))
        assert task.labels[-1] == int(last["answer"])
        assert set(task.source["files"]) == {file.name for file in files}


@pytest.mark.parametrize("name", ["spam_cue", "choice_hint"])
def test_organism_tasks_are_generated_alike_every_time(name: str) -> None:
    task, few = load_task(name), generate(name, 30, seed=0)
    assert len(task) == 4000 and few != generate(name, 30, seed=1)
    assert few == [(example.prompt, example.label) for example in task.examples[:30]]
    assert all(example.prompt.endswith("Answer:") for example in task.examples)
    assert not straddles(*task.split())
    task.require_classes()


# --- sources --------------------------------------------------------------------------------------


def save(folder: Path, data: dict[str, list], classes: dict[str, list[str]] | None = None) -> Path:
    saved = datasets.Dataset.from_dict(data)
    for column, names in (classes or {}).items():
        saved = saved.cast_column(column, datasets.ClassLabel(names=names))
    saved.save_to_disk(folder)
    return folder


@real_data
def test_saved_folder_in_the_hubs_schema_equals_the_plain_file(tmp_path: Path) -> None:
    plain = load_task("sms_spam", data_dir=DATA).subset(range(300))
    # As on the hub: another column name, numbered classes, and a line end after each message.
    data = {"sms": [e.text + "\n" for e in plain.examples], "label": list(plain.labels)}
    for place in ("a/sms_spam", "b/ucirvine__sms_spam", "c"):
        folder = save(tmp_path / place, data, {"label": ["ham", "spam"]})
        found = load_task("sms_spam", data_dir=folder if place == "c" else folder.parent)
        assert found.data_hash == plain.data_hash
        assert found.source["files"] and found.source["files"] != plain.source["files"]


NANS = ('"a"', "NaN", "null", '"nan"')


def test_a_number_that_is_none_is_a_blank(tmp_path: Path) -> None:
    """JSON and Parquet have NaN where a text is missing; the word itself is a text."""
    lines = [f'{{"text": {text}, "label": "{"yn"[i % 2]}"}}' for i, text in enumerate(NANS)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines), encoding="utf-8")
    keys = 'options = ["y", "n"]\ntemplate = "{text}?"\ndata = "d.jsonl"\n'
    (tmp_path / "t.toml").write_text(keys, encoding="utf-8")
    task = load_task(str(tmp_path / "t.toml"))
    assert rows(task) == [0, 3] and task.examples[1].prompt == "nan?"
    assert task.source["left_out"] == {"with a blank text": 2}


def test_a_label_or_a_choice_that_is_missing_is_not_the_word_none(tmp_path: Path) -> None:
    rows_of = [{"text": "a", "how": "none"}, {"text": "b", "how": "mild"}]
    keys = 'options = ["none", "mild"]\ntemplate = "{text}"\nlabel = "how"\ndata = "d.jsonl"\n'
    path, data = tmp_path / "t.toml", tmp_path / "d.jsonl"
    path.write_text(keys, encoding="utf-8")
    data.write_text("\n".join(map(json.dumps, rows_of)), encoding="utf-8")
    assert load_task(str(path)).labels == (0, 1)
    for missing in (None, float("nan")):
        lines = [*rows_of, {"text": "c", "how": missing}]
        data.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        with pytest.raises(ValueError, match="Row 2 of d.jsonl has the label"):
            load_task(str(path))
        path.write_text(f'{keys}keep = {{ how = "none|nan|mild" }}\n', encoding="utf-8")
        assert rows(load_task(str(path))) == [0, 1]  # nor is it kept as one
        path.write_text(keys, encoding="utf-8")
    lettered = 'options = ["A", "B"]\ntemplate = "{c}"\nlabel = "how"\ndata = "d.jsonl"\n'
    path.write_text(f'{lettered}columns = {{ c = ["x", "y"] }}\n', encoding="utf-8")
    lines = [{"x": "1", "y": y, "how": "A"} for y in ("2", None, " ")]
    data.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    task = load_task(str(path))
    assert rows(task) == [0] and task.examples[0].prompt == "A. 1\nB. 2"
    assert task.source["left_out"] == {"without a choice for every option": 2}


def test_a_byte_order_mark_is_no_text_and_a_long_text_no_damage(tmp_path: Path) -> None:
    long = "word " * 40_000
    keys = 'options = ["y", "n"]\ntemplate_file = "w.txt"\ndata = "d.csv"\n'
    for name, text in {
        "d.csv": f"text,label\n{long},y\n",
        "t.toml": keys,
        "t.yaml": 'options: ["y", "n"]\ntemplate_file: w.txt\ndata: d.csv\n',
        "w.txt": "{text}?",
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    for name in ("t.toml", "t.yaml"):
        assert load_task(str(tmp_path / name)).examples[0].prompt == f"{long.strip()}?"


def test_half_a_character_is_refused_with_its_row(tmp_path: Path) -> None:
    keys = 'options = ["y", "n"]\ntemplate = "{text}"\ndata = "d.jsonl"\n'
    (tmp_path / "t.toml").write_text(keys, encoding="utf-8")
    lines = ['{"text": "\\ud83d\\ude00", "label": "y"}', '{"text": "so \\ud83d", "label": "n"}']
    data = tmp_path / "d.jsonl"
    data.write_text(lines[0], encoding="utf-8")
    assert load_task(str(tmp_path / "t.toml")).examples[0].prompt == "\U0001f600"
    data.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match="Row 1 of d.jsonl holds half a character"):
        load_task(str(tmp_path / "t.toml"))


def test_rows_end_at_line_feeds_alone(tmp_path: Path) -> None:
    odd = "next\x85line, line\u2028separator, form\x0cfeed"
    lines = f"ham\t{odd}\n\nspam\tlast\n"
    assert len(lines.splitlines()) > 3  # what Python would make of it
    (tmp_path / "SMSSpamCollection").write_text(lines, encoding="utf-8", newline="")
    task = load_task("sms_spam", data_dir=tmp_path)
    assert [(example.row, example.text) for example in task.examples] == [(0, odd), (2, "last")]


def test_a_saved_dictionary_gives_the_split_that_is_needed(tmp_path: Path) -> None:
    def part(text: str) -> datasets.Dataset:
        label = datasets.ClassLabel(names=["neg", "pos"])
        features = datasets.Features({"text": datasets.Value("string"), "label": label})
        return datasets.Dataset.from_dict({"text": [text, "b"], "label": [0, 1]}, features)

    both = datasets.DatasetDict({"train": part("of train"), "test": part("of test")})
    both.save_to_disk(tmp_path / "imdb")
    task = load_task("imdb", data_dir=tmp_path)
    assert task.examples[0].text == "of test"
    assert [task.options[label] for label in task.labels] == ["negative", "positive"]
    datasets.DatasetDict({"a": part("a"), "b": part("b")}).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match="splits a, b; 'test' is needed"):
        load_task("imdb", data_dir=tmp_path / "other")


def test_filters_keep_row_numbers(tmp_path: Path) -> None:
    subjects = ["astronomy", "high_school_physics", "professional_law", "high_school_biology"]
    mmlu = {
        "question": ["q0", "q1", "q2", "q3"],
        "subject": subjects,
        "choices": [["w", "x", "y", "z"]] * 4,
        "answer": [0, 1, 2, 3],
    }
    save(tmp_path / "cais__mmlu", mmlu, {"answer": list("ABCD")})
    task = load_task("mmlu_high_school", data_dir=tmp_path)
    assert rows(task) == [1, 3] and task.labels == (1, 3)
    assert "q3\n\nA. w\nB. x\nC. y\nD. z\n" in task.examples[1].prompt
    assert rows(load_task("mmlu_professional", data_dir=tmp_path)) == [2]

    sujet = {
        "inputs": ["t0", "t1", "t2", "t3", " "],
        "answer": ["Yes", "neutral", "bullish", "Negative", "positive"],
        "task_type": ["yes_no_question"] + ["sentiment_analysis"] * 4,
    }
    save(tmp_path / "sujet-ai__Sujet-Finance-Instruct-177k", sujet)
    sentiment = load_task("sentiment_analysis", data_dir=tmp_path)
    assert rows(sentiment) == [1, 3] and sentiment.labels == (1, 2)
    assert sentiment.source["left_out"] == {"not of this task": 2, "with a blank text": 1}
    assert rows(load_task("yes_no_question", data_dir=tmp_path)) == [0]


def test_mmlu_pro_keeps_questions_with_all_ten_choices(tmp_path: Path) -> None:
    ten = [f"choice {n}" for n in range(10)]
    pro = {
        "question": ["q0", "q1", "q2", "q3"],
        "category": ["law", "physics", "biology", "chemistry"],
        "options": [ten, ten, ten[:4], ten],
        "answer": ["A", "J", "B", "C"],
    }
    save(tmp_path / "pro", pro)
    task = load_task("mmlu_pro_natural_science", data_dir=tmp_path / "pro")
    assert rows(task) == [1, 3] and task.labels == (9, 2)
    assert "J. choice 9\n" in task.examples[0].prompt
    assert task.source["left_out"]["without a choice for every option"] == 1


def write_truthful(folder: Path, wrong: dict[str, list[str]]) -> Path:
    """Write questions in the columns of TruthfulQA.csv; the right answer to each is "right"."""
    folder.mkdir(parents=True)
    with (folder / "TruthfulQA.csv").open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(["Question", "Best Answer", "Correct Answers", "Incorrect Answers"])
        out.writerows([q, "right", "right; also right", "; ".join(w)] for q, w in wrong.items())
    return folder


def drawn(task: Task) -> dict[str, list[str]]:
    """Return the four choices of every question, in the order in which they are lettered."""
    lines = [example.prompt.split("\n") for example in task.examples]
    return {each[0]: [line[3:] for line in each if line[1:3] == ". "] for each in lines}


def test_truthfulqa_letters_the_right_answer_among_three_wrong_ones(tmp_path: Path) -> None:
    wrong = {f"q{i}": [f"w{i}{c}" for c in "abcdef"[: i % 7]] for i in range(70)}
    task = load_task("truthfulqa", data_dir=write_truthful(tmp_path / "truthfulqa", wrong))
    assert rows(task) == [i for i in range(70) if i % 7 >= 3]
    assert task.source["left_out"] == {"without a choice for every option": 30}
    choices = drawn(task)
    for example, (question, four) in zip(task.examples, choices.items(), strict=True):
        assert four[example.label] == "right" and len(set(four)) == 4
        assert set(four) - {"right"} <= set(wrong[question])
    assert set(task.labels) == {0, 1, 2, 3} and max(Counter(task.labels).values()) < 20
    # The draw and the order are the question's own: other rows around it change nothing.
    turned = write_truthful(tmp_path / "b", dict(reversed(wrong.items())))
    assert drawn(load_task("truthfulqa", data_dir=turned)) == choices
    hub = [("right", 1), *((each, 0) for each in wrong["q6"])]
    mc1 = {"choices": [[each for each, _ in hub]], "labels": [[mark for _, mark in hub]]}
    targets = [{name: values[0] for name, values in mc1.items()}]
    save(tmp_path / "truthfulqa__truthful_qa", {"question": ["q6"], "mc1_targets": targets})
    (example,) = load_task("truthfulqa", data_dir=tmp_path / "truthfulqa__truthful_qa").examples
    assert example.prompt == task.examples[rows(task).index(6)].prompt


@real_data
def test_truthfulqa_asks_every_question_with_three_wrong_answers() -> None:
    task = load_task("truthfulqa", data_dir=DATA)
    with (DATA / "truthfulqa" / "TruthfulQA.csv").open(encoding="utf-8-sig", newline="") as file:
        source = list(csv.DictReader(file))
    assert len(task) == 663 and not straddles(*task.split())
    for example, four in zip(task.examples, drawn(task).values(), strict=True):
        assert four[example.label] == source[example.row]["Best Answer"].strip()


def test_truthfulqa_without_its_columns_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "TruthfulQA.csv").write_text("Question,Best Answer\nq,a\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no column 'Incorrect Answers'; its columns are Quest"):
        load_task("truthfulqa", data_dir=tmp_path)


def test_without_a_folder_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []

    def load_dataset(*names: str | None, split: str) -> datasets.Dataset:
        asked.append((*names, split))
        columns = ["question", "subject", "choices", "answer"]
        row = ["q", "high_school_physics", list("wxyz"), "B"]
        return datasets.Dataset.from_dict(dict(zip(columns, [[v] for v in row], strict=True)))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_task("mmlu_high_school").labels == (1,)
    assert asked == [("cais/mmlu", "all", "test")]

    def offline(*_: str | None, split: str) -> None:
        raise ConnectionError(f"Couldn't reach the Hub for {split}")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    for name in catalogue.DATASETS:
        with pytest.raises(ValueError, match="Couldn't reach .* with --data-dir"):
            load_task(name)


# --- a user's own task ----------------------------------------------------------------------------

REVIEWS = [("fine, really", 1), ('he said "no"', 0), ("a {text} b\tc", 1), ('"open quote', 0)]


def write_user_task(folder: Path, data: str, /, **changes: object) -> Path:
    """Write reviews in one of the formats, and a task file beside them."""
    table = datasets.Dataset.from_dict(
        {
            "review": [text.replace("\t", " ") for text, _ in REVIEWS],
            "stars": [s for _, s in REVIEWS],
        }
    )
    path = folder / data
    if path.suffix == ".csv":
        table.to_csv(path)
    elif path.suffix == ".jsonl":
        table.to_json(path)
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        lines = ["review\tstars", *(f"{row['review']}\t{row['stars']}" for row in table)]
        path.write_text("\n".join(lines) + "\n")
    keys = {
        "options": ["good", "bad"],
        "template": "Review: {text}\nAnswer:",
        "data": data,
        "label": "stars",
        "text": "text",
        "columns": {"text": "review"},
        "labels": {"1": "good", "0": "bad"},
    }
    keys = {key: value for key, value in (keys | changes).items() if value is not None}
    (folder / "mine.yaml").write_text(yaml.safe_dump(keys))
    return folder / "mine.yaml"


def test_own_task_is_the_same_from_every_format(tmp_path: Path) -> None:
    found = {
        data: load_task(str(write_user_task(tmp_path, data)))
        for data in ("r.csv", "r.tsv", "r.jsonl", "r.parquet")
    }
    assert len({task.data_hash for task in found.values()}) == 1
    task = found["r.tsv"]
    assert task.name == "mine" and task.labels == (0, 1, 0, 1)
    assert task.examples[2].prompt == "Review: a {text} b c\nAnswer:"
    assert [set(task.source["files"]) for task in found.values()] == [{name} for name in found]


def test_own_task_in_toml(tmp_path: Path) -> None:
    same = load_task(str(write_user_task(tmp_path, "r.csv")))
    (tmp_path / "wording.txt").write_text("Review: {text}\nAnswer:")
    (tmp_path / "mine.toml").write_text(
        'options = ["good", "bad"]\ntemplate_file = "wording.txt"\ndata = "r.csv"\n'
        'label = "stars"\ntext = "text"\n[columns]\ntext = "review"\n'
        '[labels]\n1 = "good"\n0 = "bad"\n'
    )
    assert load_task(str(tmp_path / "mine.toml")) == same


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "absent.csv"}, "absent.csv cannot be read"),
        ({"data": None}, "has neither 'data'"),
        ({"option": ["a"]}, "unknown key 'option'; did you mean options"),
        ({"options": "good bad"}, "write a list there"),
        ({"options": [True, False]}, "not text; put it in quotes"),
        ({"options": ["good", "Good"]}, "two or more different"),
        ({"labels": {"1": "good", "0": "poor"}}, "maps labels to poor"),
        ({"labels": {"1": "good"}}, "Row 1 of r.csv has the label '0', but the options are good"),
        ({"label": "score"}, "no column 'score'; its columns are review, stars"),
        ({"columns": {"text": "body"}}, "no column 'body'; its columns are review, stars"),
        ({"keep": {"stars": "7"}}, "has no row to ask .4 not of this task"),
        ({"encoding": "utf-99"}, "`encoding: utf-99` is not known"),
    ],
)
def test_wrong_task_files_are_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    load_task(str(write_user_task(tmp_path, "r.csv")))  # right without the change
    with pytest.raises(ValueError, match=message):
        load_task(str(write_user_task(tmp_path, "r.csv", **changes)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.csv", b"", "holds no row"),
        ("r.csv", b"review,stars\n", "holds no row"),
        ("r.csv", b"review,stars\nfine\n", "row 0 has not as many fields"),
        ("r.csv", b'review,stars\n"fine,1\n', "is damaged"),
        ("r.csv", b'stars,review\n1,"fine\n0,bad\n', "is damaged"),  # not one long review
        ("r.csv", b"review,stars\n\xe9t\xe9,1\n", "is not utf-8 .byte 13"),
        ("r.csv", b"review,stars\n ,1\n", "has no row to ask .1 with a blank text"),
        ("r.jsonl", b'{"review": 1\n', "line 1 is not JSON"),
        ("r.parquet", b"nothing", "is damaged"),
        ("r.xlsx", b"nothing", "convert the file"),
    ],
)
def test_damaged_data_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write_user_task(tmp_path, "good.csv", data=name)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_task(str(path))


# --- names ----------------------------------------------------------------------------------------


def test_an_example_says_what_it_has_and_nothing_else() -> None:
    example = Example(0, "a or b?", ("a", "b"), 0)
    assert repr(example) == "Example(row=0, prompt='a or b?', options=('a', 'b'), label=0)"
    assert repr(Example(0, "a", ("a", "b"), 0, kind="x")).endswith("label=0, kind='x')")


def test_unknown_tasks_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no task 'sms_spm'; did you mean sms_spam"):
        load_task("sms_spm")
    with pytest.raises(ValueError, match="no task 'qqq'; known are .*sms_spam"):
        load_task("qqq")
    with pytest.raises(ValueError, match="There is no data folder"):
        load_task("sms_spam", data_dir=tmp_path / "absent")
    with pytest.raises(ValueError, match="sms_spam/SMSSpamCollection or a save_to_disk folder"):
        load_task("sms_spam", data_dir=tmp_path)
    with pytest.raises(ValueError, match="leave the template out"):
        load_task("spam_cue", template=tmp_path / "any.txt")


def test_described_tasks_are_those_that_load() -> None:
    described = loading.describe_tasks()
    assert [row["name"] for row in described] == loading.task_names()
    classes = {row["name"]: row["n_classes"] for row in described}
    assert classes["sms_spam"] == 2 and classes["sentiment_analysis"] == 3
    assert classes["mmlu_pro_natural_science"] == 10 and classes["choice_hint"] == 4
