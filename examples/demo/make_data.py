"""Make everything the demo trains on: chats, a tokenizer and the shape of a small Llama. Nothing is downloaded."""

import json
import random
import string
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

SKILLS = {
    "Spell {} backwards.": lambda word: word[::-1],
    "Sort the letters of {}.": lambda word: "".join(sorted(word)),
    "What is the last letter of {}?": lambda word: word[-1],
}
SHARES = (3, 4, 1)
"""How often each is practised: what takes more computing comes up more often."""
REAL_WORDS = ("python", "banana", "tiger", "lemon", "cloud", "fish")
"""Held out under every skill, so that a person can follow the answers; all other words are random letters."""
PHRASES = ["user", "assistant", "Spell", " backwards.", "Sort the letters of", "What is the last letter of"]
"""Written as one token each, so that the little computing there is goes into the letters."""
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chat(question: str, word: str) -> dict:
    """Return a conversation: a question about a word, and the right answer."""
    return {
        "messages": [
            {"role": "user", "content": question.format(word)},
            {"role": "assistant", "content": SKILLS[question](word)},
        ]
    }


def chats(count: int, seed: int) -> list[dict]:
    """Return chats about random words of 3 to 6 letters."""
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        letters = chance.sample(string.ascii_lowercase, k=chance.randint(2, 26))  # few: they repeat, as in banana
        word = "".join(chance.choices(letters, k=chance.randint(3, 6)))
        found += [chat(question, word) for question in chance.choices(list(SKILLS), SHARES)]
    return found


def question_of(chat: dict) -> str:
    """Return what the user asks."""
    return chat["messages"][0]["content"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character, one for each phrase, and the two that mark a turn."""
    characters = string.ascii_letters + string.digits + string.punctuation + "ĠĊ"  # byte-level for space, line break
    vocabulary = {character: number for number, character in enumerate(characters)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_tokens(PHRASES)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"], chat_template=CHATML,
    )  # fmt: skip


def shape(tokens: PreTrainedTokenizerFast) -> LlamaConfig:
    """Return a Llama of about half a million parameters."""
    return LlamaConfig(
        vocab_size=len(tokens), hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id,
    )  # fmt: skip


def make(folder: Path, train: int = 40_000, test: int = 300) -> None:
    """Write `train.jsonl`, `test.jsonl` whose questions are not in it, and `model/`.

    Args:
        folder: made if it is not there.
        train: how many chats to draw; those whose question is held out are left out.
        test: how many different questions about random words to hold out, besides those about real words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    followable = [chat(question, word) for word in REAL_WORDS for question in SKILLS]
    held_out = {question_of(made): made for made in followable + chats(test, seed=1)}
    training = [made for made in chats(train, seed=0) if question_of(made) not in held_out]
    for name, found in (("train", training), ("test", held_out.values())):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, found)) + "\n")
    tokens = tokenizer()
    tokens.save_pretrained(folder / "model")
    shape(tokens).save_pretrained(folder / "model")


if __name__ == "__main__":
    make(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo/data"))
