"""The stages' prompts, letter by letter, and what is made of the same list: worked examples,
training texts, forks.

python -m pytest -q tests/test_prompts.py
"""

import pytest

from data import prompts
from data.prompts import (
    STAGES,
    Stage,
    answer_target,
    find_answer,
    finish,
    pieces,
    quote,
    stage_prompts,
    worked,
)
from data.questions import Question

BASE = "Which can fly?\n(A) a robin (B) an oak"
TAUGHT = Question(
    "1",
    "Which can fly?",
    ("A", "B"),
    ("a robin", "an oak"),
    "A",
    "Birds fly.",
    ("a robin is a bird.", "an oak is a tree."),
)
SAID = [["Birds fly."], ["a robin is a bird.", "an oak is a tree."]]


def test_stage_prompts_are_tinythinkers():
    assert stage_prompts(0, TAUGHT, []) == [BASE + "\nRecall:"]
    assert stage_prompts(1, TAUGHT, SAID[:1]) == [
        BASE + "\nRecall: Birds fly.\nAnalyze: For option A,",
        BASE + "\nRecall: Birds fly.\nAnalyze: For option B,",
    ]
    assert stage_prompts(2, TAUGHT, SAID) == [
        BASE + "\nRecall: Birds fly.\nAnalyze: For option A, a robin is a bird."
        " For option B, an oak is a tree.\nSummarize:"
    ]


def test_a_worked_example_has_a_line_for_each_text():
    assert worked(TAUGHT) == (
        BASE + "\nRecall: Birds fly.\nAnalyze: For option A, a robin is a bird.\n"
        "For option B, an oak is a tree.\nSummarize: So the answer is option A.\n\n"
    )


def test_a_training_text_says_which_stage_says_what():
    assert pieces(TAUGHT) == [
        (BASE + "\nRecall:", None),
        (" Birds fly.", 0),
        ("\nAnalyze: For option A,", None),
        (" a robin is a bird.", 1),
        (" For option B,", None),
        (" an oak is a tree.", 1),
        ("\nSummarize:", None),
        (" So the answer is option A.", 2),
    ]


def test_training_analyzes_in_any_order():
    text = "".join(piece for piece, _ in pieces(TAUGHT, [None, [1, 0], None]))
    assert text == (
        BASE + "\nRecall: Birds fly.\nAnalyze: For option B, an oak is a tree."
        " For option A, a robin is a bird.\nSummarize: So the answer is option A."
    )


def test_training_prompts_end_where_those_of_inference_do():
    """Also where a target has no end of its own, which is then added, as in a later prompt."""
    bare = Question("1", "Q?", ("A", "B"), ("x", "y"), "B", "Birds fly", ("one", 'a "word"'))
    said = [["Birds fly."], ["one.", 'a "word"']]
    text = ""
    prompts_seen = []
    for piece, stage in pieces(bare):
        if stage is not None:
            prompts_seen.append(text)
        text += piece
    assert prompts_seen[0] == stage_prompts(0, bare, [])[0]
    assert prompts_seen[1] == stage_prompts(1, bare, said[:1])[0]
    assert prompts_seen[3] == stage_prompts(2, bare, said)[0]


def test_options_come_from_the_data_commas_and_all():
    options = ("ice, crushed", "soup", "salt, pepper, and oil", "grass", "a car")
    soup = Question("2", "Which is hot?", tuple("ABCDE"), options, "B")
    asked = stage_prompts(1, soup, [["Soup is hot."]])
    shown = "\n(A) ice, crushed (B) soup (C) salt, pepper, and oil (D) grass (E) a car\nRecall:"
    for label, prompt in zip("ABCDE", asked, strict=True):
        assert shown in prompt and prompt.endswith(f"\nAnalyze: For option {label},")


def test_labels_are_the_questions_own():
    odd = Question("4", "Which?", ("b", "2"), ("x", "y"), "2")
    assert stage_prompts(0, odd, []) == ["Which?\n(b) x (2) y\nRecall:"]
    assert stage_prompts(1, odd, [["z."]])[1].endswith("\nRecall: z.\nAnalyze: For option 2,")
    assert "For option b, p. For option 2, q." in stage_prompts(2, odd, [["z."], ["p.", "q."]])[0]


def test_an_answer_is_one_of_the_questions_labels():
    assert find_answer("So the answer is option 2.", "12") == "2"
    assert find_answer("the answer is option b. the answer is option A.", "A") == "A"
    assert find_answer("So the answer is option 2.") is None
    assert find_answer("So the answer is option ^.", ("a", "^")) == "^"
    assert find_answer("So the answer is option b.", "ac") is None


def test_only_texts_before_the_last_stage_are_quoted():
    assert quote(0, " Birds fly") == "Birds fly."
    assert quote(1, " a bird\n") == "a bird."
    assert quote(2, " So the answer") == " So the answer"


TWO = [
    Stage("reason", "\nReason:", lambda question: [question.recall]),
    Stage("answer", "\nAnswer:", answer_target, quoted=False),
]


def test_another_list_of_stages_changes_everything(monkeypatch):
    """A fork replaces the list, and no other file: prompts, examples and training follow."""
    monkeypatch.setattr(prompts, "STAGES", STAGES[:])
    prompts.STAGES[:] = TWO
    assert stage_prompts(0, TAUGHT, []) == [BASE + "\nReason:"]
    assert stage_prompts(1, TAUGHT, [["So."]]) == [BASE + "\nReason: So.\nAnswer:"]
    whole = BASE + "\nReason: Birds fly.\nAnswer: So the answer is option A."
    assert worked(TAUGHT) == whole + "\n\n"
    assert pieces(TAUGHT)[-1] == (" So the answer is option A.", 1)
    assert "".join(text for text, _ in pieces(TAUGHT)) == whole


@pytest.mark.parametrize(
    "text, expected",
    [
        (" Birds fly", "Birds fly."),
        ("Birds fly. \n", "Birds fly."),
        ('He said "no"', 'He said "no"'),
        ("the birds'", "the birds'"),
        ("Do birds fly?", "Do birds fly?."),
        ("so,", "so,."),
        ("", "."),
        (" \n", "."),
        ("two\nlines", "two\nlines."),
    ],
)
def test_finish_strips_and_ends_with_a_full_stop(text, expected):
    assert finish(text) == expected
    assert finish(finish(text)) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        (" So the answer is option B.", "B"),
        ("the answer is option A. No, the answer is option C.", "A"),
        ("the answer is option AB. the answer is option C.", "C"),
        ("So the answer is option B", None),
        ("So the answer is option b.", None),
        ("So the answer is B.", None),
        ("The answer is option B.", None),
        ("the answer is option (B).", None),
        ("", None),
    ],
)
def test_find_answer_takes_the_first_match_or_none(text, expected):
    assert find_answer(text) == expected
