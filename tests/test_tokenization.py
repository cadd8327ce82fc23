"""Tokenizers against transformers' classes of the same names: ids, text, every option of a call, files and errors."""

import copy
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import alula
import numpy as np
import pytest
import torch
from alula.tokenization import BatchEncoding, TokenizersBackend
from alula.tokenization.codegen import truncate_before

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

END = "<|endoftext|>"
CORPUS = [
    "def hello(world):\n    print('value', value)\n    return the_value_of_the_function\n\n\ndef main():\n    pass\n",
    "The quick brown fox doesn't jump over 1234567 lazy dogs; we'll see, they've it's I'm.\t\tTabs\r\n",
    "naïve café — 東京 東京 😀😀👩‍👩‍👧‍👦 Привет мир שלום עולם مرحبا \u0301\u202e\x00",
    "        x = 1\n            y = 2\n" + " " * 64 + "\n" * 8 + "aaaaaaaaaaaaaaaa",
]
HOSTILE = [
    "",
    " ",
    "\n",
    "\x00",
    END,
    f"a{END}{END} b {END[:-1]} {END}x",
    " " * 5000 + "x" + " " * 5000,
    "\n \n\t \r\n\r \u00a0\u2003\u3000\u200b\ufeff" * 50,
    "don't DON'T don’t 's 'S ''s we'lll",
    "e\u0301\u0301\u0301" * 200,
    "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪" * 50,
    "\ufffd\uffff\U0010ffff\U000e0001 \ue000",
    "١٢٣ ½ Ⅷ 12e-5 0x1F ² x₁",
    "\u202eabc\u202c שלום‏ مرحبا",
    "x" * 3000 + "¡" * 3000,
    *CORPUS,
]


def train(specials=(END,), size=440):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(specials),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    return backend


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """`json`: a tokenizer.json. `files`: vocab.json and merges.txt. Both of one vocabulary."""
    root = tmp_path_factory.mktemp("tokenizers")
    backend = train()
    for name in ("json", "files"):
        (root / name).mkdir()
    backend.save(str(root / "json" / "tokenizer.json"))
    backend.model.save(str(root / "files"))
    return root


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of vocab.json and merges.txt to change: `folder(**{"name.json": content})`; None deletes."""

    def make(source="files", **files):
        for file in (folders / source).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        for name, content in files.items():
            name = name.replace("__", ".")
            if content is None:
                (tmp_path / name).unlink()
            else:
                text = content if isinstance(content, str) else json.dumps(content)
                (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path

    return make


def both(name, path, **kwargs):
    return getattr(transformers, name).from_pretrained(path, **kwargs), getattr(alula, name).from_pretrained(
        path, **kwargs
    )


def same(theirs, ours):
    """Equal encodings, whatever they hold."""
    assert set(theirs.keys()) == set(ours.keys())
    for key, value in theirs.items():
        mine = ours[key]
        if isinstance(value, torch.Tensor):
            assert mine.dtype == value.dtype
            assert mine.tolist() == value.tolist(), key
        elif isinstance(value, np.ndarray):
            assert mine.dtype == value.dtype
            assert [np.asarray(row).tolist() for row in mine] == [np.asarray(row).tolist() for row in value], key
        else:
            assert type(mine) is type(value)
            assert mine == value, key


def everything(tokenizer, text="hello <a> <b> <c> <|endoftext|> world"):
    """What a user sees of a tokenizer's state."""
    return {
        "ids": tokenizer(text)["input_ids"],
        "pair": tokenizer(text, text)["input_ids"],
        "skipped": tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True),
        "vocab": tokenizer.get_vocab(),
        "added": {i: repr(token) for i, token in tokenizer.added_tokens_decoder.items()},
        "named": tokenizer.special_tokens_map,
        "special": tokenizer.all_special_tokens,
        "special_ids": tokenizer.all_special_ids,
        "extra": (tokenizer.extra_special_tokens, tokenizer.extra_special_tokens_ids),
        "by_name": [getattr(tokenizer, f"{n}_token{s}") for n in ("bos", "eos", "unk", "pad") for s in ("", "_id")],
        "sizes": (len(tokenizer), tokenizer.vocab_size, tokenizer.model_max_length),
        "sides": (tokenizer.padding_side, tokenizer.truncation_side),
        "names": tokenizer.model_input_names,
        "around": (tokenizer.add_bos_token, tokenizer.add_eos_token, tokenizer.num_special_tokens_to_add(True)),
        "class": type(tokenizer).__name__,
    }


def every_plane():
    """Every character of planes 0 and 1, every seventh of the others."""
    points = [*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 7), 0x10FFFF]
    random.Random(0).shuffle(points)
    return ["".join(map(chr, points[i : i + 4096])) for i in range(0, len(points), 4096)]


def random_texts(count, seed=0):
    rng = random.Random(seed)
    pieces = [" ", "  ", "\n", "\t", END, "def ", "print", "'s", "é", "東", "😀", "\u0301", "a", "1", "_", "\x00", "’"]
    planes = ((0x20, 0x7F), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000))
    for _ in range(count):
        text = []
        for _ in range(rng.randint(0, 40)):
            text.append(rng.choice(pieces) if rng.random() < 0.7 else chr(rng.randrange(*rng.choice(planes))))
        yield "".join(text)


# --- ids and text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["json", "files"])
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "CodeGenTokenizer"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_prefix_space": True},
        {"add_bos_token": True},
        {"add_bos_token": True, "add_eos_token": True, "add_prefix_space": True},
        {"split_special_tokens": True},
        {"add_bos_token": False, "errors": "ignore"},
    ],
)
def test_ids_and_text_of_hostile_texts(folders, name, source, options):
    if name == "CodeGenTokenizer":
        options = {key: value for key, value in options.items() if key != "errors"}
    theirs, ours = both(name, folders / source, **options)
    texts = [*HOSTILE, *random_texts(400)]
    same(theirs(texts), ours(texts))
    assert everything(theirs) == everything(ours)
    for text in HOSTILE:
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text, add_special_tokens=False)
        assert theirs.tokenize(text) == ours.tokenize(text)
    for text, ids in zip(texts, ours(texts, add_special_tokens=False)["input_ids"], strict=True):
        for skip in (False, True):
            assert theirs.decode(ids, skip_special_tokens=skip) == ours.decode(ids, skip_special_tokens=skip)
        decoded = ours.decode(ids)
        assert decoded == text or (
            options.get("add_prefix_space") and decoded.replace(" ", "") == text.replace(" ", "")
        )


