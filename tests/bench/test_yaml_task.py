"""Tasks over datasets: what a description must say, and how rows become prompts."""

import json

import pytest
from PIL import Image
from tests.tiny_checkpoints import picture

from vispress.bench.tasks.prompts import DatasetPrompt
from vispress.bench.tasks.rows import fingerprint, open_pictures
from vispress.bench.tasks.task import get_task
from vispress.bench.tasks.yaml_task import (
    parse_yaml_task,
    register_entry,
    shipped_tasks,
    task_from_yaml,
)
from vispress.errors import ConfigError

ROW = {"question": "What?", "answer": "red", "image": "a.png"}


@pytest.fixture
def make(tmp_path):
    """A task over rows written to a file, with two pictures beside it."""
    picture(8, 8, 0).save(tmp_path / "a.png")
    picture(6, 9, 1).convert("L").save(tmp_path / "b.png")

    def made(rows, **keys):
        text = "".join(json.dumps(ROW | row) + "\n" for row in rows)
        (tmp_path / "rows.jsonl").write_text(text)
        data = {"name": "mine", "dataset": "rows.jsonl", "shuffle": False} | keys
        return task_from_yaml(parse_yaml_task(data, "test"), tmp_path)

    return made


def test_a_row_becomes_a_prompt(make):
    (prompt,) = make([{"hint": "Look."}], prompt="{hint}\nQ: {question}").draw(5, 0)
    assert prompt.text == "<image>\nLook.\nQ: What?"
    assert (prompt.answer, prompt.accepted) == ("red", ("red",))
    assert [image.size for image in prompt.images] == [(8, 8)]


def test_lines_with_nothing_in_their_fields_are_left_out(make):
    rows = [{"hint": None}, {"hint": "nan"}, {"hint": "H"}]
    prompts = make(rows, prompt="Context: {hint}\n{question}\nAnswer.").draw(5, 0)
    assert [p.text.split("\n")[1] for p in prompts] == ["What?", "What?", "Context: H"]
    assert all(p.text.endswith("Answer.") for p in prompts)


def test_several_pictures_and_their_marks(make):
    rows = [
        {"image": ["a.png", "b.png"]},
        {"image": ["a.png", "b.png"], "question": "<image> or <image>?"},
        {"image": "b.png", "question": "<image> or <image>?"},
    ]
    prompts = make(rows).draw(5, 0)
    texts = ["<image><image>\nWhat?", "<image> or <image>?", "<image>\nor ?"]
    assert [prompt.text for prompt in prompts] == texts
    assert [image.mode for image in prompts[0].images] == ["RGB", "RGB"]
    both = make([{"second": "b.png"}], images=["image", "second"]).draw(1, 0)
    assert len(both[0].images) == 2


@pytest.mark.parametrize("answer", ["B", "b", 1, "cat"])
def test_the_answer_of_a_choice(make, answer):
    task = make(
        [{"answer": answer, "options": ["dog", "cat"]}],
        choices="options",
        metric="choice",
        prompt="{question}\n{options}",
    )
    (prompt,) = task.draw(1, 0)
    assert prompt.text == "<image>\nWhat?\nA. dog\nB. cat"
    assert (prompt.accepted, prompt.choices) == (("B",), ("dog", "cat"))
    assert [task.score(said, prompt) for said in ("B.", "cat", "A", "")] == [1, 1, 0, 0]


def test_options_in_columns_or_in_the_question(make):
    row = {"answer": "B", "A": "dog", "B": "cat", "C": None}
    (prompt,) = make([row], choices=["A", "B", "C"], metric="choice").draw(1, 0)
    assert prompt.choices == ("dog", "cat")
    task = make([row], choices=3, metric="choice", prompt="{question}\n{options}\nGo.")
    (prompt,) = task.draw(1, 0)
    assert prompt.text == "<image>\nWhat?\nGo."
    assert [task.score(said, prompt) for said in ("(B)", "A", "")] == [1, 0, 0]


def test_several_accepted_answers(make):
    task = make([{"answer": ["red", "dark red", "red"]}], metric="anls")
    (prompt,) = task.draw(1, 0)
    assert prompt.answer == "red"
    assert task.score("dark red", prompt) == 1
    assert 0.5 < task.score("darkred", prompt) < 1


def test_rows_are_chosen(make):
    rows = [{"n": 0}, {"n": 1}, {"n": 2, "image": None}, {"n": 3}, {"n": 4}]

    def drawn(count=9, seed=0, **keys):
        return [p.text for p in make(rows, prompt="{n}", **keys).draw(count, seed)]

    assert drawn() == [f"<image>\n{n}" for n in (0, 1, 3, 4)]
    assert drawn(2) == drawn(limit=2) == ["<image>\n0", "<image>\n1"]
    assert drawn(where={"n": [1, 4]}) == ["<image>\n1", "<image>\n4"]
    shuffled = [tuple(drawn(seed=seed, shuffle=True)) for seed in range(4)]
    assert len(set(shuffled)) > 1
    assert all(sorted(order) == drawn() for order in shuffled)
    with pytest.raises(ConfigError, match="none of 5 rows"):
        drawn(where={"n": 9})


def test_a_seed_of_its_own_fixes_the_order(make):
    rows = [{"n": n} for n in range(6)]
    task = make(rows, prompt="{n}", shuffle=True, seed=3)
    assert task.draw(6, 0) == task.draw(6, 1)


