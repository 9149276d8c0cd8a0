"""The commands of generate.py, which answers one question, and of skip.py, which ranks.

python generate.py "Which one contains alcohol?" wrench lemonade milk wine
"""

import string

import generate
import skip
from data.questions import Question, read_questions
from generate import Draft, Exit, Pipeline, importance_of
from model import expect
from tools.flags import METHOD_FLAGS, MODEL_FLAGS, SEARCH_FLAGS, make_parser, utf8
from tools.setup import (
    IMPORTANCE_QUESTIONS,
    Asked,
    Wanted,
    answer_all,
    configure,
    load_asked,
    note,
    read_shots,
    validation_file,
)
from tools.tables import count, print_importance, print_stage


def main() -> None:
    """Answers one question and shows each stage, or continues a text."""
    own = ("--show-prompts", "--temperature")
    flags = (*MODEL_FLAGS, *SEARCH_FLAGS[1:], *METHOD_FLAGS, *own)
    parser = make_parser(generate.__doc__, *flags, one_plan=True)
    add = parser.add_argument
    add(
        "text",
        type=utf8,
        help="the question; or, if no choices follow, a text, continued as the first stage is",
    )
    add("choices", type=utf8, nargs="*", help="the options: they get the labels A, B, ...")
    args = parser.parse_args()
    wanted = "expected none, to continue the text, or 2 to 26"
    expect(len(args.choices) in (0, *range(2, 27)), f"choices: {wanted}; found {len(args.choices)}")
    greedy = not (args.choices and args.temperature)
    expect(greedy, "--temperature: the stages of a question are greedy; it is for a text alone")
    if args.choices:
        answer(args)
    else:
        continue_text(args)


def answer(args) -> None:
    """Answers a question in stages, as the flags ask."""
    labels = tuple(string.ascii_uppercase[: len(args.choices)])
    question = Question("", args.text, labels, tuple(args.choices), labels[0])
    shots = read_shots(args.data, args.shots, args.shots_file, [question])
    asked = Asked(args.data, None, [question], args.shots, shots)
    pipeline = load_asked(args, asked)
    check_length(pipeline, pipeline.prompt_ids(0, question, [])[0])
    plan = configure(pipeline, args.model, Wanted.of(args), asked)[0]
    setting = plan.setting(args.seed)
    policy = (skip.POLICIES | setting.trained)[args.method or "litestage"]
    skips = []
    for index, budget in enumerate(plan.budgets):
        skip_set = policy(setting.at(index), budget)
        skips.append(Draft(skip_set, plan.draft[index]) if plan.draft else skip_set)
    label, stages = pipeline.answer([question], skips, plan.exit)[0]
    for stage in stages:
        print_stage(stage, labels, 2 * setting.n_layers, args.show_prompts)
    if label is None:
        print("answer: none given")
    else:
        print(f"answer: {label} ({args.choices[labels.index(label)]})")


def continue_text(args) -> None:
    """Continues a text as the first stage's are: it skips, and exits, only where a flag asks."""
    shots = args.shots or args.shots_file
    expect(not shots, "--shots: worked examples are for a question with choices, not for a text")
    asked = Asked(args.data, None, [], 0, "")
    if args.compile:
        note("--compile: for the stages of a question; a text alone is decoded as usual")
        args.compile = False
    pipeline = load_asked(args, asked)
    model = pipeline.model
    tokenizer = pipeline.tokenizer
    ids = tokenizer.encode(args.text)
    check_length(pipeline, ids)
    skipped = None
    exit = None
    drafts = 0
    if args.exit_threshold:
        exit = Exit(args.exit_window or Exit().window, args.exit_threshold)
    if args.plan or args.stage_budgets or args.method or args.draft:
        plan = configure(pipeline, args.model, Wanted.of(args), asked)[0]
        setting = plan.setting(args.seed)
        policies = skip.POLICIES | setting.trained
        skipped = policies[args.method or "litestage"](setting, plan.budgets[0])
        exit = plan.exit
        drafts = plan.draft[0] if plan.draft else 0
    expect(not (drafts and args.temperature), "--draft: expected a --temperature of 0")
    limit = args.max_new_tokens
    asked_for = (limit, tokenizer.eos_ids, skipped, exit, args.temperature, drafts)
    new = generate.generate(model, ids, *asked_for)
    many = f"{count(new.timings.skipped)} of {2 * model.args.n_layers} sub-layers skipped"
    print(f"{tokenizer.decode(ids + new.ids)}\n[{len(new.ids)} tokens, {new.stop}, {many}]")
    if args.show_prompts:
        print(f"prompt: {args.text!r}")


def check_length(pipeline: Pipeline, ids: list[int]) -> None:
    """Raises InputError unless a prompt is one, and fits the model's context."""
    context = pipeline.model.args.max_seq_len
    expect(0 < len(ids) <= context, f"text: expected 1 to {context} tokens, found {len(ids)}")


def show_importance() -> None:
    """Prints the similarity of every sub-layer, and the ranking."""
    args = make_parser(skip.__doc__, *MODEL_FLAGS, "--limit", "--granularity").parse_args()
    file = validation_file(args.data)
    questions = read_questions(file)[: args.limit or IMPORTANCE_QUESTIONS]
    shots = read_shots(args.data, args.shots, args.shots_file, questions)
    asked = Asked(args.data, file, questions, args.shots, shots)
    pipeline = load_asked(args, asked)
    if args.model != "demo" and args.data == "demo":
        note("importance is measured on the demo's questions; --data names others")
    answered = answer_all(pipeline, questions, 16)
    importance = importance_of(pipeline, questions, answered)
    ranking = skip.rank(importance.similarity, args.granularity or "sublayer")
    print_importance(importance.similarity, ranking)