def test_every_plane(folders):
    theirs, ours = both("GPT2Tokenizer", folders / "files")
    texts = every_plane()
    ids = ours(texts)["input_ids"]
    assert ours.decode(ids) == texts
    assert ids == theirs(texts)["input_ids"]


@pytest.mark.parametrize("text", ["a" * 10**6, " " * 10**6])
def test_a_megabyte_of_one_character(folders, text):
    theirs, ours = both("GPT2Tokenizer", folders / "files")
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == text


def test_broken_surrogates_are_named(folders):
    theirs, ours = both("GPT2Tokenizer", folders / "files")
    for text in ("a\ud800", "\udc00\ud83d", "\ude00"):
        with pytest.raises(TypeError):
            theirs(text)
    with pytest.raises(ValueError, match=r"row 0 .* character 1 is the lone surrogate U\+D800"):
        ours("a\ud800")
    with pytest.raises(ValueError, match=r"row 1 .* character 0 is the lone surrogate U\+DC00"):
        ours(["x", ("y", "\udc00")])
    with pytest.raises(ValueError, match="lone surrogate"):
        ours([["x", "\udc00"]], is_split_into_words=True)


def test_decoding_any_ids(folders):
    for name, source in itertools.product(("GPT2Tokenizer", "CodeGenTokenizer"), ("json", "files")):
        theirs, ours = both(name, folders / source)
        for tokenizer in (theirs, ours):
            tokenizer.add_tokens(["<plain added>", "é"])
            tokenizer.add_special_tokens({"pad_token": "<pad>"})
        rng = random.Random(0)
        rows = [[rng.randrange(len(ours) + 5) for _ in range(rng.randint(0, 30))] for _ in range(300)]
        for row in rows:
            for skip in (False, True):
                text = theirs.decode(row, skip_special_tokens=skip)
                assert ours.decode(row, skip_special_tokens=skip) == text
                assert ours.decode(torch.tensor(row), skip_special_tokens=skip) == text
                decoder = ours.decoder(skip_special_tokens=skip)
                assert "".join(map(decoder.push, row)) + decoder.flush() == text
            tokens = theirs.convert_ids_to_tokens(row)
            assert ours.convert_ids_to_tokens(row) == tokens
            known = [token for token in tokens if token is not None]
            assert ours.convert_tokens_to_ids(known) == theirs.convert_tokens_to_ids(known)
            assert ours.convert_tokens_to_string(known) == theirs.convert_tokens_to_string(known)
            assert ours.convert_ids_to_tokens(row, True) == theirs.convert_ids_to_tokens(row, True)
        batch = [row[:3] for row in rows if len(row) >= 3]
        for form in (batch, torch.tensor(batch), np.array(batch), [torch.tensor(row) for row in batch]):
            assert ours.decode(form) == theirs.batch_decode(batch)
            assert ours.batch_decode(form, skip_special_tokens=True) == theirs.batch_decode(batch, True)
        for form in (5, np.int64(5), torch.tensor(5), [5], [], [[]], [[5], []]):
            assert ours.decode(form) == theirs.decode(form)
            assert ours.batch_decode(form) == theirs.batch_decode(form)
        assert ours.convert_tokens_to_ids("no such token") == theirs.convert_tokens_to_ids("no such token") == 0
        for bad in (-1, [1, -2], 2**40, ["a"], [1.5]):
            with pytest.raises(ValueError, match="an id must be"):
                ours.decode(bad)


def test_clean_up_is_for_others_than_bpe(folders):
    force = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    text = "hello , world . does n't it 's ? ' x ' we 've !"
    for options in ({}, {"clean_up_tokenization_spaces": True}, {"clean_up_tokenization_spaces": True, force: True}):
        theirs, ours = both("GPT2Tokenizer", folders / "files", **options)
        ids = ours.encode(text)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert ours.decode(ids) == theirs.decode(ids)
        assert len(caught) == (options == {"clean_up_tokenization_spaces": True})
        assert ours.decode(ids, clean_up_tokenization_spaces=False) == text


# --- a call -----------------------------------------------------------------------------------------------------------


def call(tokenizer, text, options):
    """What transformers returns; None where it raises, or the library under it panics."""
    try:
        return tokenizer(text, **options)
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            return None
        raise


