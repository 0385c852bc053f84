"""Every adapter reads a hand-made sample in its set's true schema; what columns cannot say is refused in a sentence.

Each sample names where its schema is from. No row of a real set is here.
"""

import json

import pytest
from conftest import ROOT
from one_source import read_source

from instructrl import adapters, columns
from instructrl.config import Data, Source
from instructrl.errors import UserError
from instructrl.recipe import load_recipe

WHERE = "left out by `where`"


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def read(tmp_path):
    """What an adapter makes of rows, as the stage `data` reads them."""

    def rows_of(adapter, kind, rows, **options):
        path = jsonl(tmp_path / "sample.jsonl", rows)
        (source,) = getattr(Data(**{kind: [{"path": str(path), "adapter": adapter, **options}]}), kind)
        return read_source(source, kind, f"data.{kind}[0]")

    return rows_of


def without_source(row):
    return {name: value for name, value in row.items() if name != "source"}


# ---- OpenAssistant/oasst2: card, and Open-Assistant's docs/docs/data/schemas.mdx


def message(name, parent, role, text, rank=None, **options):
    return {
        "message_id": name,
        "parent_id": parent,
        "user_id": f"by-{name}",
        "created_date": "2023-02-05T12:00:00.000000+00:00",
        "text": text,
        "role": role,
        "lang": "en",
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": rank,
        "synthetic": False,
        "model_name": None,
        "detoxify": {"toxicity": 0.0004},
        "message_tree_id": "t1",
        "tree_state": "ready_for_export",
        "emojis": {"name": ["+1"], "count": [1]},
        "labels": {"name": ["spam"], "value": [0.0], "count": [3]},
    } | options


OASST = [
    message("p1", None, "prompter", "Name a fish."),
    message("a1", "p1", "assistant", "A carp.", 1),
    message("a2", "p1", "assistant", "A pike.", 0),
    message("a3", "p1", "assistant", "Deleted.", 2, deleted=True),
    message("p2", "a3", "prompter", "After what was deleted."),
    message("a4", "p1", "assistant", "Refused by the reviewers.", 3, review_result=False),
    message("a5", "p1", "assistant", "Never ranked."),
    message("p3", "a2", "prompter", "Another?", lang="de"),
    message("a6", "p3", "assistant", "A trout.", 0),
    message("p4", None, "prompter", "No answer to this.", message_tree_id="t2"),
]


def test_oasst2_siblings_are_ranked(read):
    rows, reading = read("oasst2", "rankings", OASST)
    assert [without_source(row) for row in rows] == [
        {
            "prompt": "Name a fish.",
            "responses": ["A carp.", "A pike."],
            "ranks": [2, 1],
            "annotators": [],
            "labeler": "",
            "category": "",
            "kind": "",
            "user": "by-p1",
            "language": "en",
        }
    ]
    assert not reading.dropped


def test_oasst2_best_answers_are_demonstrations(read):
    rows, _ = read("oasst2", "demonstrations", OASST)
    path = "User: Name a fish.\n\nAssistant: A pike.\n\nUser: Another?"
    assert [(row["prompt"], row["response"], row["user"], row["language"]) for row in rows] == [
        ("Name a fish.", "A pike.", "by-p1", "en"),
        (path, "A trout.", "by-p3", "de"),
    ]
    rows, reading = read("oasst2", "demonstrations", OASST, where={"lang": "en"})
    assert (len(rows), reading.dropped) == (1, {WHERE: 1})


def test_oasst2_prompts_are_every_prompter_turn(read):
    rows, _ = read("oasst2", "prompts", OASST)
    assert [row["user"] for row in rows] == ["by-p1", "by-p3", "by-p4"]
    assert rows[1]["prompt"].endswith("Assistant: A pike.\n\nUser: Another?")


