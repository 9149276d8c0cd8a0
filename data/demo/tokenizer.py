"""Trains the demo's tokenizer, a byte-level BPE.

The text is what the model sees: stage prompts and explanations, in the
questions of the given files. Ids 0 and 1 are the begin and the end token;
every text is encoded with the begin token first.

    python data/demo/tokenizer.py --data data/demo/train.jsonl --out tokenizer
"""

import argparse
import json
import os
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BEGIN, END = "<s>", "</s>"
VOCAB_SIZE = 1600


def texts(path):
    """Everything of every question in a file of JSON lines that is ever tokenized."""
    with open(path, encoding="utf-8") as f:
        for line in f:
            row = json.loads(line)
            choices = row["question"]["choices"]
            shown = " ".join(f"({c['label']}) {c['text']}" for c in choices)
            analyses = " ".join(
                f"For option {c['label']}, {t}" for c, t in zip(choices, row["analyze"])
            )
            yield (
                f"{row['question']['stem']}\n{shown}\nRecall: {row['recall']}\nAnalyze: {analyses}"
                f"\nSummarize: So the answer is option {row['answerKey']}."
            )


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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", required=True, help="question files with explanations")
    parser.add_argument(
        "--out", required=True, help="the folder for tokenizer.json and tokenizer_config.json"
    )
    args = parser.parse_args()
    try:
        tokenizer = train(args.data)
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(out / "tokenizer.json.part"))
        os.replace(out / "tokenizer.json.part", out / "tokenizer.json")
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN,
            "eos_token": END,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 512,
        }
        (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    except OSError as e:
        print(f"{e.filename}: {e.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    print(f"{out}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