def test_every_option_of_a_call(folders):
    rng = random.Random(0)
    texts = ["hello world", "", "def f(x):\n    return x", " a  b 東京", f"x{END}y"]
    forms = [
        (texts[0], None, False),
        (texts[1], None, False),
        (texts, None, False),
        (texts[0], texts[2], False),
        (texts[0], "", False),
        (texts, texts[::-1], False),
        ([(a, b) for a, b in zip(texts, texts[::-1], strict=True)], None, False),
        ([texts[2]], None, False),
        (texts[2].split(), None, True),
        ([], None, True),
        ([text.split() for text in texts], None, True),
        (texts[2].split(), texts[3].split(), True),
        ([text.split() for text in texts], [text.split() for text in texts[::-1]], True),
    ]
    pairs = []
    for name in ("GPT2Tokenizer", "CodeGenTokenizer"):
        for options in ({}, {"add_bos_token": True, "add_eos_token": True}, {"padding_side": "left"}):
            options = {**options, "truncation_side": rng.choice(("left", "right")), "pad_token": "<pad>"}
            pairs.append(both(name, folders / "files", **options))
    num_errors = 0
    for _ in range(1500):
        theirs, ours = rng.choice(pairs)
        text, pair, is_words = rng.choice(forms)
        options = {
            "text_pair": pair,
            "is_split_into_words": is_words,
            "padding": rng.choice((False, True, "longest", "max_length", "do_not_pad")),
            "truncation": rng.choice((None, False, True, "longest_first", "only_first", "only_second")),
            "max_length": rng.choice((None, 4, 8, 16, 64)),
            "stride": rng.choice((0, 0, 1, 3)),
            "pad_to_multiple_of": rng.choice((None, None, 4, 8)),
            "padding_side": rng.choice((None, "left", "right")),
            "return_tensors": rng.choice((None, None, "pt", "np")),
            "return_token_type_ids": rng.choice((None, True, False)),
            "return_attention_mask": rng.choice((None, True, False)),
            "add_special_tokens": rng.random() < 0.7,
            "split_special_tokens": rng.random() < 0.2,
            **{
                f"return_{what}": rng.random() < 0.3
                for what in ("overflowing_tokens", "special_tokens_mask", "offsets_mapping", "length")
            },
        }
        if options["stride"] >= (options["max_length"] or 64) - 4:
            options["stride"] = 0  # the library panics
        needs_length = options["padding"] == "max_length" or options["truncation"] not in (None, False)
        if needs_length and options["max_length"] is None:
            with pytest.raises(ValueError, match="needs max_length"):
                ours(text, **options)
            options["max_length"] = 8
        if is_words:  # batches of words and of pairs of words look alike
            options["return_overflowing_tokens"] = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = call(theirs, text, options)
            if expected is None and options["stride"] and not options["return_overflowing_tokens"]:
                # The library panics on a stride that changes nothing: ours leaves it out.
                expected = call(theirs, text, {**options, "stride": 0})
            if expected is None:
                num_errors += 1
                with pytest.raises(ValueError):
                    ours(text, **options)
                continue
            same(expected, ours(text, **options))
            assert ours.backend_tokenizer.padding is None
            assert ours.backend_tokenizer.truncation is None
    assert num_errors < 500


def test_model_max_length(folders):
    theirs, ours = both("GPT2Tokenizer", folders / "files", model_max_length=5, pad_token=END)
    for options in ({"truncation": True}, {"padding": "max_length"}, {"padding": "max_length", "truncation": True}):
        same(theirs(["hello world, hello", "a"], **options), ours(["hello world, hello", "a"], **options))
    with pytest.warns(UserWarning, match="more than the 5 that the model takes"):
        ours("a text that is longer than five tokens")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        ours("a text that is longer than five tokens")


def test_labels_and_batches_of_nothing(folders):
    theirs, ours = both("GPT2Tokenizer", folders / "files")
    same(theirs("a b", text_target="c d"), ours("a b", text_target="c d"))
    same(theirs(text_target=["c d"]), ours(text_target=["c d"]))
    assert ours([]) == {"input_ids": [], "attention_mask": []}  # an IndexError in transformers
    assert ours([], return_tensors="pt")["input_ids"].shape == (0,)


def test_encodings_know_words_and_characters(folders):
    theirs, ours = both("CodeGenTokenizer", folders / "files", add_bos_token=True)
    texts, pairs = ["hello  wörld x", "the 東京"], ["print(1)", "a b"]
    a, b = theirs(texts, pairs), ours(texts, pairs)
    for row in range(2):
        for method in ("tokens", "word_ids", "sequence_ids"):
            assert getattr(a, method)(row) == getattr(b, method)(row)
        for i in range(len(a["input_ids"][row])):
            for method in ("token_to_word", "token_to_chars", "token_to_sequence"):
                assert getattr(a, method)(row, i) == getattr(b, method)(row, i)
        for i in range(3):
            assert a.word_to_tokens(row, i) == b.word_to_tokens(row, i)
            assert a.char_to_token(row, i) == b.char_to_token(row, i)
            assert a.char_to_word(row, i) == b.char_to_word(row, i)
    assert a.word_to_chars(0, 1) == b.word_to_chars(0, 1)
    assert a.char_to_token(3) == b.char_to_token(3)
    assert b[0].ids == b["input_ids"][0] == b.input_ids[0]
    assert BatchEncoding({"input_ids": [[1], [2]]})[:1] == {"input_ids": [[1]]}
    assert b.n_sequences == 2
    assert b.is_fast
    assert dict(**b).keys() == a.keys()
    assert pickle.loads(pickle.dumps(b)) == b
    assert ours("x", return_tensors="pt").to("cpu")["input_ids"].dtype == torch.int64
    with pytest.raises(AttributeError, match="it holds input_ids"):
        _ = b.nothing
    with pytest.raises(ValueError, match="without a tokenizer's encodings"):
        BatchEncoding({"input_ids": [1]}).tokens()


def test_pad(folders):
    theirs, ours = both("GPT2Tokenizer", folders / "files", pad_token="<pad>")
    rows = [[5, 6, 7], [8], [], [1, 2, 3, 4, 5]]
    masks = [[1] * len(row) for row in rows]
    types = [[0] * len(row) for row in rows]
    rng = random.Random(0)
    for _ in range(200):
        batch = {"input_ids": rows}
        if rng.random() < 0.5:
            batch["attention_mask"] = masks
        if rng.random() < 0.5:
            batch["token_type_ids"] = types
            batch["special_tokens_mask"] = types
        options = {
            "padding": rng.choice((True, "longest", "max_length", False)),
            "max_length": rng.choice((4, 7, 16)),
            "pad_to_multiple_of": rng.choice((None, 4)),
            "padding_side": rng.choice((None, "left", "right")),
            "return_attention_mask": rng.choice((None, True)),
            "verbose": False,
        }
        if rng.random() < 0.5:
            options["return_tensors"] = rng.choice(("pt", "np"))
            options |= {"padding": True}
        form = rng.choice(("dict", "list", "one"))
        if form == "list":
            batch = [{key: value[i] for key, value in batch.items()} for i in range(len(rows))]
        elif form == "one":
            batch = {key: value[0] for key, value in batch.items()}
        same(theirs.pad(copy.deepcopy(batch), **options), ours.pad(batch, **options))
    tensors = [{"input_ids": torch.tensor([1, 2])}, {"input_ids": torch.tensor([3])}]
    same(theirs.pad(tensors), ours.pad(tensors))
    for bad, message in (({"ids": [1]}, "needs `input_ids`"), ([{"input_ids": [1]}, {}], "the same names")):
        with pytest.raises(ValueError, match=message):
            ours.pad(bad)


