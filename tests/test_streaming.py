"""Incremental decoders give, joined, what decoding all ids at once gives."""

import random

import pytest
from alula.stopping import TextStream
from alula.tokenization import AutoTokenizer, TokenizersBackend
from alula.tokenization.streaming import decoder_for

tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "naïve café — 東京 😀👩‍👩‍👧‍👦 \u0301\u202e\x00 end",
    "  spaces\t\ttabs\r\n\r\n",
    "\ufffd real replacement",
]


def byte_level(specials=("<|end|>",)) -> "tokenizers.Tokenizer":
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*TEXTS, "return the value of the function"] * 3, trainer)
    backend.add_tokens(["<plain added>"])
    return backend


def metaspace() -> "tokenizers.Tokenizer":
    """A SentencePiece-like unigram model with byte fallback: decoding depends on what is in front."""
    from tokenizers import decoders, models, pre_tokenizers

    vocab = [("<unk>", 0.0), ("</s>", 0.0)] + [(f"<0x{b:02X}>", -20.0) for b in range(256)]
    vocab += [(piece, -3.0) for piece in ("▁", "▁the", "▁cat", "s", "a", "t", "▁sat", "\n")]
    backend = tokenizers.Tokenizer(models.Unigram(vocab, 0, True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["</s>"])
    return backend


def wordpiece() -> "tokenizers.Tokenizer":
    from tokenizers import decoders, models, pre_tokenizers

    vocab = {w: i for i, w in enumerate(["[UNK]", "the", "cat", "##s", "sat", ",", "un", "##want", "##ed"])}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return backend


@pytest.mark.parametrize("make", [byte_level, metaspace, wordpiece])
@pytest.mark.parametrize("skip", [True, False])
def test_pieces_join_to_the_whole(make, skip):
    tokenizer = TokenizersBackend(tokenizer_object=make())
    rng = random.Random(0)
    texts = [*TEXTS, "the cats sat, unwanted", "the 猫 sat\n😀"]
    sequences = [tokenizer.encode(text) for text in texts]
    if make is byte_level:  # any ids at all: broken characters, special and added tokens in between
        sequences += [[rng.randrange(len(tokenizer)) for _ in range(60)] for _ in range(200)]
    for ids in sequences:
        decoder = tokenizer.decoder(skip_special_tokens=skip)
        pieces = [decoder.push(i) for i in ids]
        assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids, skip_special_tokens=skip)
        again = [decoder.push(i) for i in ids]
        assert again == pieces


def test_no_half_characters():
    tokenizer = TokenizersBackend(tokenizer_object=byte_level())
    for text in TEXTS[:3]:
        decoder = tokenizer.decoder()
        for i in tokenizer.encode(text):
            assert "\ufffd" not in decoder.push(i)
    decoder = tokenizer.decoder()
    ids = tokenizer.encode("😁")
    assert len(ids) > 1
    assert [decoder.push(i) for i in ids] == [""] * (len(ids) - 1) + ["😁"]
    decoder = tokenizer.decoder()
    assert decoder.push(ids[0]) == ""
    assert decoder.flush() == "\ufffd"


def test_a_window_decoder_never_waits_for_ever():
    tokenizer = TokenizersBackend(tokenizer_object=metaspace())
    decoder = tokenizer.decoder()
    broken = tokenizer.convert_tokens_to_ids("<0xF0>")
    shown = "".join(decoder.push(broken) for _ in range(200))
    assert len(shown) > 100
    assert len(decoder._ids) < 64


def test_ids_beyond_the_tokenizer_are_nothing():
    tokenizer = TokenizersBackend(tokenizer_object=byte_level())
    assert tokenizer.decoder().push(10_000) == "" == tokenizer.decode([10_000])


def test_settings_of_the_file_do_not_cut_or_pad(tmp_path):
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64, pad_token="<|end|>")
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|end|>"}}')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]
    assert tokenizer(TEXTS)["input_ids"] == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.eos_token_id == 0
    assert decoder_for(tokenizer)[1] == {0}


def test_any_kind_of_tokenizer_can_stop_a_text():
    backend = byte_level()
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    ids = backend.encode("return x # stop here").ids
    for tokenizer in (backend, TokenizersBackend(tokenizer_object=byte_level()), fast):
        text = TextStream(tokenizer, ["sto", "hop"], [])
        assert "".join(text.push(i) for i in [0, *ids]) + text.flush() == "return x # "
        assert text.stopped_by == "sto"
    assert decoder_for(fast)[1] == {0}


def test_stop_strings_are_found_wherever_tokens_break():
    """Every stop string of every text, cut into random tokens: the text before its first occurrence, and no more."""

    class Pieces:
        def __init__(self, pieces):
            self.pieces = pieces

        def decode(self, ids, skip_special_tokens=False):
            return "".join(self.pieces[i] for i in ids)

    rng = random.Random(1)
    for _ in range(400):
        text = "".join(rng.choice("ab") for _ in range(30))
        stops = ["".join(rng.choice("ab") for _ in range(rng.randint(1, 6))) for _ in range(rng.randint(1, 3))]
        pieces, rest = [], text
        while rest:
            n = rng.randint(1, 4)
            pieces.append(rest[:n])
            rest = rest[n:]
        stream = TextStream(Pieces(pieces), stops)
        shown = ""
        for i in range(len(pieces)):
            shown += stream.push(i)
            before = "".join(pieces[: i + 1])
            assert before.startswith(shown)
            assert not any(stop in shown for stop in stops)
            found = [before.find(stop) for stop in stops if stop in before]
            assert (stream.stopped_by is not None) == bool(found)
            if found:
                assert shown == before[: min(found)]
                break
        else:
            assert shown + stream.flush() == text
