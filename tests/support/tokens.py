"""A tokenizer with one token per byte, and templates for it."""

from typing import Any

SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|pad|>"]


def byte_tokenizer(chat_template: str | None = None, special: list[str] = SPECIAL, eos: str = "<|im_end|>") -> Any:
    """A tokenizer with one token per byte, and special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    bos = {"bos_token": "<s>"} if "<s>" in special else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=eos, pad_token="<|pad|>", **bos, chat_template=chat_template,
        additional_special_tokens=[token for token in special if token not in (eos, "<s>", "<|pad|>")],
    )  # fmt: skip


CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