# --- special tokens ---------------------------------------------------------------------------------------------------


def test_special_and_added_tokens(folders):
    theirs, ours = both("GPT2Tokenizer", folders / "files")

    def on_both(do):
        results = [do(tokenizer) for tokenizer in (theirs, ours)]
        assert results[0] == results[1]
        assert everything(theirs) == everything(ours)
        texts = ["x<a><b> <c>  <d> y <pad>z", "a<c>a <word> sword"]
        assert theirs(texts)["input_ids"] == ours(texts)["input_ids"]
        for ids in ours(texts)["input_ids"]:
            assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids, skip_special_tokens=True)

    added = tokenizers.AddedToken
    on_both(lambda t: t.add_tokens("<a>"))
    on_both(lambda t: t.add_tokens(["<a>", "<b>", "hello"]))
    on_both(lambda t: t.add_tokens([]))
    on_both(lambda t: t.add_tokens([added("<c>", lstrip=True, rstrip=True), added("word", single_word=True)]))
    on_both(lambda t: t.add_tokens(["<d>"], special_tokens=True))
    on_both(lambda t: t.add_special_tokens({"pad_token": "<pad>", "cls_token": added("<c>")}))
    on_both(lambda t: t.add_special_tokens({"extra_special_tokens": ["<e>", added("<f>", lstrip=True)]}))
    on_both(lambda t: t.add_special_tokens({"additional_special_tokens": ["<g>"]}, replace_extra_special_tokens=False))
    on_both(lambda t: t.add_special_tokens({"extra_special_tokens": ["<h>"]}))
    on_both(lambda t: setattr(t, "pad_token", t.eos_token))
    on_both(lambda t: setattr(t, "eos_token_id", 5))
    on_both(lambda t: setattr(t, "mask_token", "not in the vocabulary"))
    on_both(lambda t: setattr(t, "add_bos_token", True))
    on_both(lambda t: setattr(t, "add_eos_token", True))
    on_both(lambda t: setattr(t, "bos_token", None))
    on_both(lambda t: t.update_post_processor())
    on_both(lambda t: setattr(t, "padding_side", "left"))
    ids = ours.encode("x <h> y")
    assert ours.get_special_tokens_mask(ids, already_has_special_tokens=True) == theirs.get_special_tokens_mask(
        ids, already_has_special_tokens=True
    )
    for tokenizer in (copy.deepcopy(ours), copy.copy(ours), pickle.loads(pickle.dumps(ours))):
        assert everything(tokenizer) == everything(ours)


def test_what_tokens_may_not_be(folders):
    ours = alula.GPT2Tokenizer.from_pretrained(folders / "files")
    before = everything(ours)
    for do, message in (
        (lambda: ours.add_tokens([3]), "must be a string or an AddedToken"),
        (lambda: ours.add_special_tokens({"pad": "<p>"}), "accepted: bos_token"),
        (lambda: ours.add_special_tokens({"cls_token": "<p>", "pad_token": 3}), "pad_token must be a string"),
        (lambda: ours.add_special_tokens({"extra_special_tokens": "<p>"}), "must be a list"),
        (lambda: setattr(ours, "pad_token", 3), "must be a string"),
        (lambda: setattr(ours, "pad_token_id", 10**6), "is no token; ids go from 0"),
        (lambda: setattr(ours, "padding_side", "up"), "accepted: right, left"),
        (lambda: setattr(ours, "truncation_side", None), "accepted: right, left"),
        (lambda: ours.get_special_tokens_mask([1]), "already_has_special_tokens=True"),
    ):
        with pytest.raises(ValueError, match=message):
            do()
        assert everything(ours) == before
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ours.nothing
    with pytest.raises(TypeError, match="eos_token must be a string"):
        alula.GPT2Tokenizer.from_pretrained(folders / "files", eos_token=3)


# --- CodeGen ----------------------------------------------------------------------------------------------------------


def test_codegen_token_type_ids(folders):
    # In transformers this changes the class, for every tokenizer made later, so theirs comes last and is undone.
    ours = alula.CodeGenTokenizer.from_pretrained(folders / "files", return_token_type_ids=True)
    assert "token_type_ids" not in alula.CodeGenTokenizer.from_pretrained(folders / "files")("a")
    names = list(transformers.CodeGenTokenizer.model_input_names)
    try:
        theirs = transformers.CodeGenTokenizer.from_pretrained(folders / "files", return_token_type_ids=True)
        same(theirs(["a b", "c"], ["d", "e f"]), ours(["a b", "c"], ["d", "e f"]))
        same(theirs("a", return_token_type_ids=False), ours("a", return_token_type_ids=False))
    finally:
        transformers.CodeGenTokenizer.model_input_names = names


def test_codegen_truncates_completions(folders):
    theirs, ours = both("CodeGenTokenizer", folders / "files")
    rng = random.Random(0)
    lines = [
        "def f(x):",
        "print(x)",
        "    return x",
        "# note",
        "",
        "",
        "'''",
        "class A:",
        "  print(1)",
        END,
        "x = 1 # y",
    ]
    patterns = ["^#", r"<\|endoftext\|>", "^'''", "\n\n\n", "$", "x*", "^class", "(?i)DEF"]
    rows = []
    for _ in range(300):
        text = "\n".join(rng.choice(lines) for _ in range(rng.randint(0, 12)))
        chosen = rng.sample(patterns, rng.randint(0, 4))
        assert ours.truncate(text, chosen) == theirs.truncate(text, chosen)
        rows.append(ours.encode(text))
        skip = rng.random() < 0.5
        expected = theirs.decode(rows[-1], skip_special_tokens=skip, truncate_before_pattern=chosen)
        assert ours.decode(rows[-1], skip_special_tokens=skip, truncate_before_pattern=chosen) == expected
    cut = ours.batch_decode(rows, truncate_before_pattern=["^#"])  # a TypeError in transformers
    assert cut == [theirs.decode(row, truncate_before_pattern=["^#"]) for row in rows]
    assert truncate_before("print(1)\nprint(2)", ["^#"]) == "print(1)\n"
    for bad, message in ((["("], "no regular expression"), ([3], "no regular expression"), ("^#", "must be a list")):
        with pytest.raises(ValueError, match=message):
            ours.decode(rows[0], truncate_before_pattern=bad)


