"""Questions about the demo's world, with explanations for training its model.

Every question is "which of four things has this property?", with one right
answer. What a question *means* is its property and the set of its four options;
a hash of that, which neither the phrasing nor the order nor the seed changes,
puts it in one of four splits. So no question is in two splits, and the default
split `fresh` holds questions that neither training nor validation nor test has
seen. The splits `names` and `kinds` are drills, easier questions for the start
of the training. Say --out or --splits.

    python data/demo/make.py --splits data/demo     # the shipped three splits
    python data/demo/make.py --seed 1 --count 500 --out fresh.jsonl
"""

import argparse
import hashlib
import json
import os
import random
from functools import cache

from world import HAVE, KINDS, LACK, MASS, PROPERTIES, THINGS, article, plural, rule, say, truth

SHIPPED = {"train": 8000, "valid": 500, "test": 600}  # questions in the shipped splits
SEED = 1  # the shipped splits' seed
LABELS = "ABCD"
STEMS = [
    "Which of these {p}?",
    "Which of these {p}?",
    "Which one {p}?",
    "What {p}?",
    "Find the one that {p}.",
    "Ann is looking for something that {p}. What is it?",
    "Tom says that it {p}. What does he mean?",
]
NAMES = list(PROPERTIES)
DRILLED = [kind for kind in KINDS if kind not in THINGS]
SPLITS = ("fresh", "train", "valid", "test")
DRILLS = ("names", "kinds")  # for the start of the training only


def meaning_split(name, options):
    """The split of a question, from its property and the set of its options alone."""
    key = "|".join([name, *sorted(options)]).encode()
    bucket = int.from_bytes(hashlib.sha256(key).digest()[:4], "big") % 10
    return (("train",) * 7 + ("valid", "test", "fresh"))[bucket]


@cache
def believers(name):
    """What a recall may name: kinds that all or mostly have a property, and single things."""
    kinds = [kind for kind in KINDS if rule(name, kind)[0] is True]
    things = [thing for thing in HAVE[name] if THINGS[thing] not in kinds]
    named = [("most " if rule(name, kind)[1] == "most" else "") + plural(kind) for kind in kinds]
    return named, [plural(thing) for thing in things]


@cache
def doubters(name):
    """Kinds and exceptions that the recall may name as lacking a property."""
    kinds = [kind for kind in KINDS if rule(name, kind) == (False, "all")]
    odd = [thing for thing in LACK[name] if rule(name, THINGS[thing])[0] is True]
    return [plural(thing) for thing in odd] or [plural(kind) for kind in kinds]


