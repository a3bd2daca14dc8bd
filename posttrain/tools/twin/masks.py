"""The checks of a recipe's rows: what is supervised, and whether they fit."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from posttrain.blocks.data.encoding.encoders import ChatEncoder
from posttrain.blocks.data.kinds.sft import SFTData
from posttrain.blocks.data.rows.chat import stop_tokens
from posttrain.blocks.data.rows.schemas import Refused
from posttrain.blocks.images.arrange import IMAGES
from posttrain.blocks.rollouts.engines.vllm import VllmSampler, VllmServerSampler
from posttrain.blocks.rollouts.groups import TEXT_ALONE
from posttrain.blocks.rollouts.prompts import PromptData
from posttrain.tools.twin.stand_ins import Sampling
from posttrain.tools.twin.twin import Failed, NoRows, Row, Skipped, Twin
from posttrain.words import counted

MARKUP = r"(?:</?[\w|]+>|\[/?\w+\])*"
"""What templates write around replies, such as an empty `<think></think>`; an expression."""


def masks(twin: Twin) -> str:
    """Replies are supervised, whole and alone, through their end of turn; there is one BOS at most."""
    if not twin.rows:
        raise Skipped(f"{type(twin.real.data).__name__} reads no sources")
    refused = Counter(str(row.encoded) for row in twin.rows if isinstance(row.encoded, Refused))
    rows, left = counted(len(twin.rows), "row"), f", {refused.total()} refused" if refused else ""
    if refused and twin.data.invalid == "error":
        raise Failed(f"{refused.total()} of {rows} cannot be trained on: {_listed(refused)}")
    chats = isinstance(twin.data.encoder(twin.tokenizer), ChatEncoder)
    stops = set(twin.tokenizer.convert_tokens_to_ids(sorted(stop_tokens(twin.tokenizer)))) if chats else None
    found = Counter(itertools.chain.from_iterable(_mistakes(twin, row, stops) for row in twin.rows))
    if found:
        raise Failed(f"of {rows}: {_listed(found)}; look at `posttrain show RECIPE --data`")
    if not twin.sample(1):
        raise NoRows(f"no row can be trained on: {_listed(refused)}")
    if isinstance(twin.real, Sampling) and isinstance(twin.real.sampler, VllmSampler | VllmServerSampler):
        usable = (row.encoded for row in twin.rows if not isinstance(row.encoded, Refused))
        if any(any(example.values.get(IMAGES, ())) for example in usable):
            raise Failed(TEXT_ALONE)  # the twin has a sampler of its own
    if isinstance(twin.data, PromptData):
        return f"{counted(len(twin.rows), 'prompt')}{left}"
    tokens, trained = 0, 0
    for row in twin.sample(len(twin.rows)):
        for ids, mask in row.encoded.documents:  # type: ignore[union-attr]
            tokens, trained = tokens + len(ids), trained + int(mask.sum())
    return f"{rows}, {trained:,} of {counted(tokens, 'token')} supervised{left}"


def overflow(twin: Twin) -> str:
    """Rows fit, or the recipe says what happens to those that do not."""
    if not twin.rows:
        raise Skipped(f"{type(twin.real.data).__name__} reads no sources")
    lengths = [row.length for row in twin.rows]
    longer = sum(length > twin.data.max_length for length in lengths)
    rows, most = counted(len(lengths), "row"), twin.data.max_length
    said = f"{longer} of {rows} are longer than {most:,} (longest {max(lengths):,})"
    if longer and twin.data.overflow == "error":
        raise Failed(f"{said}, and data.overflow is error: say drop or truncate, or give a larger data.max_length")
    return said + (f"; {twin.data.overflow}" if longer else "")


def _mistakes(twin: Twin, row: Row, stops: set[int] | None) -> Iterator[str]:
    """Yield what is wrong with the mask of a row; `stops` are the tokens that may end a turn, if it has turns."""
    if isinstance(row.encoded, Refused):
        return
    tokenizer, bos = twin.tokenizer, twin.tokenizer.bos_token_id
    for ids, mask in row.encoded.documents:
        listed = ids.tolist()
        if bos is not None and listed[:2] == [bos, bos]:
            yield "two BOS at the beginning"
        last = max((index for index, trained in enumerate(mask.tolist()) if trained), default=-1)
        if last >= 0 and stops is not None and listed[last] not in stops:
            yield "the reply ends without an end-of-turn token, so that the model would not learn to stop"
    if type(twin.data).encoder is SFTData.encoder and (wanted := _replies(twin.data, row.values)) is not None:  # type: ignore[arg-type]
        kept = [token for ids, mask in row.encoded.documents for token in ids[mask].tolist()]
        expected = "".join(f"{MARKUP}{re.escape(_squeezed(reply))}" for reply in wanted) + MARKUP
        if not re.fullmatch(expected, _squeezed(tokenizer.decode(kept, skip_special_tokens=True))):
            yield "what is supervised is not the text of the replies"


def _replies(data: SFTData, values: dict[str, Any]) -> list[str] | None:
    """Return the texts of the trained messages; None if they are not all plain text."""
    if data.last_turn_only:
        return None
    messages = [m for m in data.conversation(values)["messages"] if m["role"] in data.train_on]
    plain = all(isinstance(m.get("content"), str) and set(m) <= {"role", "content"} for m in messages)
    return [m["content"] for m in messages] if plain else None


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _listed(found: "Counter[str]") -> str:
    return "; ".join(f"{count} x {what}" for what, count in found.most_common(3))