def test_what_is_wrong_with_a_tree(read):
    with pytest.raises(UserError, match=r"sample.jsonl line 11: message_id 'a1' is also that of .*line 3"):
        read("oasst2", "prompts", [OASST[9], *OASST[:9], OASST[1]])
    with pytest.raises(
        UserError, match=r"line 11: the tree 't1' goes on here, but .* sort the rows by message_tree_id"
    ):
        read("oasst2", "prompts", [*OASST, message("p5", None, "prompter", "x")])
    with pytest.raises(UserError, match=r"data.prompts\[0\].tree: .*line 1 has no column 'message_id'"):
        read("oasst2", "prompts", [{"text": "x"}])


def test_a_tree_without_a_first_message_is_left_out(read):
    circle = [message("x", "y", "prompter", "x"), message("y", "x", "assistant", "y"), OASST[9]]
    rows, _ = read("oasst2", "prompts", circle)
    assert [row["prompt"] for row in rows] == ["No answer to this."]


def test_a_tree_may_be_a_thousand_messages_deep(read):
    roles = ("prompter", "assistant")
    chain = [message(str(n), str(n - 1) if n else None, roles[n % 2], f"turn {n}") for n in range(1_000)]
    rows, _ = read("oasst2", "prompts", chain, where={"message_id": [0, 2]})
    assert [row["prompt"] for row in rows] == ["turn 0", "User: turn 0\n\nAssistant: turn 1\n\nUser: turn 2"]


# ---- openbmb/UltraFeedback: its card's features


def completion(text, ratings, score):
    aspects = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    return {
        "annotations": {
            name: {"Rating": str(rating), "Rationale": "..."} for name, rating in zip(aspects, ratings, strict=True)
        },
        "critique": "...",
        "custom_system_prompt": "You are helpful.",
        "fine-grained_score": score,
        "model": "alpaca-7b",
        "overall_score": 10.0,
        "principle": "helpfulness",
        "response": text,
    }


def test_ultrafeedback_ranks_four_answers_by_their_mean_rating(read):
    completions = [
        completion("a", (1, 2, 3, 2), 2.0),
        completion("b", (5, 5, 5, 4), 4.75),
        completion("c", (2, 2, 2, 2), 2.0),
        completion("d", (3, 3, 3, 3), 3.0),
    ]
    row = {
        "source": "evol_instruct",
        "instruction": "Do it.",
        "models": ["alpaca-7b"] * 4,
        "completions": completions,
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }
    unrated = row | {"completions": [completions[0], completions[1] | {"fine-grained_score": None}]}
    rows, reading = read("ultrafeedback", "rankings", [row | {"source": "truthful_qa"}, row, unrated])
    assert [(row["prompt"], row["responses"], row["ranks"]) for row in rows] == [
        ("Do it.", ["a", "b", "c", "d"], [3, 1, 3, 2])
    ]
    assert rows[0]["source"] == "evol_instruct"
    assert reading.dropped == {WHERE: 1, "invalid": 1}
    assert read("ultrafeedback", "prompts", [row])[0][0]["prompt"] == "Do it."


# ---- berkeley-nest/Nectar: its card, and paper.md section 5


def test_nectar_ranks_seven_answers(read):
    answers = [
        {"answer": f"answer {rank}", "model": "gpt-4", "rank": rank} for rank in (3.0, 1.0, 2.0, 7.0, 4.0, 6.0, 5.0)
    ]
    row = {
        "prompt": "\n\nHuman: Why?\n\nAssistant: ",
        "answers": answers,
        "turns": 1,
        "num_responses": 7,
        "source": ["sharegpt", "flan"],
        "good_natured": True,
    }
    several = "\n\nHuman: Why?\n\nAssistant: Because.\n\nHuman: Human: or not?\n\nAssistant: "
    rows, _ = read("nectar", "rankings", [row, row | {"prompt": several, "turns": 2}])
    assert rows[0]["prompt"] == "Why?"
    assert rows[0]["ranks"] == [3, 1, 2, 7, 4, 6, 5]
    assert rows[0]["source"] == "sharegpt, flan"
    assert rows[1]["prompt"] == "User: Why?\n\nAssistant: Because.\n\nUser: Human: or not?"
    assert [row["prompt"] for row in read("nectar", "prompts", [row])[0]] == ["Why?"]


