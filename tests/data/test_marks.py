"""Messages that say themselves whether they are trained."""

from typing import Any

import pytest
from conversations import CALL, TEMPLATES, chat, encoder, pieces_of, trained

from posttrain.blocks.data.rows.messages import Refused

NOT_TRAINED = [
    {"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False}, {"loss_weight": 0},
    {"train_detail": []}, {"weight": 1, "train": False}, {"train_detail": [{"begin_offset": 0, "end_offset": 0, "train": False}]},
]  # fmt: skip


@pytest.mark.parametrize("said", NOT_TRAINED, ids=str)
def test_a_reply_that_says_so_is_not_trained(said: dict[str, Any]) -> None:
    messages = chat("a", "first", "b", "second")
    messages[1] |= said
    text, found, _ = pieces_of(encoder(TEMPLATES["chatml"]), messages)
    assert found == "second<|im_end|>"
    assert "weight" not in text and "train" not in text
    messages[3] |= said
    with pytest.raises(Refused, match=r"every reply says that it is not trained \(weight: 0, train: false\)"):
        trained(messages)


def test_weight_one_changes_nothing_and_train_true_trains_any_role() -> None:
    messages = chat("a", "first", "b", "second", system="s")
    assert trained([m | {"weight": 1, "loss": True} for m in messages]) == "first<|im_end|>second<|im_end|>"
    messages[1] |= {"train": True}
    assert trained(messages) == "a<|im_end|>first<|im_end|>second<|im_end|>"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"weight": 0.5}, "weight 0.5: only 0 .not trained. and 1 are possible"),
        ({"weight": True}, "weight True: only 0"),
        ({"train": "no"}, "train 'no', not true or false"),
        ({"train_detail": [{"begin_offset": 3}]}, "does not hold begin_offset, end_offset and train"),
        (
            {"train_detail": [{"begin_offset": 0, "end_offset": 99, "train": True}]},
            "reaches to character 99 of a text of 5",
        ),
        ({"train_detail": 5}, "'train_detail' is not a list"),
    ],
)
def test_a_mark_that_cannot_be_honoured_is_refused(said: dict[str, Any], reason: str) -> None:
    messages = chat("a", "first")
    messages[1] |= said
    with pytest.raises(Refused, match=reason):
        trained(messages)


@pytest.mark.parametrize("template", ["chatml", "llama 3 (headers, trimmed)", "qwen 3 (history rewritten)"])
def test_train_detail_trains_the_characters_it_names(template: str) -> None:
    """Ends are included, as Axolotl counts; the end of the turn goes with the last character."""
    end = "<|eot_id|>" if "llama" in template else "<|im_end|>"
    thought = "<think>\n\n</think>\n\n" if "qwen" in template else ""

    def with_detail(content: str, *ranges: tuple[int, int]) -> str:
        detail = [{"begin_offset": b, "end_offset": e, "train": True} for b, e in ranges]
        reply = {"role": "assistant", "content": content, "train_detail": detail}
        return trained([*chat("a"), reply], template)

    assert with_detail("one two three", (4, 6)) == "two"
    assert with_detail("one two three", (0, 2), (8, 12)) == f"{thought}onethree{end}"
    assert with_detail("one two three", (0, 12)) == f"{thought}one two three{end}"
    assert with_detail("é😀é two", (1, 1)) == "😀"


def test_a_mark_in_a_row_of_sharegpt_counts_too() -> None:
    row = {"conversations": [
        {"from": "human", "value": "q"}, {"from": "gpt", "value": "first", "weight": 0},
        {"from": "human", "value": "q"}, {"from": "gpt", "value": "second"},
    ]}  # fmt: skip
    made = encoder(TEMPLATES["chatml"])
    ((ids, mask),) = made.encode([row])[0].documents  # type: ignore[union-attr]
    assert made.renderer.tokenizer.decode(ids[mask].tolist()) == "second<|im_end|>"


def test_last_turn_only_trains_all_behind_the_last_question() -> None:
    messages = [*chat("a", "first", "weather?"), {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
                {"role": "tool", "content": "sunny"}, {"role": "assistant", "content": "Sunny."}]  # fmt: skip
    found = trained(messages, "qwen 2.5 (tool calls)", last_turn_only=True)
    assert found.startswith("Let me see.\n<tool_call>") and found.endswith("Sunny.<|im_end|>")
    assert "first" not in found
