"""Tokenizers: ids as transformers gives them, texts given back, and what is refused.

python -m pytest -q tests/test_tokenizer.py
"""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from conftest import BASE

from data.tokenizer import Tokenizer
from model import InputError

DEMO = Path(__file__).resolve().parent.parent / "data" / "demo" / "model"


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_pretrained(folder)


@pytest.fixture
def llama2(shared, tmp_path):
    """llama2(settings={}, **files) -> its tokenizer; files: objects by name without .json."""

    def make(settings=None, **files) -> Tokenizer:
        shutil.copy(shared / "tokenizers" / "llama2" / "tokenizer.model", tmp_path)
        if settings is not None:
            files["tokenizer_config"] = settings
        for name, value in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        return Tokenizer.from_pretrained(tmp_path)

    return make


TRICKY = [
    "a",
    "Which of these can fly?\n(A) a robin, a bird (B) trout\nRecall:",
    "a\n\nb\n",
    "tab\there\r\n",
    "two  spaces   and more ",
    "é ü ß Ω",
    "e\u0301 is two characters",
    "emoji 🙂👩‍👩‍👧",
    "日本語 mixed 中a文b",
    "“quotes” — and 'others'",
    "a\u00a0b zero\u200bwidth",
    "1234567.89 %$#@ <>{}[]\\",
    "x" * 60,
]


@pytest.mark.parametrize("text", TRICKY + ["", " ", " leading", "\n", "  \n  "])
def test_decode_gives_back_what_encode_was_given(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text


@pytest.mark.parametrize("text", TRICKY)
def test_llama2s_sentencepiece_gives_texts_back(shared, tmp_path, text):
    shutil.copy(shared / "tokenizers" / "llama2" / "tokenizer.model", tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_begin_token_only_on_request(tokenizer):
    with_it, without = tokenizer.encode("a robin"), tokenizer.encode("a robin", bos=False)
    assert with_it == [0] + without and 0 not in without


@pytest.mark.parametrize("text", TRICKY)
def test_ids_of_tokenizer_json_are_those_of_transformers(folder, tokenizer, text):
    transformers = pytest.importorskip("transformers", reason="a live comparison needs it")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode(text) == theirs(text)["input_ids"]
    assert tokenizer.encode(text, bos=False) == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["tokenizers/llama2", "checkpoints/stories260K"])
def test_ids_of_tokenizer_model_are_those_of_transformers(shared, tmp_path, name):
    transformers = pytest.importorskip("transformers", reason="a live comparison needs it")
    pytest.importorskip("google.protobuf", reason="transformers needs it for tokenizer.model")
    shutil.copy(shared / name / "tokenizer.model", tmp_path)
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path, add_bos_token=True)
    ours = Tokenizer.from_pretrained(tmp_path)
    for text in TRICKY:
        if "  " not in text:  # transformers 5 splits runs of spaces otherwise than SentencePiece
            assert ours.encode(text) == theirs(text)["input_ids"], text


def test_llama2_ids_that_transformers_gives(shared, tmp_path):
    shutil.copy(shared / "tokenizers" / "llama2" / "tokenizer.model", tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_ids == {2} and tokenizer.vocab_size == 32000
    for text, ids in {
        "Hello world": [15043, 3186],
        "Recall:": [3599, 497, 29901],
        "a\n\nb\n": [263, 13, 13, 29890, 13],
        "日本語": [29871, 30325, 30346, 30968],
        "(A) x, y": [313, 29909, 29897, 921, 29892, 343],
    }.items():
        assert tokenizer.encode(text) == [1] + ids
        assert tokenizer.encode(text, bos=False) == ids


def test_tokenizer_json_goes_before_tokenizer_model(tmp_path, tokenizer_json):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json)
    (tmp_path / "tokenizer.model").write_bytes(b"not a SentencePiece model")
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    assert Tokenizer.from_pretrained(tmp_path).vocab_size == 300