# ---- Anthropic/hh-rlhf: its card


def test_hh_rlhf_splits_at_the_last_turn_that_is_shared(read):
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"
    row = {"chosen": f"{start} See you", "rejected": f"{start} Go away"}
    rows, reading = read("hh-rlhf", "rankings", [row, {"chosen": start, "rejected": start}])
    assert rows[0]["prompt"] == start.strip()
    assert (rows[0]["responses"], rows[0]["ranks"]) == (["See you", "Go away"], [1, 2])
    assert reading.dropped == {"invalid": 1}


# ---- stanfordnlp/SHP: its card


def test_shp_prefers_the_comment_that_the_label_says(read):
    row = {
        "post_id": "qt3nxl",
        "domain": "askculinary_train",
        "upvote_ratio": 0.98,
        "history": "How long do eggs keep?",
        "c_root_id_A": "hkh25sc",
        "c_root_id_B": "hkh25lp",
        "created_at_utc_A": 1636822112,
        "created_at_utc_B": 1636822110,
        "score_A": 340,
        "score_B": 166,
        "human_ref_A": "Weeks.",
        "human_ref_B": "Ask them.",
        "labels": 1,
        "seconds_difference": 2.0,
        "score_ratio": 2.0481927711,
    }
    other = row | {"history": "And milk?", "labels": 0, "score_ratio": 1.5}
    rows, _ = read("shp", "rankings", [row, other])
    assert [(row["responses"], row["ranks"]) for row in rows] == [
        (["Weeks.", "Ask them."], [1, 2]),
        (["Weeks.", "Ask them."], [2, 1]),
    ]
    assert rows[0]["category"] == "askculinary_train"
    rows, reading = read("shp", "rankings", [row, other], where={"score_ratio": {"min": 2}})
    assert (len(rows), reading.dropped) == (1, {WHERE: 1})
    assert [row["prompt"] for row in read("shp", "prompts", [row])[0]] == ["How long do eggs keep?"]


# ---- nvidia/HelpSteer3, configuration preference: its card


def test_helpsteer3_has_each_annotators_judgement(read):
    row = {
        "domain": "multilingual",
        "language": "chinese",
        "context": [{"role": "user", "content": "Hi"}],
        "response1": "First.",
        "response2": "Second.",
        "overall_preference": -2,
        "individual_preference": [
            {"score": -2, "reasoning": "...", "feedback1": "...", "feedback2": "..."},
            {"score": 1, "reasoning": "...", "feedback1": "...", "feedback2": "..."},
            {"score": 0, "reasoning": "...", "feedback1": "...", "feedback2": "..."},
        ],
    }
    tied = row | {"overall_preference": 0}
    code = row | {"domain": "code", "language": "python", "overall_preference": 3}
    rows, reading = read("helpsteer3", "rankings", [row, tied, code])
    assert (rows[0]["ranks"], rows[0]["annotators"]) == ([1, 2], [[1, 2], [2, 1], [1, 1]])
    assert (rows[0]["category"], rows[0]["language"]) == ("multilingual", "zh")
    assert (rows[1]["ranks"], rows[1]["category"], rows[1]["language"]) == ([2, 1], "code", "")
    assert reading.dropped == {"all responses tied": 1}
    assert [row["prompt"] for row in read("helpsteer3", "prompts", [row])[0]] == ["Hi"]


# ---- databricks/databricks-dolly-15k: its card


def test_dolly_keeps_the_use_case(read):
    row = {"instruction": "Sum it up.", "context": "A story.", "response": "Short.", "category": "summarization"}
    rows, _ = read("dolly", "demonstrations", [row, row | {"context": ""}])
    assert [(row["prompt"], row["response"], row["category"]) for row in rows] == [
        ("Sum it up.\n\nA story.", "Short.", "summarization"),
        ("Sum it up.", "Short.", "summarization"),
    ]
    assert read("dolly", "prompts", [row])[0][0]["category"] == "summarization"