# --- files ------------------------------------------------------------------------------------------------------------

CONFIGS = {
    "sides": {"tokenizer_config__json": {"padding_side": "left", "truncation_side": "left", "model_max_length": 7}},
    "added in config": {
        "tokenizer_config__json": {
            "added_tokens_decoder": {
                "440": {"content": "<a>", "lstrip": True, "normalized": False, "special": True},
                "441": {"content": "<b>", "special": False},
            },
            "pad_token": "<a>",
            "add_prefix_space": True,
            "add_bos_token": True,
        }
    },
    "special tokens map": {
        "special_tokens_map__json": {
            "pad_token": {"content": "<a>", "lstrip": False, "normalized": False, "rstrip": True, "single_word": False},
            "eos_token": "<b>",
            "additional_special_tokens": ["<c>"],
        }
    },
    "added_tokens.json": {
        "added_tokens__json": {"<b>": 441, "<a>": 440},
        "special_tokens_map__json": {"pad_token": "<a>"},
    },
    "tokens as objects": {
        "tokenizer_config__json": {
            "bos_token": {"__type": "AddedToken", "content": "<a>", "lstrip": True, "rstrip": False},
            "add_bos_token": True,
            "extra_special_tokens": ["<b>"],
            "unknown_key": [1, {"x": None}],
        }
    },
    "named extra tokens": {
        "tokenizer_config__json": {"extra_special_tokens": {"image_token": "<a>"}, "sound_token": "<b>"}
    },
    "names": {"tokenizer_config__json": {"model_input_names": ["input_ids"], "name_or_path": "x", "vocab_file": "/x"}},
}


@pytest.mark.parametrize("source", ["files", "json"])
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "CodeGenTokenizer"])
@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.filterwarnings("ignore:a text has")
def test_configuration_files(folder, name, source, case, tmp_path_factory):
    path = folder(source, **CONFIGS[case])
    for overrides in ({}, {"pad_token": "<c>", "padding_side": "right"}):
        theirs, ours = both(name, path, **overrides)
        assert everything(theirs) == everything(ours)
        for token in ("image_token", "image_token_id", "sound_token"):
            assert getattr(theirs, token, None) == getattr(ours, token, None)
        # Either library reads what the other writes.
        mine, reference = (tmp_path_factory.mktemp("saved") for _ in range(2))
        files = ours.save_pretrained(mine)
        theirs.save_pretrained(reference)
        assert [Path(file).name for file in files] == ["tokenizer_config.json", "tokenizer.json"]
        configs = [json.loads((saved / "tokenizer_config.json").read_text()) for saved in (reference, mine)]
        for config in configs:
            config.pop("is_local", None)
            config.pop("local_files_only", None)
        assert configs[0] == configs[1]
        tokenizer_files = [json.loads((saved / "tokenizer.json").read_text()) for saved in (reference, mine)]
        assert tokenizer_files[0] == tokenizer_files[1]
        for saved in (mine, reference):
            again, ours_again = both(name, saved)
            assert everything(again) == everything(ours_again)
            assert everything(ours_again)["ids"] == everything(ours)["ids"]


@pytest.mark.parametrize("name", ["CodeGenTokenizer", "AutoTokenizer"])
def test_runs_of_white_space_as_added_tokens(folder, name):
    """What CodeGen's checkpoints have: vocab.json, merges.txt, and tokens for runs of spaces and tabs beside them."""
    runs = [*(" " * n for n in range(31, 1, -1)), *("\t" * n for n in range(9, 1, -1))]
    path = folder(
        added_tokens__json={run: 440 + i for i, run in enumerate(runs)},
        special_tokens_map__json={"bos_token": END, "eos_token": END, "unk_token": END},
        tokenizer_config__json={"tokenizer_class": "CodeGenTokenizer", "add_prefix_space": False, "vocab_size": 440},
        config__json={"model_type": "codegen", "tokenizer_class": "GPT2Tokenizer"},
    )
    theirs, ours = both(name, path)
    texts = [*HOSTILE, *random_texts(100), "\t" * 3000 + " " * 3000]
    ids = ours(texts)["input_ids"]
    assert ids == theirs(texts)["input_ids"]
    assert ours.decode(ids) == texts
    for text, row in zip(texts, ids, strict=True):
        decoder = ours.decoder(skip_special_tokens=False)
        assert "".join(map(decoder.push, row)) + decoder.flush() == text
    assert everything(ours) == everything(theirs)


def test_special_tokens_as_plain_objects(folder):
    # A TypeError in transformers, but found in the wild.
    path = folder(tokenizer_config__json={"pad_token": {"content": "<p>", "lstrip": True, "special": True}})
    ours = alula.GPT2Tokenizer.from_pretrained(path)
    assert ours.pad_token == "<p>"
    assert ours.tokenize("a  <p>b") == ["a", "  <p>", "b"]


def test_tokenizer_json_is_taken_whole_by_the_backend(folders, tmp_path):
    backend = train()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {END}", pair=None, special_tokens=[(END, 0)]
    )
    backend.enable_truncation(6, direction="left")
    backend.enable_padding(direction="left", pad_token=END, length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "gpt_bigcode"}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}'
    )
    for options in ({}, {"add_bos_token": True, "bos_token": END}, {"pad_token": "<pad>"}):
        theirs, ours = both("AutoTokenizer", tmp_path, **options)
        assert type(ours) is TokenizersBackend
        assert everything(theirs) == everything(ours)
        texts = ["a 12345 b", "hello world, a text of many tokens"]
        for call in ({}, {"truncation": True, "max_length": 4, "padding": True}):
            same(theirs(texts, **call), ours(texts, **call))
    direct = TokenizersBackend(tokenizer_object=backend, eos_token=END)
    assert (
        direct("a 123")["input_ids"] == TokenizersBackend(tokenizer_file=tmp_path / "tokenizer.json")("a 123").input_ids
    )
    assert backend.truncation is not None  # the caller's object is left alone


