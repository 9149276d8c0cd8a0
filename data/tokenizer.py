"""Tokenizers: text to ids and back, as the checkpoint's folder has them.

    python -c "from data.tokenizer import *; print(Tokenizer.from_pretrained('DIR').encode('hi'))"

The ids are those of `transformers` 5 for the same folder, with two exceptions. A prompt never ends
in an end token, whatever the tokenizer's template or `add_eos_token` appends: an end would end the
answer before it begins. And runs of blanks are split as SentencePiece itself does.
"""

import re
from functools import cached_property
from itertools import groupby, takewhile
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import AddedToken

from model import InputError, expect, read_json

# The keys of tokenizer_config.json that name a special token.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Bytes of a SentencePiece model that change its normalizer: no blank is put before a text
# (add_dummy_prefix, field 3), and none is taken away (remove_extra_whitespaces, field 4).
AS_IT_STANDS = bytes([0x1A, 4, 0x18, 0, 0x20, 0])


class Tokenizer:
    """Text to ids and back.

    backend: what knows the pieces, a `Json` or a `SentencePiece`
    eos_ids: the tokens that end a generation; newline_ids: those with a newline in their text
    limit: how many tokens the model has; `encode` refuses a text that needs another. None: any
    """

    def __init__(self, backend, eos_ids: set[int], limit: int | None = None):
        self.backend = backend
        self.vocab_size = backend.vocab_size
        self.eos_ids = eos_ids
        self.limit = limit

    @classmethod
    def from_pretrained(cls, path) -> "Tokenizer":
        """Reads tokenizer.json, else tokenizer.model with what was added to it.

        Raises InputError if the folder has neither, a damaged one, or no end token.
        """
        folder = Path(path)
        settings = read_settings(folder)
        file = folder / "tokenizer.json"
        kind = Json
        if not file.exists():
            file = folder / "tokenizer.model"
            kind = SentencePiece
        expect(file.exists(), f"{folder}: neither tokenizer.json nor tokenizer.model found")
        try:
            backend = kind(file, settings)
        except InputError:
            raise
        except Exception as e:  # both libraries raise bare Exceptions for damaged files
            raise InputError(f"{file}: not a readable tokenizer ({e!s:.200})") from None
        return cls(backend, find_eos(folder, backend.eos_id, backend.vocab_size))

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """The ids of a text; with `bos`, after what the tokenizer puts before every text.

        Raises InputError where the text needs a token that the model does not have.
        """
        ids = self.backend.encode(text)
        if bos:
            ids = self.backend.before + ids
        highest = max(ids, default=0)
        if self.limit is not None and highest >= self.limit:
            name = self.backend.name_of(highest)
            wanted = f"expected a text of the model's {self.limit} tokens"
            raise InputError(f"{wanted}, found {name!r:.40}, the tokenizer's token {highest}")
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens left out: `decode(encode(text)) == text`."""
        return self.backend.decode(ids)

    @cached_property
    def newline_ids(self) -> set[int]:
        return {id for id in range(self.vocab_size) if "\n" in self.decode([id])}


class Json:
    """tokenizer.json, which `tokenizers` reads. Its own template says what begins a text."""

    eos_id = None  # the file does not say

    def __init__(self, file: Path, settings: dict):
        self.fast = tokenizers.Tokenizer.from_file(str(file))
        self.fast.no_padding()
        self.fast.no_truncation()
        known = [token.content for token in self.fast.get_added_tokens_decoder().values()]
        for name in special_names(settings):
            if name not in known:
                self.fast.add_special_tokens([AddedToken(name, special=True, normalized=False)])
        example = self.fast.encode("a")
        marked = zip(example.ids, example.special_tokens_mask)  # 1: of the template, not the text
        self.before = [id for id, _ in takewhile(lambda pair: pair[1], marked)]
        self.vocab_size = 1 + max([*self.fast.get_vocab().values(), *example.ids])

    def encode(self, text: str) -> list[int]:
        return self.fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.fast.decode(ids)

    def name_of(self, id: int) -> str:
        return self.fast.id_to_token(id)


class SentencePiece:
    """tokenizer.model, which `sentencepiece` reads, and the tokens that were added to it."""

    def __init__(self, file: Path, settings: dict):
        self.whole = sentencepiece.SentencePieceProcessor(model_file=str(file))
        raw = self.whole.serialized_model_proto()
        self.part = sentencepiece.SentencePieceProcessor(model_proto=raw + AS_IT_STANDS)
        self.pieces = self.whole.vocab_size()

        self.added = self.find_added(file.parent, settings)  # by id
        self.ids = {token.content: id for id, token in self.added.items()}
        self.vocab_size = max(self.pieces, 1 + max(self.added))
        self.names = sorted(self.ids, key=len, reverse=True)  # the longest is tried first
        self.pattern = re.compile("|".join(self.pattern_of(name) for name in self.names))
        self.every_part = settings.get("legacy") is True  # which parts get a blank, see `encode`

        bos_id = self.ids.get(named(settings, "bos_token"), self.whole.bos_id())
        self.eos_id = self.ids.get(named(settings, "eos_token"), self.whole.eos_id())
        add_bos = settings.get("add_bos_token", True)
        found = f"add_bos_token: expected true or false, found {add_bos!r:.40}"
        expect(add_bos in (True, False, None), f"{file.parent}/tokenizer_config.json: {found}")
        self.before = []
        if add_bos and bos_id >= 0:
            self.before = [bos_id]

    def find_added(self, folder: Path, settings: dict) -> dict[int, AddedToken]:
        """The tokens that a text may write out: SentencePiece's own, those that the folder adds,
        and special ones that it only names, which are pieces or come after all others."""
        added = {}
        for id in (self.whole.unk_id(), self.whole.bos_id(), self.whole.eos_id()):
            if id >= 0:
                added[id] = AddedToken(self.whole.id_to_piece(id), special=True)
        names = special_names(settings)
        added |= read_added(folder, settings, names)
        known = [token.content for token in added.values()]
        for name in names:
            if name not in known:
                id = self.whole.piece_to_id(name)
                if self.whole.id_to_piece(id) != name:
                    id = max(self.pieces, 1 + max(added))
                added[id] = AddedToken(name, special=True)
        return added

    def pattern_of(self, name: str) -> str:
        """What an added token looks like in a text, with the blanks that it takes in."""
        token = self.added[self.ids[name]]
        left = r"\s*" if token.lstrip else ""
        right = r"\s*" if token.rstrip else ""
        return f"{left}({re.escape(name)}){right}"

    def encode(self, text: str) -> list[int]:
        """SentencePiece's ids, but added tokens that are written out are themselves.

        A text that has some is encoded part by part. The blank that SentencePiece puts before a
        text then stands before the first part only, or, in a "legacy" tokenizer, before each.
        """
        matches = list(self.pattern.finditer(text))
        if not matches:
            return self.whole.encode(text)
        ids = []
        start = 0
        for match in matches:
            ids += self.encode_part(text[start : match.start()], start == 0)
            ids.append(self.ids[self.names[match.lastindex - 1]])
            start = match.end()
        return ids + self.encode_part(text[start:], False)

    def encode_part(self, part: str, is_first: bool) -> list[int]:
        if part and (is_first or self.every_part) and not part.startswith(" "):
            part = " " + part
        return self.part.encode(part)

    def decode(self, ids: list[int]) -> str:
        """Ids that a padded vocabulary has beyond the pieces say nothing."""
        text = ""
        for is_added, run in groupby(filter(self.is_text, ids), key=self.added.__contains__):
            if is_added:
                text += "".join(self.added[id].content for id in run)
            elif text:
                text += self.part.decode(list(run))
            else:  # without the blank before a text
                text += self.whole.decode(list(run))
        return text

    def name_of(self, id: int) -> str:
        if id in self.added:
            return self.added[id].content
        return self.whole.id_to_piece(id)

    def is_text(self, id: int) -> bool:
        if id in self.added:
            return not self.added[id].special
        return 0 <= id < self.pieces


def read_settings(folder: Path) -> dict:
    """tokenizer_config.json, and special_tokens_map.json where an old folder needs it."""
    settings = {}
    file = folder / "tokenizer_config.json"
    if file.exists():
        settings = read_json(file)
    file = folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in settings and file.exists():
        settings = settings | read_json(file)
    return settings


def named(settings: dict, key: str) -> str | None:
    """The text of the special token that `key` names."""
    value = settings.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def special_names(settings: dict) -> list[str]:
    """The texts of all special tokens, those with a key of their own first."""
    names = [named(settings, key) for key in NAMED]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key)
        if isinstance(more, list):
            names += [named({key: token}, key) for token in more]
    return [name for name in dict.fromkeys(names) if name]


def read_added(folder: Path, settings: dict, special: list[str]) -> dict[int, AddedToken]:
    """Tokens that were added to a tokenizer.model, by id: as tokenizer_config.json lists them, or
    else added_tokens.json."""
    added = {}
    file = folder / "tokenizer_config.json"
    listed = settings.get("added_tokens_decoder")
    if isinstance(listed, dict):
        rows = list(listed.items())
    else:
        file = folder / "added_tokens.json"
        content = read_json(file) if file.exists() else {}
        rows = [(id, {"content": name}) for name, id in content.items()]
    for id, row in rows:
        name = named({"": row}, "")
        known = bool(name) and str(id).isdecimal() and int(id) < 2**31
        found = f"found {id!r:.20}: {row!r:.60}"
        expect(known, f"{file}: expected added tokens with their ids, {found}")
        added[int(id)] = AddedToken(
            name,
            lstrip=row.get("lstrip") is True,
            rstrip=row.get("rstrip") is True,
            special=row.get("special") is True or name in special,
        )
    return added


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
