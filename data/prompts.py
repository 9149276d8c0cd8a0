"""The prompts of the stages, exactly TinyThinker's (Piao and Park 2024), and the answer.

A checkpoint that was fine-tuned on them works unchanged. What a stage says goes into the prompts
of the stages after it, so a whole question reads

    {question}
    (A) {option} (B) {option} ...
    Recall: {general knowledge}
    Analyze: For option A, {analysis} For option B, {analysis} ...
    Summarize: So the answer is option X.

and the prompt of a text is all that stands before it. In use, each option is analyzed with no
other option's analysis before it.

The list STAGES holds every wording, once. Inference, training, worked examples and the demo's
tokenizer all ask this list, and nothing else knows how many stages there are. Change it, and
train and search again.

    python -c "from data.prompts import *; print(find_answer('So the answer is option B.'))"
"""

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data.questions import Question

ANSWER = "the answer is option {}."  # {}: a label


def one_text(question: Question) -> list[str]:
    """The leads of a stage that says one text, right after its opening."""
    return [""]


def each_option(question: Question) -> list[str]:
    """The leads of a stage that says one text for each option."""
    return [f" For option {label}," for label in question.labels]


def recall_target(question: Question) -> list[str]:
    return [question.recall]


def analyze_targets(question: Question) -> list[str]:
    return list(question.analyses)


def answer_target(question: Question) -> list[str]:
    return ["So " + ANSWER.format(question.answer)]


@dataclass(frozen=True)
class Stage:
    """One stage: it opens, and then says one text after each of its leads."""

    name: str
    opening: str
    targets: Callable[[Question], list[str]]  # what its texts should be: to train, and as examples
    leads: Callable[[Question], list[str]] = one_text  # what stands right before each text
    quoted: bool = True  # whether later prompts `finish` its texts


STAGES = [
    Stage("recall", "\nRecall:", recall_target),
    Stage("analyze", "\nAnalyze:", analyze_targets, each_option),
    Stage("summarize", "\nSummarize:", answer_target, quoted=False),
]


def base_prompt(question: Question) -> str:
    """What every prompt begins with."""
    text = question.stem + "\n"
    choices = zip(question.labels, question.options, strict=True)
    return text + " ".join(f"({label}) {option}" for label, option in choices)


def stage_prompts(index: int, question: Question, said: list[list[str]]) -> list[str]:
    """The prompts of stage `index`, one for each text that it says.

    said: for each stage before it, its texts, as `quote` gives them.
    """
    prompt = base_prompt(question)
    for before, texts in zip(STAGES[:index], said):
        prompt += before.opening
        for lead, text in zip(before.leads(question), texts, strict=True):
            prompt += f"{lead} {text}"
    stage = STAGES[index]
    return [prompt + stage.opening + lead for lead in stage.leads(question)]


def quote(index: int, text: str) -> str:
    """What stage `index` said, as the prompts of later stages quote it."""
    if STAGES[index].quoted:
        return finish(text)
    return text


def finish(text: str) -> str:
    """The text without blanks around it, and with an end."""
    text = text.strip()
    if text.endswith((".", '"', "'")):
        return text
    return text + "."


def find_answer(summary: str, labels: Sequence[str] = string.ascii_uppercase) -> str | None:
    """The first of a question's `labels` that its last stage names, None if it names none."""
    before, after = ANSWER.split("{}")
    label = "([" + re.escape("".join(labels)) + "])"
    match = re.search(re.escape(before) + label + re.escape(after), summary)
    if match is None:
        return None
    return match[1]


def worked(question: Question) -> str:
    """A worked example for an untuned model, from a question with targets.

    Here every text ends at a newline, which the model will imitate.
    """
    example = base_prompt(question)
    for stage in STAGES:
        example += stage.opening
        lines = []
        for lead, text in zip(stage.leads(question), stage.targets(question), strict=True):
            line = f"{lead} {text}"
            if lines:
                line = line.removeprefix(" ")
            lines.append(line)
        example += "\n".join(lines)
    return example + "\n\n"


def pieces(
    question: Question, orders: Sequence[Sequence[int] | None] | None = None
) -> list[tuple[str, int | None]]:
    """A question with targets as one text, in pieces: prompt, text, prompt, text, ...

    Each piece comes with the index of the stage that says it, None for a prompt. Every prompt ends
    where one of `stage_prompts` ends, and every text is as later prompts quote it.
    orders: for each stage the order in which it says its texts; None is their own.
    """
    if orders is None:
        orders = [None] * len(STAGES)
    found = []
    prompt = base_prompt(question)
    for index, stage in enumerate(STAGES):
        leads = stage.leads(question)
        texts = stage.targets(question)
        prompt += stage.opening
        for i in orders[index] or range(len(texts)):
            found.append((prompt + leads[i], None))
            found.append((" " + quote(index, texts[i]), index))
            prompt = ""
    return found