def test_vocabulary_in_memory(folders):
    vocab = json.loads((folders / "files" / "vocab.json").read_text())
    lines = (folders / "files" / "merges.txt").read_text().split("\n")[1:-1]
    for merges in (lines, [tuple(line.split(" ")) for line in lines]):
        for name in ("GPT2Tokenizer", "CodeGenTokenizer"):
            theirs = getattr(transformers, name)(vocab=vocab, merges=[tuple(line.split(" ")) for line in lines])
            ours = getattr(alula, name)(vocab, merges)
            assert everything(theirs) == everything(ours)
    files = [str(folders / "files" / name) for name in ("vocab.json", "merges.txt")]
    assert everything(alula.GPT2Tokenizer(*files)) == everything(ours) | {"class": "GPT2Tokenizer"}
    assert everything(alula.CodeGenTokenizer(vocab_file=files[0], merges_file=files[1])) == everything(ours)
    assert len(alula.GPT2Tokenizer()) == len(transformers.GPT2Tokenizer()) == 1


def test_save_vocabulary(folders, tmp_path):
    for source in ("json", "files"):
        ours = alula.GPT2Tokenizer.from_pretrained(folders / source, extra_special_tokens=["<x>"])
        files = ours.save_vocabulary(tmp_path)
        assert [Path(file).name for file in files] == ["vocab.json", "merges.txt"]
        for file in files:
            assert Path(file).read_bytes() == (folders / "files" / Path(file).name).read_bytes()
        named = ours.save_vocabulary(str(tmp_path), "small")
        assert [Path(file).name for file in named] == ["small-vocab.json", "small-merges.txt"]
    with pytest.raises(ValueError, match="is not a folder"):
        ours.save_vocabulary(tmp_path / "none")


def test_chat_template_is_kept(folder, tmp_path_factory):
    path = folder(chat_template__jinja="{{ messages }}")
    ours = alula.AutoTokenizer.from_pretrained(path, tokenizer_type="gpt2")
    assert ours.chat_template == "{{ messages }}"
    saved = tmp_path_factory.mktemp("saved")
    assert len(ours.save_pretrained(saved, filename_prefix="my")) == 3
    assert (saved / "my-chat_template.jinja").read_text() == "{{ messages }}"


# --- AutoTokenizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, own, model, expected",
    [
        ("files", {"tokenizer_class": "GPT2Tokenizer"}, {"model_type": "gpt2"}, "GPT2Tokenizer"),
        ("json", {"tokenizer_class": "GPT2TokenizerFast"}, {"model_type": "gpt2"}, "GPT2Tokenizer"),
        ("json", {"tokenizer_class": "CodeGenTokenizer"}, {"model_type": "codegen"}, "CodeGenTokenizer"),
        ("files", {"tokenizer_class": "CodeGenTokenizerFast"}, {"model_type": "gpt2"}, "CodeGenTokenizer"),
        ("json", {"tokenizer_class": "GPT2Tokenizer"}, {"model_type": "codegen"}, "GPT2Tokenizer"),
        ("files", {}, {"model_type": "gpt2"}, "GPT2Tokenizer"),
        ("files", {}, {"model_type": "gpt2", "tokenizer_class": "CodeGenTokenizer"}, "CodeGenTokenizer"),
        ("json", {"tokenizer_class": "PreTrainedTokenizerFast"}, {"model_type": "gpt2"}, "TokenizersBackend"),
        ("json", {"tokenizer_class": "TokenizersBackend"}, {"model_type": "gpt_bigcode"}, "TokenizersBackend"),
        ("json", {}, {"model_type": "gpt_bigcode"}, "TokenizersBackend"),
        ("json", {}, None, "TokenizersBackend"),
    ],
)
def test_auto_picks_as_transformers_does(folder, source, own, model, expected):
    files = {"tokenizer_config__json": own}
    if model is not None:
        files["config__json"] = model
    theirs, ours = both("AutoTokenizer", folder(source, **files), use_fast=True)
    assert type(ours).__name__ == type(theirs).__name__ == expected
    assert everything(ours) == everything(theirs)


def test_auto_where_transformers_differs(folder):
    path = folder(config__json={"model_type": "codegen"})  # transformers takes GPT2Tokenizer: equal ids, no truncation
    ours = alula.AutoTokenizer.from_pretrained(path)
    assert type(ours) is alula.CodeGenTokenizer
    assert ours("a b") == transformers.AutoTokenizer.from_pretrained(path)("a b")
    path = folder(config__json={"model_type": "gpt_bigcode"})  # transformers wants a tokenizer.json
    assert type(alula.AutoTokenizer.from_pretrained(path)) is alula.GPT2Tokenizer
    (path / "sub").mkdir()
    for file in ("vocab.json", "merges.txt", "config.json"):
        (path / file).rename(path / "sub" / file)
    assert type(alula.AutoTokenizer.from_pretrained(path, subfolder="sub", cache_dir="x")) is alula.GPT2Tokenizer


