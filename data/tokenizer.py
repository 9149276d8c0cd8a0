"""Tokenizers: text to ids and back, as the checkpoint's folder has them.

python -c "from data.tokenizer import *; print(Tokenizer.from_pretrained('DIR').encode('hi'))"
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import sentencepiece
import tokenizers

from model import InputError, expect, read_json


class Tokenizer:
    """Text to ids and back, with the ids `transformers` gives for the same folder.

    `tokenizer.json` is read by `tokenizers`, else `tokenizer.model` by `sentencepiece`.
    eos_ids: the tokens that end a generation; newline_ids: those with a newline in their text.
    """

    def __init__(self, encode: Callable, decode: Callable, vocab_size: int, eos_ids: set[int]):
        self._encode, self._decode = encode, decode
        self.vocab_size, self.eos_ids = vocab_size, eos_ids

    @classmethod
    def from_pretrained(cls, path) -> "Tokenizer":
        """Raises InputError if the folder has no tokenizer, a damaged one, or no end token."""
        folder = Path(path)
        files = [folder / name for name in ("tokenizer.json", "tokenizer.model")]
        file = next(filter(Path.exists, files), None)
        expect(file is not None, f"{folder}: neither tokenizer.json nor tokenizer.model found")
        try:
            if file == files[0]:
                fast = tokenizers.Tokenizer.from_file(str(file))
                fast.no_padding()
                fast.no_truncation()
                ids = [*fast.get_vocab().values(), *fast.encode("a").ids]
                size, eos, decode = 1 + max(ids), None, fast.decode
            else:
                slow = sentencepiece.SentencePieceProcessor(model_file=str(file))
                size, eos, decode = slow.vocab_size(), slow.eos_id(), slow.decode
        except Exception as e:  # both libraries raise bare Exceptions for damaged files
            raise InputError(f"{file}: not a readable tokenizer ({e!s:.200})") from None
        eos_ids = find_eos(folder, eos, size)
        if file == files[0]:
            return cls(
                lambda s, bos: fast.encode(s, add_special_tokens=bos).ids, decode, size, eos_ids
            )
        return cls(lambda s, bos: slow.encode(s, add_bos=bos), decode, size, eos_ids)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        return self._encode(text, bos)

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens left out: `decode(encode(text)) == text`."""
        return self._decode(ids)

    @cached_property
    def newline_ids(self) -> set[int]:
        return {i for i in range(self.vocab_size) if "\n" in self._decode([i])}


def find_eos(folder: Path, eos: int | None, vocab_size: int) -> set[int]:
    """The end tokens: of generation_config.json, else config.json, else the tokenizer's own."""
    for file in (folder / "config.json", folder / "generation_config.json"):
        found = read_json(file).get("eos_token_id") if file.exists() else None
        eos = eos if found is None else found
    ids = eos if isinstance(eos, list) else [eos]
    known = ids and all(type(i) is int and 0 <= i < vocab_size for i in ids)
    wanted = f"expected 'eos_token_id' in its config.json to name ids below {vocab_size}"
    expect(known, f"{folder}: no end token; {wanted}, found {eos!r:.60}")
    return set(ids)
