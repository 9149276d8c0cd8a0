"""The prompts of the three stages, exactly TinyThinker's (Piao and Park 2024), and the answer.

A checkpoint that was fine-tuned on them works unchanged. What a stage generated goes into the
prompts of the stages after it:

    {question}
    (A) {option} (B) {option} ...
    Recall: {recall}
    Analyze: For option A, {analysis} For option B, {analysis} ...
    Summarize: So the answer is option X.

If you change a wording, change it in `worked`, too, and in `pieces` of data/train.py, which train
on whole texts, and search again: a journal of search.py notices by itself, a plan does not.

    python -c "from data.prompts import *; print(find_answer('So the answer is option B.'))"
"""

import re

from data.questions import Question

STAGES = ("recall", "analyze", "summarize")


def base_prompt(question: Question) -> str:
    choices = zip(question.labels, question.options)
    return question.stem + "\n" + " ".join(f"({label}) {text}" for label, text in choices)


def recall_prompt(question: Question) -> str:
    return f"{base_prompt(question)}\nRecall:"


def analyze_prompt(question: Question, recall: str, label: str) -> str:
    return f"{recall_prompt(question)} {recall}\nAnalyze: For option {label},"


def summarize_prompt(question: Question, recall: str, analyses: list[str]) -> str:
    said = zip(question.labels, analyses)
    options = " ".join(f"For option {label}, {text}" for label, text in said)
    return f"{recall_prompt(question)} {recall}\nAnalyze: {options}\nSummarize:"


def finish(text: str) -> str:
    """What a stage generated, as the next stage's prompt quotes it."""
    text = text.strip()
    return text if text.endswith((".", '"', "'")) else text + "."


def find_answer(summary: str) -> str | None:
    """The label a summary names, None if it names none."""
    match = re.search(r"the answer is option ([A-Z])\.", summary)
    return match and match[1]


def worked(question: Question) -> str:
    """A worked example for an untuned model, from a question with targets. Here every text ends at
    a newline, which the model will imitate."""
    said = zip(question.labels, question.analyses)
    analyses = "\n".join(f"For option {label}, {text}" for label, text in said)
    return (
        f"{recall_prompt(question)} {question.recall}\nAnalyze: {analyses}\n"
        f"Summarize: So the answer is option {question.answer}.\n\n"
    )


def stage_prompts(index: int, question: Question, said: list[list[str]]) -> list[str]:
    """The prompts of stage `index`; `said` holds what the stages before it generated."""
    if index == 0:
        return [recall_prompt(question)]
    recall = said[0][0]
    if index == 1:
        return [analyze_prompt(question, recall, label) for label in question.labels]
    return [summarize_prompt(question, recall, said[1])]