def test_auto_refuses(folder, tmp_path):
    auto = alula.AutoTokenizer
    with pytest.raises(TypeError, match="from_pretrained"):
        auto()
    with pytest.raises(FileNotFoundError, match="downloads nothing"):
        auto.from_pretrained("openai-community/gpt2")
    path = folder(config__json={"model_type": "llama"})
    with pytest.raises(ValueError, match="model_type 'llama'; accepted: big_bird, codegen, gpt2, gpt_bigcode"):
        auto.from_pretrained(path)
    with pytest.raises(ValueError, match="tokenizer_type='llama' is unknown; accepted"):
        auto.from_pretrained(path, tokenizer_type="llama")
    path = folder(tokenizer_config__json={"tokenizer_class": "BertTokenizer"})
    with pytest.raises(ValueError, match="tokenizer_class 'BertTokenizer' is unknown; accepted: BigBirdTokenizer"):
        auto.from_pretrained(path)
    for name in ("tokenizer_config.json", "config.json"):
        (path / name).unlink()
    with pytest.raises(FileNotFoundError, match="names a tokenizer_class or a model_type"):
        auto.from_pretrained(path)
    with pytest.raises(ValueError, match="is a file; give the folder"):
        auto.from_pretrained(path / "vocab.json")


def test_the_model_inside_alula():
    from importlib.resources import files

    path = Path(str(files("alula"))) / "assets" / "tiny-python"
    if not path.is_dir():
        pytest.skip("this tree holds no model")
    theirs, ours = both("AutoTokenizer", path)
    assert everything(theirs) == everything(ours)
    texts = [text for text in [*HOSTILE, *random_texts(200)] if len(text) < 400]
    same(theirs(texts), ours(texts))


# --- bad input --------------------------------------------------------------------------------------------------------


def lines_of(folders):
    return (folders / "files" / "merges.txt").read_text(encoding="utf-8").split("\n")


