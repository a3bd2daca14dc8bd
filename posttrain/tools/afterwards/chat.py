"""`posttrain chat`: talk to a model in the terminal, or have it answer a file of prompts."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from posttrain.errors import DataError, RecipeError

if TYPE_CHECKING:
    from posttrain.blocks.models.exports import Opened

Message = dict[str, Any]
PROMPT = "\001\033[1;36m\002> \001\033[0m\002"
"""What stands between 1 and 2 has no width, as readline must know."""
HELP = "Ctrl-D ends, Ctrl-C stops a reply, /new begins another conversation."


@attrs.define
class Talk:
    """A conversation with a model."""

    model: "Opened"
    system: str | None = None
    """Said before all else."""
    max_new_tokens: int = 512
    """Of each reply."""
    temperature: float | None = None
    """0 takes the likeliest token each time; by default what the model's generation configuration says."""
    messages: list[Message] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        """Begin.

        Raises:
            RecipeError: the model does not know conversations.
        """
        if not self.model.tokenizer.chat_template:
            raise RecipeError(
                f"{self.model.name}: its tokenizer has no chat template, so it is a base model that continues text and "
                "does not answer; train it on chats with `tokenizer: {chat_template: chatml}`"
            )
        self.restart()

    def restart(self) -> None:
        """Forget what was said."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def say(self, text: str, streamer: Any = None) -> str:
        """Return the model's reply to a further message of the user; stopped half-way, neither of them counts.

        Raises:
            RecipeError: the conversation is longer than the model can read.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        reply = self.reply(asked, streamer)
        self.messages = [*asked, {"role": "assistant", "content": reply}]
        return reply

    def reply(self, messages: list[Message], streamer: Any = None) -> str:
        """Return what the model says next; a streamer of transformers prints it as it comes.

        Raises:
            RecipeError: the conversation is longer than the model can read.
        """
        hf, tokenizer = self.model.hf, self.model.tokenizer
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"].to(hf.device)  # fmt: skip
        limit = getattr(hf.config.get_text_config(), "max_position_embeddings", None)
        if limit and ids.shape[1] >= limit:
            raise RecipeError(
                f"the conversation has {ids.shape[1]:,} tokens, and the model reads {limit:,}: /new begins another"
            )
        if self.model.speculator is not None:
            return self._drafted(ids, streamer)
        sampling: dict[str, Any] = {}
        if self.temperature is not None:
            warm = {"do_sample": True, "temperature": self.temperature}
            sampling = warm if self.temperature else {"do_sample": False}
        made = hf.generate(
            input_ids=ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=self.max_new_tokens,
            eos_token_id=sorted(self.model.ends), pad_token_id=tokenizer.pad_token_id, streamer=streamer, **sampling,
        )[0, ids.shape[1] :]  # fmt: skip
        return str(tokenizer.decode(made, skip_special_tokens=True))

    def _drafted(self, ids: Any, streamer: Any) -> str:
        """Return the likeliest reply, which a speculator drafts."""
        from posttrain.blocks.models.speculator.speculate import speculate

        if self.temperature:
            raise RecipeError("a speculator drafts the likeliest tokens: leave out --temperature")
        hf, speculator = self.model.hf, self.model.speculator
        hf.generation_config.eos_token_id = sorted(self.model.ends)
        made, _ = speculate(hf, speculator, ids, self.max_new_tokens)  # type: ignore[arg-type]  # asked by reply
        if streamer is not None:
            streamer.put(ids[0])
            streamer.put(made)
            streamer.end()
        return str(self.model.tokenizer.decode(made, skip_special_tokens=True))


def talk(conversation: Talk) -> None:
    """Read what the user says line by line, and print replies as they come."""
    from transformers import TextStreamer

    at_terminal = sys.stdin.isatty()
    if at_terminal:
        import readline  # noqa: F401 - arrow keys and a history in input()

        _print(f"{conversation.model}\n{HELP}")
    for line in _lines(at_terminal):
        if line == "/new":
            conversation.restart()
            continue
        began = time.perf_counter()
        streamer = TextStreamer(conversation.model.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            reply = conversation.say(line, streamer)
        except KeyboardInterrupt:
            _print("\n(stopped)")
        except RecipeError as error:
            _print(str(error))
        else:
            count = len(conversation.model.tokenizer(reply, add_special_tokens=False)["input_ids"])
            if at_terminal:
                _print(f"\033[2m{count} tokens, {count / (time.perf_counter() - began):.0f} per second\033[0m")


def answer(conversation: Talk, prompts: Path, output: Path | None) -> int:
    """Answer each prompt of a file in a conversation of its own; return how many there were.

    Args:
        conversation: with the settings.
        prompts: rows as any source of chats has them (a reply that is there is not looked at), or a `.txt` with one
            prompt on each line.
        output: a .jsonl file for `{"messages": [...]}`, which SFT reads; by default both are printed.
    """
    count = 0
    with output.open("w", encoding="utf-8") if output else nullcontext(sys.stdout) as file:
        for messages in asked(prompts):
            count += 1
            said = [*conversation.messages, *messages]
            reply = conversation.reply(said)
            row = json.dumps({"messages": [*said, {"role": "assistant", "content": reply}]}, ensure_ascii=False)
            shown = f"\033[1m> {messages[-1]['content']}\033[0m\n{reply}\n" if file.isatty() else row
            print(shown, file=file, flush=True)
    return count


def asked(file: Path) -> Iterator[list[Message]]:
    """Yield the conversations of a file up to what is to be answered.

    Raises:
        RecipeError: a row asks nothing.
    """
    from posttrain.blocks.data.rows.refused import Refused
    from posttrain.blocks.data.sources import Source
    from posttrain.blocks.rollouts.prompts import asked as prompt_in

    if file.suffix == ".txt":
        lines = filter(str.strip, file.read_text(encoding="utf-8").splitlines())
        yield from ([{"role": "user", "content": line}] for line in lines)
        return
    source = Source(name_or_path=str(file))
    for row, _ in source.read(source.open()):
        try:
            yield prompt_in(row.values)["messages"]
        except (Refused, DataError) as error:
            raise RecipeError(f"{row.place}: {error}") from error


def _lines(at_terminal: bool) -> Iterator[str]:
    while True:
        try:
            line = input(PROMPT if at_terminal else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            _print("")
            continue
        if line in ("/exit", "/quit"):
            return
        if line:
            yield line


def _print(text: str) -> None:
    print(text, file=sys.stderr if not sys.stdout.isatty() else sys.stdout)
