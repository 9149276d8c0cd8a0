"""The commands of generate.py, which answers one question, and of skip.py, which ranks.

python generate.py "Which one contains alcohol?" wrench lemonade milk wine
"""

import string

import generate
import skip
from data import cli, report
from data.questions import Question
from data.setup import IMPORTANCE_QUESTIONS, configure, importance_of, load, validation_questions
from model import expect
from skip import POLICIES


def main() -> None:
    """Answers one question and shows each stage, or continues a text."""
    flags = (*cli.MODEL_FLAGS, *cli.SEARCH_FLAGS[1:], *cli.METHOD_FLAGS, "--temperature")
    parser = cli.make_parser(generate.__doc__, *flags)
    add = parser.add_argument
    add(
        "text",
        type=cli.utf8,
        help="the question; or, if no choices follow, a text, continued as the first stage is",
    )
    add("choices", type=cli.utf8, nargs="*", help="the options: they get the labels A, B, ...")
    args = parser.parse_args()
    wanted = "expected none, to continue the text, or 2 to 26"
    expect(len(args.choices) in (0, *range(2, 27)), f"choices: {wanted}; found {len(args.choices)}")
    greedy = not (args.choices and args.temperature)
    expect(greedy, "--temperature: the stages of a question are greedy; it is for a text alone")
    pipeline, folder = load(args)
    setting, budgets, exit, _ = configure(args, pipeline, folder)
    skips = [POLICIES[args.method or "litestage"](setting, budget) for budget in budgets]
    if not args.choices:
        exit = exit if args.exit_threshold else None  # by default a plain text just goes on
        model, tokenizer, most = pipeline.model, pipeline.tokenizer, args.max_new_tokens
        ids, ends = tokenizer.encode(args.text), tokenizer.eos_ids
        check_length(pipeline, ids)
        asked = args.stage_budgets or args.plan or args.method
        skip = skips[0] if asked else None  # and skips nothing
        new = generate.generate(model, ids, most, ends, skip, exit, args.temperature)
        skipped = f"{new.timings.skipped:g} of {2 * setting.n_layers} sub-layers skipped"
        print(f"{tokenizer.decode(ids + new.ids)}\n[{len(new.ids)} tokens, {new.stop}, {skipped}]")
        return
    labels = tuple(string.ascii_uppercase[: len(args.choices)])
    question = Question("", args.text, labels, tuple(args.choices), labels[0])
    check_length(pipeline, pipeline.prompt_ids(0, question, [])[0])
    label, stages = pipeline.answer([question], skips, exit)[0]
    for stage in stages:
        report.print_stage(stage, labels, 2 * setting.n_layers)
    option = dict(zip(labels, args.choices)).get(label, "no such option")
    print(f"answer: {label} ({option})" if label else "answer: none given")


def check_length(pipeline: generate.Pipeline, ids: list[int]) -> None:
    """Raises InputError unless a prompt is one, and fits the model's context."""
    context = pipeline.model.args.max_seq_len
    expect(0 < len(ids) <= context, f"text: expected 1 to {context} tokens, found {len(ids)}")


def show_importance() -> None:
    """Prints the similarity of every sub-layer, and the ranking."""
    args = cli.make_parser(skip.__doc__, *cli.MODEL_FLAGS, "--limit", "--granularity").parse_args()
    pipeline, _ = load(args)
    questions = validation_questions(args.data)[: args.limit or IMPORTANCE_QUESTIONS]
    importance, _ = importance_of(pipeline, questions)
    ranking = skip.rank(importance.similarity, args.granularity)
    report.print_importance(importance.similarity, ranking)