@pytest.mark.parametrize(
    "config, generation, expected",
    [(5, None, {5}), (5, 7, {7}), (5, [7, 9], {7, 9}), ([5, 6], None, {5, 6})],
)
def test_generation_config_names_the_end_tokens_first(
    tmp_path, tokenizer_json, config, generation, expected
):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json)
    (tmp_path / "config.json").write_text(json.dumps(BASE | {"eos_token_id": config}))
    if generation is not None:
        options = json.dumps({"eos_token_id": generation})
        (tmp_path / "generation_config.json").write_text(options)
    assert Tokenizer.from_pretrained(tmp_path).eos_ids == expected


@pytest.mark.parametrize("eos", [None, -1, 300, "</s>", [], [1, 300]])
def test_a_tokenizer_without_a_usable_end_token_is_refused(tmp_path, tokenizer_json, eos):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json)
    (tmp_path / "config.json").write_text(json.dumps(BASE | {"eos_token_id": eos}))
    with pytest.raises(InputError, match="eos_token_id"):
        Tokenizer.from_pretrained(tmp_path)


# ---------------------------------------------------------------- what begins and ends a prompt


def with_template(text: str, tmp_path, single: str, **config) -> Tokenizer:
    """The tokenizer of a folder whose tokenizer.json has this template."""
    fast = tokenizers.Tokenizer.from_str(text)
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(BASE | config))
    return Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("eos", [1, 5])  # 5: the template's end is not the config's
def test_a_template_never_ends_a_prompt(tmp_path, tokenizer_json, tokenizer, eos):
    ending = with_template(tokenizer_json, tmp_path, "<s> $A </s>", eos_token_id=eos)
    for text in ("a robin", "", "\n"):
        assert ending.encode(text) == tokenizer.encode(text)
        assert ending.encode(text, bos=False) == tokenizer.encode(text, bos=False)
    assert ending.encode("a</s>")[-1] == 1, "what a text itself ends in stays"


def test_a_template_that_begins_nothing_begins_nothing(tmp_path, tokenizer_json, tokenizer):
    bare = with_template(tokenizer_json, tmp_path, "$A </s>")
    assert bare.encode("a robin") == tokenizer.encode("a robin", bos=False)


def test_add_eos_token_never_ends_a_prompt(llama2):
    ids = [1, 15043, 3186]
    assert llama2({"add_bos_token": True, "add_eos_token": True}).encode("Hello world") == ids


def test_add_bos_token_is_respected(llama2):
    """The ids of transformers 5.24; without a word, a text of a tokenizer.model has its begin."""
    assert llama2({"add_bos_token": False}).encode("Hello world") == [15043, 3186]
    assert llama2({"add_bos_token": None}).encode("Hello world") == [15043, 3186]
    assert llama2({"add_bos_token": True}).encode("Hello world") == [1, 15043, 3186]
    assert llama2({}).encode("Hello world") == [1, 15043, 3186]
    begun = llama2({"add_bos_token": True, "bos_token": "</s>"})
    assert begun.encode("Hello world") == [2, 15043, 3186]
    with pytest.raises(InputError, match="add_bos_token: expected true or false, found .yes."):
        llama2({"add_bos_token": "yes"})


def test_transformers_leaves_the_beginning_to_tokenizer_json(tmp_path, tokenizer_json):
    """It has dropped add_bos_token where a tokenizer.json says what begins a text."""
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    begun = with_template(tokenizer_json, tmp_path, "<s> $A")
    assert begun.encode("a")[0] == 0


# ---------------------------------------------------------------- special and added tokens

WRITTEN_OUT = {  # the ids of transformers 5.24 for Llama 2's tokenizer.model
    "a <s>b</s> c": [263, 29871, 1, 29890, 2, 274],
    "</s>": [2],
    "<s>a": [1, 29874],
    "<s> a": [1, 263],
    "a<unk>b": [263, 0, 29890],
    "a\n</s>\nb": [263, 13, 2, 13, 29890],
    "<0x0A>": [529, 29900, 29916, 29900, 29909, 29958],
}


@pytest.mark.parametrize("text", WRITTEN_OUT)
def test_special_tokens_written_out_are_themselves(llama2, text):
    assert llama2().encode(text, bos=False) == WRITTEN_OUT[text]


def test_a_legacy_tokenizer_puts_a_blank_before_every_part(llama2):
    ids = llama2({"legacy": True}).encode("a <s>b</s> c", bos=False)
    assert ids == [263, 29871, 1, 289, 2, 274]