# ---- HuggingFaceH4/no_robots: its card


def test_no_robots_keeps_conversations_and_use_cases(read):
    system = {"role": "system", "content": "Be curt."}
    ask, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
    row = {"prompt": "Hi", "prompt_id": "f7", "messages": [ask, answer], "category": "Generation"}
    chat = row | {"messages": [system, ask, answer, ask, answer], "category": "Chat"}
    rows, _ = read("no_robots", "demonstrations", [row, chat])
    assert [(row["prompt"], row["response"], row["category"]) for row in rows] == [
        ("Hi", "Yo", "Generation"),
        ("System: Be curt.\n\nUser: Hi\n\nAssistant: Yo\n\nUser: Hi", "Yo", "Chat"),
    ]
    prompts, _ = read("no_robots", "prompts", [row, chat])
    assert [row["prompt"] for row in prompts] == [row["prompt"] for row in rows]


# ---- tatsu-lab/alpaca_farm: alpaca_human_preference.json, alpaca_instructions/{sft,unlabeled}.json


def test_alpaca_farm_has_a_file_for_each_kind(tmp_path):
    folder = tmp_path / "alpaca_farm"
    (folder / "alpaca_instructions").mkdir(parents=True)
    pair = {
        "instruction": "Fix it.",
        "input": "Thier",
        "output_1": "Their",
        "output_2": "There",
        "preference": 2,
        "raw_preference": 3,
    }
    files = {
        "alpaca_human_preference.json": [pair, pair | {"input": "", "preference": 1}],
        "alpaca_instructions/sft.json": [{"instruction": "Add.", "input": "1 1", "output": "2"}],
        "alpaca_instructions/unlabeled.json": [{"instruction": "Sing.", "input": "", "output": ""}],
        "alpaca_farm_evaluation.json": [{"instruction": "Never read."}],
    }
    for name, rows in files.items():
        (folder / name).write_text(json.dumps(rows))

    def found(kind):
        (source,) = getattr(Data(**{kind: [{"path": str(folder), "adapter": "alpaca_farm"}]}), kind)
        return read_source(source, kind, "k")[0]

    assert [(row["prompt"], row["responses"], row["ranks"]) for row in found("rankings")] == [
        ("Fix it.\n\nThier", ["Their", "There"], [2, 1]),
        ("Fix it.", ["Their", "There"], [1, 2]),
    ]
    assert [(row["prompt"], row["response"]) for row in found("demonstrations")] == [("Add.\n\n1 1", "2")]
    assert [row["prompt"] for row in found("prompts")] == ["Sing."]
    (folder / "alpaca_human_preference.json").unlink()
    with pytest.raises(UserError, match=r"files: the folder .* holds no alpaca_human_preference\.json"):
        found("rankings")


# ---- allenai/WildChat-1M: its card


def test_wildchat_gives_first_turns_with_their_writer(read):
    turn = {
        "content": "Hi",
        "role": "user",
        "language": "English",
        "redacted": False,
        "toxic": False,
        "hashed_ip": "ab",
    }
    row = {
        "conversation_hash": "0b",
        "model": "gpt-4",
        "timestamp": "2023-04-09T00:00:00+00:00",
        "conversation": [turn, turn | {"content": "Hello", "role": "assistant"}, turn | {"content": "Bye"}],
        "turn": 2,
        "language": "German",
        "openai_moderation": [{"flagged": False}],
        "detoxify_moderation": [{"toxicity": 0.01}],
        "toxic": False,
        "redacted": False,
        "state": "Texas",
        "country": "United States",
        "hashed_ip": "ab",
        "header": {"accept-language": "en", "user-agent": "Mozilla"},
    }
    others = [row | {"toxic": True}, row | {"redacted": True}, row | {"language": "Nolang", "hashed_ip": "cd"}]
    rows, reading = read("wildchat", "prompts", [row, *others])
    assert [(row["prompt"], row["user"], row["language"]) for row in rows] == [("Hi", "ab", "de"), ("Hi", "cd", "")]
    assert reading.dropped == {WHERE: 2}