def listing(words):
    """[a] -> a, [a, b, c] -> a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def recall_text(rng, name):
    """General knowledge about a property, without a look at the options: Most birds can fly."""
    kinds, things = believers(name)
    n = rng.choice((1, 2, 2, 3))
    named = rng.sample(kinds, min(n, len(kinds)))
    named += rng.sample(things, min(n - len(named), len(things)))
    many = len(named) > 1 or named[0] not in MASS
    text = f"{listing(named)} {say(name, many=many)}"
    if rng.random() < 0.3 and (others := doubters(name)):
        other = rng.choice(others)
        no = say(name, False, many=other not in MASS).split()  # cannot | is not | do not
        text += f", but {other} {' '.join(no[: 1 if no[0] == 'cannot' else 2])}"
    return f"{text[0].upper()}{text[1:]}."


def analyze_text(rng, name, thing):
    """Why a thing has a property or not, from its kind: a penguin is a bird, but it cannot fly."""
    kind, has = THINGS[thing], truth(name, thing)
    value, share = rule(name, kind)
    if value == has and rng.random() >= 0.5:
        reason = (
            f"and {'most ' if share == 'most' else ''}{plural(kind)} {say(name, has, many=True)}"
        )
    else:
        link = "so" if value == has and share == "all" else "and" if value in (has, None) else "but"
        reason = f"{link} it {say(name, has)}"
    return f"{article(thing)} is {article(kind)}, {reason}."


def question(rng, name, options, answer, recall, analyses):
    """One question in the OpenBookQA layout, with explanations as training targets beside it."""
    stem = rng.choice(STEMS).format(p=say(name))
    choices = [{"label": label, "text": text} for label, text in zip(LABELS, options)]
    return {
        "question": {"stem": stem, "choices": choices},
        "answerKey": LABELS[options.index(answer)],
        "recall": recall,
        "analyze": analyses,
    }


def draw_question(rng, split):
    """(meaning, question) of this split. Wrong options are often of a kind that could be right."""
    while True:
        name = rng.choice(NAMES)
        lack = LACK[name]
        kin = {THINGS[thing] for thing in HAVE[name]}
        near = [thing for thing in lack if THINGS[thing] in kin]
        answer = rng.choice(HAVE[name])
        wrong = set()
        while len(wrong) < 3:
            hard = near and rng.random() < 0.35 and not wrong.issuperset(near)
            wrong.add(rng.choice(near if hard else lack))
        options = sorted(wrong | {answer})
        if meaning_split(name, options) != split:
            continue
        rng.shuffle(options)
        analyses = [analyze_text(rng, name, thing) for thing in options]
        recall = recall_text(rng, name)
        meaning = name, frozenset(options)
        return meaning, question(rng, name, options, answer, recall, analyses)


def draw_drill(rng, split):
    """(meaning, drill). `names`: say what option B is called, which teaches to look an option up.
    `kinds`: which of these is a bird? The analyses say the kind of every option."""
    kind = rng.choice(DRILLED)
    mine = [thing for thing in THINGS if THINGS[thing] == kind]
    others = [thing for thing in THINGS if THINGS[thing] != kind]
    answer = rng.choice(mine)
    options = rng.sample(others, 3) + [answer]
    rng.shuffle(options)
    name = f"is {article(kind)}"
    if split == "names":
        analyses = [f"{article(thing)}." for thing in options]
        row = question(rng, name, options, answer, "Names.", analyses)
        row["question"]["stem"] = "Name them."
    else:
        named = listing([plural(thing) for thing in rng.sample(mine, 2)])
        recall = f"{named[0].upper()}{named[1:]} are {plural(kind)}."
        analyses = [f"{article(thing)} is {article(THINGS[thing])}." for thing in options]
        row = question(rng, name, options, answer, recall, analyses)
    return (name, tuple(options)), row


def draw(split, seed, count):
    """`count` questions of a split, no two with the same meaning."""
    named = "drill" if split in DRILLS else split
    rng, seen, rows = random.Random(f"{named} {seed}"), set(), []
    while len(rows) < count:
        meaning, row = draw_drill(rng, split) if split in DRILLS else draw_question(rng, split)
        if meaning not in seen:
            seen.add(meaning)
            rows.append({"id": f"{split}-{seed}-{len(rows)}"} | row)
    return rows


def write(path, rows):
    """JSON lines, to a temporary file first, so that a killed run leaves nothing half written."""
    part = f"{path}.part"
    try:
        with open(part, "w", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.unlink(part)


class Parser(argparse.ArgumentParser):
    """A mistake on the command line is one line."""

    def error(self, message):
        self.exit(2, f"error: {message}\n")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=SEED, help="(default: %(default)s)")
    parser.add_argument("--count", type=int, default=500, help="(default: %(default)s)")
    parser.add_argument("--out", help="the file to write")
    parser.add_argument(
        "--split", choices=SPLITS + DRILLS, default="fresh", help="what to draw from"
    )
    parser.add_argument("--splits", metavar="DIR", help="write the shipped three files there")
    args = parser.parse_args()
    if args.out and os.path.exists(args.out) and not os.path.isfile(args.out):
        parser.error(f"--out {args.out}: expected a file, found a folder or a device")
    if args.count < 1:
        parser.error(f"--count must be at least 1, found {args.count}")
    try:
        if args.splits:
            for split, count in SHIPPED.items():
                write(os.path.join(args.splits, f"{split}.jsonl"), draw(split, SEED, count))
        elif args.out:
            write(args.out, draw(args.split, args.seed, args.count))
        else:
            parser.error("--out FILE or --splits DIR is needed")
    except OSError as e:
        parser.error(f"{e.filename}: cannot be written ({e.strerror})")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")


if __name__ == "__main__":
    main()