def test_bad_vocabulary_files(folder, folders):
    vocab = (folders / "files" / "vocab.json").read_text(encoding="utf-8")
    merges = lines_of(folders)
    tokens = json.loads(vocab)
    twice = {**tokens, "new": 5}
    without = {token: i for token, i in tokens.items() if i != 430}
    last = max(tokens, key=tokens.get)
    renamed = {token if token != last else "other": i for token, i in tokens.items()}
    cases = [
        ({"vocab__json": None}, FileNotFoundError, "no vocab.json; GPT2Tokenizer needs tokenizer.json, or vocab.json"),
        ({"merges__txt": None}, FileNotFoundError, "no merges.txt"),
        ({"vocab__json": vocab[: len(vocab) // 2]}, ValueError, "vocab.json is not valid JSON"),
        ({"vocab__json": "[1, 2]"}, ValueError, "vocab.json holds a JSON list"),
        ({"vocab__json": {"a": "b"}}, ValueError, "must map tokens to ids"),
        ({"vocab__json": {"a": -1}}, ValueError, "gives the token 'a' id -1; accepted: 0 to 4294967295"),
        ({"vocab__json": {"a": 2**32}}, ValueError, "gives the token 'a' id 4294967296; accepted"),
        ({"vocab__json": {"\ud800": 1}}, ValueError, "has the token .* a surrogate stands alone in it"),
        ({"vocab__json": twice}, ValueError, "gives id 5 to two tokens, .* and 'new'"),
        ({"vocab__json": without}, ValueError, r"merge \d+ of .*merges.txt is .* but .*vocab.json has no token"),
        ({"vocab__json": renamed}, ValueError, "but .*vocab.json has no token"),
        ({"merges__txt": "\n".join(merges[:100])[:-3]}, ValueError, "merges.txt, line 100|no token|no merge"),
        ({"merges__txt": "\n".join(merges[:100])}, ValueError, "no merge of .*merges.txt .* cut short"),
        ({"merges__txt": ""}, ValueError, "cut short"),
        ({"merges__txt": "\n".join([*merges[:9], "a b c", *merges[9:]])}, ValueError, "line 10: expected two tokens"),
        ({"merges__txt": "\n".join([*merges[:9], "abc", *merges[9:]])}, ValueError, "line 10: expected two tokens"),
        ({"tokenizer__json": "{"}, ValueError, "tokenizer.json is not valid JSON"),
        ({"tokenizer__json": {"model": {"type": "Unigram"}}}, ValueError, "needs a BPE; .* holds a Unigram model"),
        ({"tokenizer__json": {"model": {"type": "BPE"}}}, ValueError, "no model with vocab and merges"),
        ({"tokenizer__json": {}}, ValueError, "no model with vocab and merges"),
        ({"tokenizer_config__json": "{"}, ValueError, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer_config__json": {"padding_side": "up"}}, ValueError, "padding_side='up' is unknown"),
        ({"tokenizer_config__json": {"model_max_length": "x"}}, ValueError, "model_max_length must be"),
        ({"tokenizer_config__json": {"add_prefix_space": 3}}, ValueError, "add_prefix_space must be"),
        ({"tokenizer_config__json": {"added_tokens_decoder": [1]}}, ValueError, "must map ids to objects"),
        ({"tokenizer_config__json": {"added_tokens_decoder": {"x": {"content": "a"}}}}, ValueError, "must map ids"),
        ({"added_tokens__json": {"<a>": 900}}, ValueError, "'<a>' id 900, but .* it is 440"),
        ({"added_tokens__json": {"<a>": "x"}}, ValueError, "must map tokens to ids"),
        ({"added_tokens__json": {"<a>": 440, "<b>": 440}}, ValueError, "id 440 to two tokens"),
        ({"special_tokens_map__json": "[]"}, ValueError, "holds a JSON list"),
        ({"special_tokens_map__json": {"eos_token": {"lstrip": True}}}, ValueError, "objects with a content"),
    ]
    for files, kind, message in cases:
        path = folder(**files)
        with pytest.raises(kind, match=message):
            alula.GPT2Tokenizer.from_pretrained(path)
        for name in files:
            (path / name.replace("__", ".")).unlink(missing_ok=True)
    (path / "merges.txt").write_bytes(b"\xff\xfe")
    folder_files = folders / "files"
    (path / "vocab.json").write_bytes((folder_files / "vocab.json").read_bytes())
    with pytest.raises(ValueError, match=r"merges\.txt is not UTF-8"):
        alula.GPT2Tokenizer.from_pretrained(path)


def test_a_few_tokens_without_merges_are_said(folder, folders):
    tokens = json.loads((folders / "files" / "vocab.json").read_text(encoding="utf-8"))
    path = folder(vocab__json={**tokens, "madeupword0000": 440})
    with pytest.warns(UserWarning, match="'madeupword0000'.*no text becomes them"):
        ours = alula.GPT2Tokenizer.from_pretrained(path)
    assert ours.encode("madeupword0000") == transformers.GPT2Tokenizer.from_pretrained(path).encode("madeupword0000")
    path = folder(vocab__json={**tokens, "<pad>": 440}, merges__txt="\r\n".join(lines_of(folders)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # special tokens need no merge, and lines may end as on Windows
        assert alula.GPT2Tokenizer.from_pretrained(path, pad_token="<pad>").pad_token_id == 440


def test_bad_tokenizer_json_for_the_backend(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        TokenizersBackend.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(ValueError, match="is not valid JSON"):
        TokenizersBackend.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "No"}, "added_tokens": []}')
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json that `tokenizers` can read"):
        TokenizersBackend.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        TokenizersBackend()
    with pytest.raises(ValueError, match="errors='no such' is unknown"):
        alula.GPT2Tokenizer(errors="no such")


@pytest.mark.parametrize(
    "text, options, message",
    [
        (None, {}, "there is no text"),
        (3, {}, "holds 3; accepted: a text"),
        ([3], {}, "holds 3; accepted"),
        (["a", 3], {}, "row 1 of the batch holds 3"),
        ("a", {"text_pair": 3}, "`text_pair` holds 3"),
        (["a"], {"text_pair": "b"}, "must be one too, but it is one text"),
        (["a"], {"text_pair": ["b", "c"]}, "batch of 1, .* it is 2"),
        ("a", {"truncation": True}, "truncation='longest_first' needs max_length"),
        ("a", {"padding": "max_length"}, "padding='max_length' needs max_length"),
        ("a", {"padding": "up"}, "padding='up' is unknown; accepted: True, False, longest"),
        ("a", {"truncation": "up"}, "truncation='up' is unknown; accepted: True, False, longest_first"),
        ("a", {"padding_side": "up"}, "padding_side='up' is unknown; accepted: right, left"),
        ("a", {"return_tensors": "tf"}, 'accepted: "pt"'),
        ("a", {"max_length": -1}, "max_length must be an integer of at least 0"),
        ("a", {"max_length": 2.5}, "max_length must be"),
        ("a", {"padding": True, "pad_to_multiple_of": 0}, "pad_to_multiple_of must be an integer of at least 1"),
        ("a", {"truncation": True, "max_length": 8, "stride": 8}, "stride must be an integer from 0 to 7"),
        ("a", {"truncation": True, "max_length": 8, "stride": -1}, "stride must be"),
        (
            "a b c",
            {"truncation": "only_second", "max_length": 1},
            "truncation='only_second' at max_length=1 .*Second sequence not provided",
        ),
        (
            "a",
            {"truncation": True, "padding": True, "max_length": 7, "pad_to_multiple_of": 4},
            "max_length=7 and padding to multiples of 4",
        ),
        (["a", "a b c d"], {"return_tensors": "pt"}, "padding=True"),
    ],
)
def test_bad_calls(folders, text, options, message):
    ours = alula.GPT2Tokenizer.from_pretrained(folders / "files", pad_token=END)
    before = ours("hello")
    with pytest.raises(ValueError, match=message):
        ours(text, **options)
    assert ours("hello") == before


def test_bad_calls_by_state(folders):
    ours = alula.GPT2Tokenizer.from_pretrained(folders / "files", add_bos_token=True)
    with pytest.raises(ValueError, match=r"needs a padding token.*tokenizer\.eos_token"):
        ours(["a", "b c"], padding=True)
    with pytest.raises(ValueError, match="max_length=0 has no room for the 1 special tokens"):
        ours("a b", max_length=0)
    with pytest.raises(ValueError, match="max_length=1 has no room for the 2 special tokens"):
        ours("a b", "c", max_length=1)
    with pytest.raises(TypeError, match="no_such_option"):
        ours("a", no_such_option=1)
    with pytest.warns(UserWarning, match="`max_length` is ignored"):
        alula.GPT2Tokenizer.from_pretrained(folders / "files", pad_token=END)("a", padding=True, max_length=4)


# --- imports ----------------------------------------------------------------------------------------------------------


def test_tokenizers_is_imported_when_it_is_needed():
    code = (
        "import sys, alula, alula.tokenization; alula.AutoTokenizer, alula.GPT2Tokenizer, alula.CodeGenTokenizer;"
        "assert not {'tokenizers', 'transformers'} & sys.modules.keys();"
        "sys.modules['tokenizers'] = None\n"
        "try: alula.GPT2Tokenizer()\n"
        "except ImportError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'alula[text]'" in out


def test_threads_with_different_options():
    """The library keeps how it cuts and pads as state of the tokenizer: no call may see that of another one."""
    tokenizer = alula.AutoTokenizer.from_pretrained(Path(alula.__file__).parent / "assets" / "tiny-python")
    tokenizer.pad_token = tokenizer.eos_token
    texts = ["def a(b):\n    return b * 2", "x = 1"]
    options = [
        {},
        {"padding": True},
        {"truncation": True, "max_length": 3},
        {"padding": "max_length", "max_length": 20},
    ]
    expected = [dict(tokenizer(texts, **chosen)) for chosen in options]
    assert len({str(rows["input_ids"]) for rows in expected}) == len(options)

    def call(number: int) -> list[bool]:
        return [dict(tokenizer(texts, **options[number])) == expected[number] for _ in range(300)]

    with ThreadPoolExecutor(len(options)) as pool:
        assert all(all(found) for found in pool.map(call, range(len(options))))


def test_a_copy_does_not_wait_for_its_original():
    tokenizer = alula.AutoTokenizer.from_pretrained(Path(alula.__file__).parent / "assets" / "tiny-python")
    with tokenizer._turn:
        assert copy.deepcopy(tokenizer)("x").input_ids == pickle.loads(pickle.dumps(tokenizer))("x").input_ids
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = int(not tokenizer("x").input_ids)
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
