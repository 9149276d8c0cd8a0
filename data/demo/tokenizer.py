"""Trains the demo's tokenizer, a byte-level BPE.

The text is what the model sees: stage prompts and explanations, in the
questions of the given files. Ids 0 and 1 are the begin and the end token;
every text is encoded with the begin token first.

    python data/demo/tokenizer.py --data data/demo/train.jsonl --out tokenizer
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # not this folder: it has a tokenizer.py

import data  # noqa: F401, E402  # isort: skip  (first: Ctrl-C is one line while torch loads)

from tokenizers import Tokenizer, decoders, models  # noqa: E402

from tokenizers import pre_tokenizers, processors, trainers  # noqa: E402  # isort: skip

from data.prompts import pieces  # noqa: E402
from data.questions import read_questions  # noqa: E402
from model import InputError  # noqa: E402

BEGIN, END = "<s>", "</s>"
VOCAB_SIZE = 1600


def texts(path):
    """Everything of every question in a file of JSON lines that is ever tokenized."""
    for question in read_questions(path, targets=True):
        yield "".join(text for text, _ in pieces(question))


def train(files, vocab_size=VOCAB_SIZE):
    """A tokenizer that gives the same ids here and in transformers, begin token included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((text for path in files for text in texts(path)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, 0)]
    )
    return tokenizer


def main(parser):
    """The command; `parser` comes without flags."""
    parser.add_argument("--data", nargs="+", required=True, help="question files with explanations")
    parser.add_argument(
        "--out", required=True, help="the folder for tokenizer.json and tokenizer_config.json"
    )
    args = parser.parse_args()
    tokenizer = train(args.data)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "tokenizer.json.part").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        os.replace(out / "tokenizer.json.part", out / "tokenizer.json")
        (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    except OSError as e:
        raise InputError(f"--out {out}: cannot be written ({e.strerror})") from None
    print(f"{out}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    from tools.command import run
    from tools.flags import make_parser

    run(partial(main, make_parser(__doc__)))
