"""Make everything the demo trains on: chats, a tokenizer and the shape of a small Llama. Nothing is downloaded."""

import json
import random
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SKILLS = {
    "Spell {} backwards.": lambda word: word[::-1],
    "Sort the letters of {}.": lambda word: "".join(sorted(word)),
    "What is the last letter of {}?": lambda word: word[-1],
}
WORDS = ["user", "assistant", "Spell", " backwards.", "Sort the letters of", "What is the last letter of"]
"""Written as one token each, so that the little computing there is goes into the letters."""
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chats(count: int, seed: int) -> list[dict]:
    """Return conversations of a question and its right answer, about random words of 3 to 6 letters."""
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        word = "".join(chance.choices(LETTERS, k=chance.randint(3, 6)))
        question, answer = chance.choice(list(SKILLS.items()))
        user, assistant = question.format(word), answer(word)
        found.append({"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]})
    return found


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character, one for each phrase, and the two that mark a turn."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_tokens(WORDS)
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
    """Write `train.jsonl`, `test.jsonl` with questions that are not in it, and `model/`."""
    folder.mkdir(parents=True, exist_ok=True)
    training = chats(train, seed=0)
    known = {json.dumps(chat) for chat in training}
    held_out = [chat for chat in chats(4 * test, seed=1) if json.dumps(chat) not in known][:test]
    for name, found in (("train", training), ("test", held_out)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, found)) + "\n")
    tokens = tokenizer()
    tokens.save_pretrained(folder / "model")
    shape(tokens).save_pretrained(folder / "model")


if __name__ == "__main__":
    make(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo/data"))
