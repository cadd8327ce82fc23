"""BigBird's tokenizer: a SentencePiece unigram model; a text becomes ``[CLS] text [SEP]``, with a second one
``[CLS] text [SEP] second text [SEP]``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from alula.config import read_json
from alula.tokenization.backend import require_tokenizers
from alula.tokenization.base import TokenizersBackend
from alula.tokenization.folder import TOKENIZER_FILE
from alula.tokenization.sentencepiece_file import CONTROL, USER_DEFINED, read_pieces

__all__ = ["BigBirdTokenizer"]

_SPACE = "\u2581"  # stands for a space at the start of a word
_UNKNOWN_ID = 100  # of BigBird's own vocabulary


class BigBirdTokenizer(TokenizersBackend):
    """BigBird's unigram tokenizer.

    As in transformers 5, a tokenizer.json or spiece.model gives its vocabulary and added tokens; how text is
    normalised, split and joined is the class's own (so a table of characters in spiece.model, such as NFKC, is not
    applied).
    :class:`TokenizersBackend` takes a tokenizer.json whole.

    Args:
        vocab: list of (token, score), by rising id. None: the four special tokens alone.
        unk_token, bos_token, eos_token, pad_token, sep_token, mask_token, cls_token: special tokens; those not in the
            vocabulary are added to it. The mask token takes the space before it in.
        add_prefix_space: a space goes in front of a text.
        vocab_file: the path of a spiece.model, in place of ``vocab``.
        kwargs: everything else of :class:`TokenizersBackend`.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "spiece.model"}

    def __init__(
        self,
        vocab: list[tuple[str, float]] | None = None,
        unk_token: Any = "<unk>",
        bos_token: Any = "<s>",
        eos_token: Any = "</s>",
        pad_token: Any = "<pad>",
        sep_token: Any = "[SEP]",
        mask_token: Any = "[MASK]",
        cls_token: Any = "[CLS]",
        add_prefix_space: bool = True,
        **kwargs: Any,
    ) -> None:
        library = require_tokenizers()
        vocab_file = kwargs.pop("vocab_file", None)
        if vocab is None and vocab_file is not None:
            kwargs |= _from_spiece(vocab_file)
            vocab = kwargs.pop("vocab")
        named = {
            "bos_token": bos_token,
            "eos_token": eos_token,
            "unk_token": unk_token,
            "pad_token": pad_token,
            "mask_token": mask_token,
            "cls_token": cls_token,
            "sep_token": sep_token,
        }
        for name, token in named.items():
            if isinstance(token, str):
                named[name] = library.AddedToken(token, lstrip=name == "mask_token", rstrip=False)
        self._tokenizer = _unigram(vocab, named, bool(add_prefix_space))
        super().__init__(**named, add_prefix_space=bool(add_prefix_space), **kwargs)
        cls, sep = self.cls_token, self.sep_token
        self._tokenizer.post_processor = library.processors.TemplateProcessing(
            single=f"{cls}:0 $A:0 {sep}:0",
            pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
            special_tokens=[(cls, self.cls_token_id), (sep, self.sep_token_id)],
        )

    @classmethod
    def find_files(cls, folder: Path) -> dict[str, Path]:
        """argument -> file, of the vocabulary files in a folder."""
        for argument, name in (("tokenizer_file", TOKENIZER_FILE), *cls.vocab_files_names.items()):
            if (folder / name).is_file():
                return {argument: folder / name}
        raise FileNotFoundError(
            f"{folder} has no {TOKENIZER_FILE} and no spiece.model; {cls.__name__} needs one of them"
        )

    @classmethod
    def read_files(cls, files: dict[str, Path]) -> dict[str, Any]:
        """The arguments that the folder's vocabulary files give."""
        if "tokenizer_file" not in files:
            return _from_spiece(files["vocab_file"])
        file = files["tokenizer_file"]
        content = read_json(file)
        model = content.get("model")
        kind = model.get("type", "Unigram") if isinstance(model, dict) else None
        vocab = model.get("vocab") if isinstance(model, dict) else None
        if kind != "Unigram" or not isinstance(vocab, list) or not vocab:
            found = f"a {kind} model" if kind not in (None, "Unigram") else "no model with a list of tokens"
            raise ValueError(f"{cls.__name__} needs a unigram model; {file} holds {found}")
        try:
            pairs = [(str(token), float(score)) for token, score in vocab]
        except (TypeError, ValueError):
            raise ValueError(f"{file}: the vocabulary must be a list of pairs [token, score]") from None
        return {
            "vocab": pairs,
            "tokenizer_padding": content.get("padding") and _limits(file).padding,
            "tokenizer_truncation": content.get("truncation") and _limits(file).truncation,
        }


def _limits(file: Path) -> Any:
    """The whole tokenizer of a file, for what it says of padding and truncation."""
    try:
        return require_tokenizers().Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{file} is not a tokenizer.json that `tokenizers` can read: {error}") from error


def _from_spiece(path: Any) -> dict[str, Any]:
    """Vocabulary and added tokens of a spiece.model: control pieces are special, user-defined ones are never split."""
    library = require_tokenizers()
    pieces = read_pieces(path)
    return {
        "vocab": [(piece.text, piece.score) for piece in pieces],
        "extra_special_tokens": [
            library.AddedToken(piece.text, normalized=False, special=piece.type == CONTROL)
            for piece in pieces
            if piece.type in (CONTROL, USER_DEFINED)
        ],
    }


def _unigram(vocab: Any, named: dict[str, Any], add_prefix_space: bool) -> Any:
    """A `tokenizers.Tokenizer` with BigBird's pipeline."""
    library = require_tokenizers()
    unknown = str(named["unk_token"])
    if vocab is None:
        vocab = [(str(named[f"{name}_token"]), 0.0) for name in ("pad", "eos", "bos", "unk")]
    elif not isinstance(vocab, (list, tuple)):
        raise ValueError(f"vocab must be a list of (token, score), got a {type(vocab).__name__}")
    unknown_id = next((i for i, pair in enumerate(vocab) if tuple(pair) == (unknown, 0.0)), _UNKNOWN_ID)
    if unknown_id >= len(vocab):
        raise ValueError(f"the vocabulary has no unknown token {unknown!r} with a score of 0")
    try:
        model = library.models.Unigram([tuple(pair) for pair in vocab], unk_id=unknown_id, byte_fallback=False)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"the vocabulary makes no unigram model: {error}") from None
    backend = library.Tokenizer(model)
    backend.normalizer = library.normalizers.Sequence(
        [
            library.normalizers.Strip(left=False, right=False),
            library.normalizers.Replace(library.Regex(" {2,}"), _SPACE),
        ]
    )
    scheme = "always" if add_prefix_space else "never"
    backend.pre_tokenizer = library.pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=True)
    backend.decoder = library.decoders.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=True)
    return backend