@pytest.mark.parametrize(
    ("key", "keys"),
    [
        ("question", {"question": "nope"}),
        ("answer", {"answer": "nope"}),
        ("images", {"images": ["image", "nope"]}),
        ("choices", {"choices": "nope", "metric": "choice"}),
        ("where", {"where": {"nope": 1}}),
        ("prompt", {"prompt": "{question} {nope}"}),
    ],
)
def test_a_missing_column_is_named_with_those_there_are(make, key, keys):
    with pytest.raises(ConfigError, match=rf"no column 'nope' \(named by '{key}'\); it has quest"):
        make([{}], **keys).draw(1, 0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"metric": "accuracy"}, "unknown metric 'accuracy'"),
        ({"metrik": "exact"}, "unknown key 'metrik'; did you mean 'metric'"),
        ({"metric": "choice"}, "go together"),
        ({"choices": "options"}, "go together"),
        ({"choices": 1, "metric": "choice"}, "choices must be an integer >= 2"),
        ({"limit": 0}, "limit must be an integer >= 1"),
        ({"limit": True}, "limit must be"),
        ({"chance": 2.0}, "chance must be a number in"),
        ({"question": 3}, "question must be str"),
        ({"images": []}, "images must be"),
        ({"where": "n"}, "where must be"),
        ({"prompt": "{question!r}"}, "bare column names"),
        ({"prompt": "{}"}, "bare column names"),
        ({"prompt": "{question"}, "prompt"),
        ({"images_from": {"subset": "x"}}, "'split' is missing"),
    ],
)
def test_a_malformed_description(make, keys, message):
    with pytest.raises(ConfigError, match=message):
        make([{}], **keys)


def test_a_description_without_dataset():
    with pytest.raises(ConfigError, match="'dataset' is missing"):
        parse_yaml_task({"name": "x"}, "here")
    with pytest.raises(ConfigError, match="must be a mapping"):
        parse_yaml_task(["x"], "here")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "no.png"}, r"cannot open the picture .*no\.png"),
        ({"image": 3}, "a path or image data"),
        ({"answer": None}, "no answer"),
    ],
)
def test_a_bad_row(make, row, message):
    with pytest.raises(ConfigError, match=message):
        make([row]).draw(1, 0)


def test_a_bad_choice(make):
    for row in ({"options": "dog"}, {"options": ["dog", "cat"], "answer": "C"}):
        with pytest.raises(ConfigError, match=r"options|none of"):
            make([row], choices="options", metric="choice").draw(1, 0)


def test_a_bad_file(make, tmp_path):
    task = make([{}])
    (tmp_path / "rows.jsonl").write_text('{"question": "x"}\n\n{broken\n')
    with pytest.raises(ConfigError, match="line 3: no JSON"):
        task.draw(1, 0)
    (tmp_path / "rows.jsonl").write_text("[1]\n")
    with pytest.raises(ConfigError, match="line 1: a row must be"):
        task.draw(1, 0)
    with pytest.raises(ConfigError, match="no such file"):
        make([{}], dataset="other.jsonl")


def test_pictures_from_bytes(tmp_path):
    picture(4, 5, 0).save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    for value in (data, {"bytes": data, "path": None}, {"bytes": None, "path": "x.png"}, "x.png"):
        (found,) = open_pictures(value, tmp_path)
        assert found.size == (5, 4)
    assert open_pictures(Image.new("L", (2, 2)), tmp_path)[0].mode == "RGB"
    with pytest.raises(ConfigError, match="cannot open the picture image data"):
        open_pictures(b"nothing", tmp_path)


def test_the_fingerprint_follows_the_files(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.parquet").write_bytes(b"1")
    first = fingerprint("set", tmp_path)
    (tmp_path / "set" / "a.parquet").write_bytes(b"2")
    assert first != fingerprint("set", tmp_path)
    assert fingerprint("org/on-the-hub", tmp_path) is None


def test_described_tasks_have_names(make, tmp_path):
    make([{}])
    entry = {"name": "in_a_plan", "dataset": "rows.jsonl"}
    assert register_entry(entry, tmp_path) == register_entry(entry, tmp_path) == "in_a_plan"
    assert isinstance(get_task("in_a_plan").draw(1, 0)[0], DatasetPrompt)
    # written anew, it is the newer one
    assert register_entry(entry | {"metric": "vqa"}, tmp_path) == "in_a_plan"
    assert get_task("in_a_plan").source["metric"] == "vqa"
    with pytest.raises(ConfigError, match="'attribute' is already registered"):
        register_entry(entry | {"name": "attribute"}, tmp_path)
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"the task .*bad\.yaml is not valid YAML"):
        register_entry("bad.yaml", tmp_path)
    assert register_entry("count", tmp_path) == "count"


# columns as the datasets' cards list them; what is not named is not read
SHIPPED = {
    "chartqa": {"answer": "14"},
    "docvqa": {"answers": ["14 May", "14"]},
    "mmbench": {"hint": None, "A": "x", "B": "y", "C": "nan", "D": "nan", "answer": "B"},
    "mme": {"answer": "Yes"},
    "mmstar": {"answer": "B", "question": "What?\nOptions: A: x, B: y, C: z, D: none"},
    "pope": {"answer": "no"},
    "scienceqa": {"hint": "H", "choices": ["x", "y"], "answer": 1},
    "textvqa": {"answers": ["x"] * 10},
}


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_descriptions_read_rows_of_their_datasets(make, name):
    keys = {k: v for k, v in get_task(name).source.items() if v is not None}
    task = make([SHIPPED[name]], **keys | {"dataset": "rows.jsonl"})
    (prompt,) = task.draw(1, 0)
    assert task.score(prompt.answer, prompt) == 1
    assert "{" not in prompt.text
    assert "nan" not in prompt.text


def test_every_shipped_description_has_a_test():
    # gqa joins two subsets: tests/integrations
    assert set(shipped_tasks()) == {*SHIPPED, "gqa"}
    with pytest.raises(ConfigError, match="unknown task 'gqq'; did you mean 'gqa'"):
        get_task("gqq")