def test_added_tokens_are_read_beside_tokenizer_model(llama2):
    tokenizer = llama2(added_tokens={"<pad>": 32000, "<|x|>": 32001})
    assert tokenizer.vocab_size == 32002
    assert tokenizer.encode("a <|x|> b") == [1, 263, 29871, 32001, 289]
    assert tokenizer.encode("a<|x|>b") == [1, 263, 32001, 29890]
    assert tokenizer.decode([1, 263, 29871, 32001, 289]) == "a <|x|> b"


def test_added_tokens_of_the_configuration_go_first(llama2):
    row = {"content": "<|z|>", "lstrip": True, "rstrip": True, "special": True}
    tokenizer = llama2({"added_tokens_decoder": {"32000": row}}, added_tokens={"<|x|>": 32000})
    assert tokenizer.encode("a <|z|> b") == [1, 263, 32000, 29890]
    assert tokenizer.decode([1, 263, 32000, 289]) == "a b"


def test_special_tokens_that_are_only_named_come_after_all_others(llama2, tmp_path):
    tokenizer = llama2({"pad_token": "<pad>"}, special_tokens_map={"cls_token": "<|c|>"})
    assert tokenizer.encode("<pad><|c|>") == [1, 32000, 32001]
    shutil.rmtree(tmp_path)
    shutil.copytree(DEMO, tmp_path, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"pad_token": "<pad>", "additional_special_tokens": ["<|x|>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("a<pad>b<|x|>c") == [0, 66, 1600, 67, 1601, 68]


def test_ids_beyond_the_pieces_say_nothing(llama2):
    tokenizer = llama2()
    assert tokenizer.decode([263, 32000, 289, 10**6]) == "a b"
    assert tokenizer.decode([32000]) == "" and tokenizer.decode([]) == ""


@pytest.mark.parametrize(
    "settings",
    [
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"add_bos_token": True, "legacy": True},
        {"add_bos_token": True, "pad_token": "<pad>", "additional_special_tokens": ["<|x|>"]},
    ],
)
@pytest.mark.parametrize("added", [{}, {"<pad>": 32000, "<|x|>": 32001}])
def test_written_out_as_transformers_has_it(llama2, tmp_path, settings, added):
    transformers = pytest.importorskip("transformers", reason="a live comparison needs it")
    pytest.importorskip("google.protobuf", reason="transformers needs it for tokenizer.model")
    ours = llama2(settings, added_tokens=added)
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    for text in [*WRITTEN_OUT, "a <|x|> b", "<pad>", "a<|x|>b", "é <pad>\n日本", " a<s>"]:
        assert ours.encode(text) == theirs(text)["input_ids"], text


def test_tokens_beyond_the_model_are_refused_where_a_prompt_needs_one(tmp_path, tokenizer_json):
    text = json.loads(tokenizer_json)
    text["added_tokens"].append(text["added_tokens"][0] | {"id": 300, "content": "<|far|>"})
    tokenizer = with_template(json.dumps(text), tmp_path, "<s> $A")
    assert tokenizer.encode("a<|far|>")[-1] == 300, "any, as long as no model is known"
    tokenizer.limit = 300
    assert tokenizer.encode("a robin")
    with pytest.raises(InputError, match="model's 300 tokens, found '<.far.>', .* token 300"):
        tokenizer.encode("a<|far|>")


# ---------------------------------------------------------------- damaged files


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[1]"),
        ("special_tokens_map.json", "{"),
    ],
)
def test_damaged_files_are_named(tmp_path, tokenizer_json, name, content):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json)
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"{name}: "):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\n", b"not a SentencePiece model"])
def test_a_damaged_tokenizer_model_is_named(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(InputError, match="tokenizer.model: not a readable tokenizer"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("added", [{"<x>": "two"}, {"<x>": -1}, {"": 32000}, {"<x>": None}])
def test_damaged_added_tokens_are_named(llama2, added):
    with pytest.raises(InputError, match="added_tokens.json: expected added tokens with their ids"):
        llama2(added_tokens=added)
    with pytest.raises(InputError, match="tokenizer_config.json: expected added tokens"):
        llama2({"added_tokens_decoder": {"32000": {"content": 7}}})
