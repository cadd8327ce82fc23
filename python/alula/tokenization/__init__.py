"""Text to ids and back (extra `[text]`): Hugging Face's tokenizer classes on the `tokenizers` library.

Importing this package does not import `tokenizers`; making a tokenizer does.
"""

from alula.tokenization.auto import AutoTokenizer
from alula.tokenization.base import TokenizersBackend
from alula.tokenization.big_bird import BigBirdTokenizer
from alula.tokenization.codegen import CodeGenTokenizer
from alula.tokenization.encoding import BatchEncoding
from alula.tokenization.gpt2 import GPT2Tokenizer

__all__ = [
    "AutoTokenizer",
    "BatchEncoding",
    "BigBirdTokenizer",
    "CodeGenTokenizer",
    "GPT2Tokenizer",
    "TokenizersBackend",
]