# ---- openai/summarize_from_feedback, comparisons: README of openai/summarize-from-feedback


def test_summarize_from_feedback_keeps_the_worker(read):
    row = {
        "info": {
            "id": "t3_2v",
            "post": "I fell.",
            "title": "Falling",
            "subreddit": "AskDocs",
            "site": None,
            "article": None,
        },
        "split": "train",
        "summaries": [
            {"text": " Fell.", "policy": "sup4_ppo_rm3_kl10", "note": None},
            {"text": " Got up.", "policy": "ref", "note": "odd"},
        ],
        "choice": 1,
        "worker": "HNzkrs9geGu1YMMfZ5Qvdt0ZaCthfB",
        "batch": "batch15",
        "extra": {"confidence": None},
    }
    article = row | {"info": row["info"] | {"post": None, "article": "News."}}
    rows, reading = read("summarize_from_feedback", "rankings", [row, article])
    assert [without_source(row) for row in rows] == [
        {
            "prompt": "SUBREDDIT: r/AskDocs\n\nTITLE: Falling\n\nPOST: I fell.\n\nTL;DR:",
            "responses": [" Fell.", " Got up."],
            "ranks": [2, 1],
            "annotators": [],
            "labeler": "HNzkrs9geGu1YMMfZ5Qvdt0ZaCthfB",
            "category": "Summarization",
            "kind": "",
            "user": "",
            "language": "en",
        }
    ]
    assert reading.dropped == {WHERE: 1}
    assert len(read("summarize_from_feedback", "prompts", [row])[0]) == 1


# ---- adapters as a recipe uses them


@pytest.mark.parametrize("name", adapters.adapter_names())
def test_an_adapter_is_a_source_and_says_its_licence(name):
    adapter = adapters.adapter_file(name)
    kinds = [kind for kind in adapters.KINDS if kind in adapter]
    assert kinds
    for kind in kinds:
        data = Data(**{kind: [{"adapter": name}]})
        (source,) = getattr(data, kind)
        assert source.path == adapter["path"]
        assert source.licence
        assert source.revision is None or len(source.revision) == 40
        assert Data.model_validate(data.model_dump()) == data
        assert Data.model_validate(json.loads(data.model_dump_json())) == data


def test_the_documentation_lists_every_adapter():
    document = (ROOT / "docs" / "data-sources.md").read_text(encoding="utf-8")
    listed = [line.strip("| ").split(" | ") for line in document.splitlines() if line.startswith("| `")]
    listed = {cells[0].strip("`"): cells[1:] for cells in listed if len(cells) == 5}
    assert sorted(listed) == adapters.adapter_names()
    for name, (path, gives, licence, pinned) in listed.items():
        adapter = adapters.adapter_file(name)
        assert (path, licence, pinned == "yes") == (adapter["path"], adapter["licence"], "revision" in adapter)
        assert all((kind in gives) == (kind in adapter) for kind in ("demonstrations", "rankings", "prompts"))


def test_what_the_recipe_says_wins():
    given = {"adapter": "oasst2", "split": "validation", "columns": {"category": "lang"}, "where": {"lang": "en"}}
    (source,) = Data(prompts=[given]).prompts
    assert source.split == "validation"
    assert source.columns["category"] == "lang"
    assert source.columns["user"] == "user_id"
    assert source.where == {"role": "prompter", "lang": "en"}
    pinned = Data(rankings=[{"adapter": "hh-rlhf"}]).rankings[0]
    mirror = Data(rankings=[{"adapter": "hh-rlhf", "path": "someone/hh-rlhf"}]).rankings[0]
    assert (len(pinned.revision), mirror.revision) == (40, None)  # the commit of another repository
    instance = Source(path="Anthropic/hh-rlhf", adapter="hh-rlhf")
    assert Data(rankings=(instance,)).rankings == (pinned,)


