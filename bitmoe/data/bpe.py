"""Training of a byte-level BPE vocabulary on the given text, with the ``tokenizers`` library.

Byte-level: every byte is in the vocabulary, so any text can be encoded and decodes to itself
(Sennrich et al. 2016, arXiv:1508.07909; byte-level as in GPT-2).
"""

from collections.abc import Iterable

from bitmoe.config.errors import InputError

EOD_TOKEN = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # 256 bytes and the end-of-document token


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """Return the content of the ``tokenizer.json`` trained on ``texts``.

    Args:
        texts: documents; read once, none is kept.
        vocab_size: size of the vocabulary; a small text can yield fewer tokens.

    Raises:
        InputError: a vocabulary too small for the bytes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise InputError(
            f"{vocab_size} tokens cannot hold 256 bytes and an end-of-document token",
            fix=f"give at least {SMALLEST_VOCABULARY}",
            key="tokenizer.vocab_size",
        )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    clean = (text.encode("utf-8", errors="replace").decode("utf-8") for text in texts)
    tokenizer.train_from_iterator(clean, trainer)
    return tokenizer.to_str(pretty=True)