@pytest.fixture
def error_of(tmp_path, monkeypatch):
    """The sentence for a recipe with this source of rankings, and the line of the source."""
    monkeypatch.chdir(tmp_path)

    def message(source):
        recipe = {
            "data": {"rankings": [source], "demonstrations": [{"adapter": "dolly"}]},
            "ppo_init": {"pretraining_share": 0},
            "ppo_ptx": {"ptx_coef": 0},
        }
        (tmp_path / "r.yaml").write_text(json.dumps(recipe, indent=1))  # JSON is YAML
        with pytest.raises(UserError) as caught:
            load_recipe(["recipe=r.yaml"])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return message


def test_a_wrong_adapter_is_one_sentence_with_file_and_line(error_of):
    assert error_of({"adapter": "hh-rhlf"}).startswith(
        "r.yaml:5: data.rankings[0]: there is no adapter 'hh-rhlf'. Did you mean hh-rlhf? There is alpaca_farm, dolly,"
    )
    assert error_of({"adapter": "no_robots"}) == (
        "r.yaml:5: data.rankings[0]: the adapter 'no_robots' has no rankings; it has demonstrations and prompts."
    )
    assert error_of({"path": "a.jsonl", "adapter": 3}).startswith("r.yaml:6: data.rankings[0].adapter=3: ")
    assert error_of({"columns": {}}) == "r.yaml:4: data.rankings[0].path is missing."


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        (3, "3 must be a column's name, a list of names, or a rule such as {of: NAME}"),
        ([], "[] must be a list of column names"),
        ({"score": "a"}, "{'score': 'a'} must have one of of, scores, choice, each, dialogue, text"),
        ({"scores": "a", "choice": "b"}, "must have one of of, scores, choice, each, dialogue, text"),
        ({"choice": "a", "frist": 1}, "a rule with choice has no 'frist' (did you mean 'first'?)"),
        ({"choice": "a", "first": "x"}, "first='x' must be a whole number"),
        ({"of": "a", "map": [1]}, "map must be {THEIRS: OURS, ...}"),
        ({"of": 3}, "of: 3 must be a column's name"),
        ({"each": "a"}, "as must be {OURS: THEIRS, ...}"),
        ("a[", "'a[' is no path"),
        ("a[x]", "'a[x]' is no path"),
        ("[0]", "'[0]' is no path"),
        ("", "a column's name is empty"),
        ({"text": "x {a[} y"}, "'a[' is no path"),
    ],
)
def test_a_wrong_rule_is_one_sentence(error_of, rule, problem):
    message = error_of({"path": "a.jsonl", "columns": {"ranks": rule}})
    assert message.startswith("r.yaml:")
    assert "data.rankings[0].columns.ranks: " in message
    assert problem in message


@pytest.mark.parametrize(
    ("condition", "problem"),
    [
        ({"more": 1}, "{'more': 1} must be a value, a list of values, or one of not, min, max"),
        ({"min": "a"}, "min: 'a' must be a number"),
        ([[1]], "[[1]] must be a list of plain values"),
    ],
)
def test_a_wrong_condition_is_one_sentence(error_of, condition, problem):
    message = error_of({"path": "a.jsonl", "where": {"lang": condition}})
    assert "data.rankings[0].where.lang: " in message
    assert problem in message


# ---- paths, rules and conditions on rows


ROW = {"a": {"b": [{"c": 1}, {"c": None}]}, "x.y": "named so", "n": None, "t": [1, 2, 3]}


def test_paths():
    assert columns.at("a.b[*].c", ROW) == [1, None]
    assert columns.at("a.b[-1]", ROW) == {"c": None}
    assert columns.at("t[:-1]", ROW) == [1, 2]
    assert columns.at("x.y", ROW) == "named so"
    for path, problem in (
        ("a.bb", r"a\.bb: there is no 'bb' \(did you mean 'b'\?\) in"),
        ("n.z", "n.z: there is no 'z' in null"),
        ("t[3]", r"t\[3\]: the list has 3 entries only"),
        ("a[0]", r"a\[0\]: \{.*\} is no list"),
    ):
        with pytest.raises(columns.Invalid, match=problem):
            columns.at(path, ROW)


def test_rules():
    row = {"s": ["0.5", 2, -1.0, 2], "c": "1", "turns": [{"from": "human", "value": "Hi"}], "who": "x"}
    assert columns.value(columns.rule({"scores": "s"}), row) == [3, 1, 4, 1]
    assert columns.value(columns.rule({"choice": "c", "first": 1}), row, 3) == [1, 2, 2]
    assert columns.value(columns.rule({"of": "c", "map": {1: "one"}}), row) == "one"
    assert columns.value(columns.rule({"of": "who", "map": {"y": "yes"}, "else": ""}), row) == ""
    renamed = columns.value(columns.rule({"each": "turns", "as": {"role": "from", "content": "value"}}), row)
    assert renamed == [{"role": "human", "content": "Hi"}]
    assert columns.value(columns.rule({"text": "{who}: {turns[0].value}!"}), row) == "x: Hi!"
    for rule, problem in (
        ({"choice": "c", "first": 2}, "c is '1', but must be the number of a response, 2 to 4"),
        ({"scores": "turns[*].value"}, "holds 'Hi', but a score is a finite number"),
        ({"scores": "who"}, "who is 'x', but must be a list of scores"),
        ({"of": "who", "map": {1: 2, "y": 3}}, "who is 'x', which is none of 1, y"),
        ({"each": "s", "as": {"role": "r"}}, "but must be a list of objects"),
        ({"dialogue": "who"}, "who does not begin with 'Human:' or 'Assistant:'"),
    ):
        with pytest.raises(columns.Invalid, match=problem):
            columns.value(columns.rule(rule), row, 3)


@pytest.mark.parametrize(
    ("where", "met"),
    [
        ({"t": True}, True),
        ({"t": "true"}, True),
        ({"t": [False, None]}, False),
        ({"n": 1}, True),
        ({"n": "1"}, True),
        ({"n": {"min": 1, "max": 1}}, True),
        ({"n": {"min": 1.5}}, False),
        ({"n": {"min": 0, "not": [1, 2]}}, False),
        ({"null": None}, True),
        ({"null": {"not": None}}, False),
        ({"null": {"min": 0}}, False),
        ({"gone": None, "deep.er": None}, True),
    ],
)
def test_conditions(where, met):
    row = {"t": True, "n": 1.0, "null": None}
    assert columns.holds({path: columns.condition(wanted) for path, wanted in where.items()}, row) is met


def test_columns_from_nested_values_without_an_adapter(tmp_path):
    path = jsonl(tmp_path / "r.jsonl", [{"q": "p", "out": [{"t": "x", "s": 1}, {"t": "y", "s": 2}], "meta": {"by": 7}}])
    rules = {"prompt": "q", "responses": "out[*].t", "ranks": {"scores": "out[*].s"}, "user": "meta.by"}
    (source,) = Data(rankings=[{"path": str(path), "columns": rules}]).rankings
    (row,), _ = read_source(source, "rankings", "k")
    assert (row["responses"], row["ranks"], row["user"]) == (["x", "y"], [2, 1], "7")
    for rules, problem in (
        ({"prompt": "qq.a"}, r"data.rankings\[0\]\.columns: .* line 1 has no column 'qq' \(did you mean 'q'\?\)"),
        ({"prompt": {"choice": "q"}}, r"columns: prompt cannot be made from a choice, only ranks can"),
        (
            {"prompt": "q", "responses": "out[*].text", "ranks": "out[*].s"},
            r"line 1: out\[\*\]\.text: there is no 'text'",
        ),
    ):
        (source,) = Data(rankings=[{"path": str(path), "columns": rules}]).rankings
        with pytest.raises(UserError, match=problem):
            read_source(source, "rankings", "k")
    (source,) = Data(rankings=[{"path": str(path), "where": {"lng": "en"}, "columns": {"prompt": "q"}}]).rankings
    with pytest.raises(UserError, match=r"where: .* has no column 'lng'"):
        read_source(source, "rankings", "k")
