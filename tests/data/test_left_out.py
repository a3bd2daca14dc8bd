"""What a chat template leaves out, and how it wants content to be spelled."""

from typing import Any

import pytest
from conversations import CALL, CONVERSATIONS, TEMPLATES, Template, channels, chat, chatml, encoder, pieces_of, trained
from tokens import ASK, CHATML

from posttrain.blocks.data.rows.messages import Refused

# -- what a template leaves out -------------------------------------------------------

THOUGHTS = CONVERSATIONS["reasoning in two turns"]


def test_thoughts_that_a_template_forgets_are_refused_or_split_into_turns() -> None:
    template = TEMPLATES["qwen 3 (history rewritten)"]
    inline = chat("x", "<think>\n2+2\n</think>\n\n4", "y", "<think>\n3+3\n</think>\n\n6")
    for messages in (THOUGHTS, inline):
        with pytest.raises(Refused, match=r"leaves out .* of a message of role 'assistant'; data.split_turns=true"):
            trained(messages, "qwen 3 (history rewritten)")
        made = encoder(template, split_turns=True)
        (encoded,) = made.encode([{"messages": messages}])
        assert not isinstance(encoded, Refused)
        decode = made.renderer.tokenizer.decode
        found = [(decode(ids.tolist()), decode(ids[mask].tolist())) for ids, mask in encoded.documents]
        first = "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
        replies = ["<think>\n2+2\n</think>\n\n4<|im_end|>", "<think>\n3+3\n</think>\n\n6<|im_end|>"]
        assert found[0] == (f"{first}{replies[0]}\n", replies[0])
        second = f"{first}4<|im_end|>\n<|im_start|>user\ny<|im_end|>\n<|im_start|>assistant\n"
        assert found[1] == (f"{second}{replies[1]}\n", replies[1])
        assert trained(messages, "qwen 3 (history rewritten)", last_turn_only=True) == replies[1]


def test_turns_of_which_nothing_is_trained_are_only_context() -> None:
    messages = chat("a", "first", "b", "second", "c", system="s")
    messages[2] |= {"weight": 0}
    made = encoder(TEMPLATES["chatml"], split_turns=True)
    (encoded,) = made.encode([{"messages": messages}])
    assert not isinstance(encoded, Refused)
    ((ids, mask),) = encoded.documents
    assert made.renderer.tokenizer.decode(ids[mask].tolist()) == "second<|im_end|>"
    assert "first" in made.renderer.tokenizer.decode(ids.tolist())


TOOLS = [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {}}}]
SWALLOWED = {
    "a developer's message": (
        "{% for m in messages %}{% if m.role != 'developer' %}" + CHATML.removeprefix("{% for m in messages %}").replace(
            "{% endfor %}", "{% endif %}{% endfor %}") + ASK,
        {"messages": [{"role": "developer", "content": "Be brief."}, *chat("a", "b")]}, "leaves out a message of role 'developer'",
    ),
    "tools": (CHATML + ASK, {"messages": chat("a", "b"), "tools": TOOLS}, "leaves out the tools"),
    "tool calls": (CHATML + ASK, {"messages": CONVERSATIONS["tool calls"]}, "leaves out a tool call"),
    "reasoning": (CHATML + ASK, {"messages": CONVERSATIONS["reasoning"]}, "leaves out the reasoning"),
    "text beside a tool call": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + ASK,
        {"messages": [*chat("a"), {"role": "assistant", "content": "Hm.", "tool_calls": [{"function": {"name": "f"}}]}]},
        "leaves out a part of the text",
    ),
    "a list's own spelling": (
        "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ (m.content | list) ~ '<|im_end|>\n' }}{% endfor %}" + ASK,
        {"messages": chat("a", "b")}, "leaves out a message|changes or inspects|cuts the text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SWALLOWED)
def test_what_a_template_swallows_is_refused(name: str) -> None:
    jinja, row, reason = SWALLOWED[name]
    (encoded,) = encoder(Template(jinja, chatml)).encode([row])
    assert isinstance(encoded, Refused)
    assert any(word in str(encoded) for word in reason.split("|")), encoded


def test_tools_that_a_template_writes_are_fine() -> None:
    jinja = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + CHATML + ASK
    (encoded,) = encoder(Template(jinja, chatml)).encode([{"messages": chat("a", "b"), "tools": TOOLS}])
    assert not isinstance(encoded, Refused)


# -- spellings of content -------------------------------------------------------------


def test_parts_are_joined_for_a_template_that_wants_text_and_text_is_a_part_where_it_wants_parts() -> None:
    assert trained(CONVERSATIONS["parts"]) == "cd<|im_end|>"
    only_parts = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for p in m.content %}{{ p.text }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    assert pieces_of(encoder(Template(only_parts + ASK, chatml)), chat("a", "b"))[1] == "b<|im_end|>"


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}], ids=str)
@pytest.mark.parametrize(
    "said",
    ["{{ m.content }}", "{{ m.content or '' }}", "{% if m.content is none %}{% else %}{{ m.content }}{% endif %}", "{{ m.content + '' }}"],
)  # fmt: skip
def test_a_tool_call_without_text_is_trained_whatever_the_template_asks_of_the_content(
    content: dict[str, Any], said: str
) -> None:
    jinja = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}" + said + "{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + ASK
    )
    messages = [*chat("a"), {"role": "assistant", **content, "tool_calls": [{"function": {"name": "weather"}}]}]
    assert pieces_of(encoder(Template(jinja, chatml)), messages)[1] == "weather<|im_end|>"


def test_a_template_that_calls_tools_only_where_the_content_is_null_gets_null() -> None:
    call = "{% if m.content is none %}{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %}"
    jinja = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}" + call + "{{ '<|im_end|>\n' }}{% endfor %}" + ASK
    )
    messages = [*chat("a"), {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f"}}]}]
    assert pieces_of(encoder(Template(jinja, chatml)), messages)[1] == "f<|im_end|>"
    printed = Template(jinja.replace("{{ m.tool", "None{{ m.tool"), chatml)
    with pytest.raises(Refused):
        pieces_of(encoder(printed), messages)


def test_the_reason_is_that_of_the_spelling_that_the_template_can_read() -> None:
    only_parts = "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{{ p.text }}{% endfor %}\n{% endfor %}"
    with pytest.raises(Refused, match="writes no end-of-turn token"):  # and not that it leaves out the user's text
        pieces_of(encoder(Template(only_parts, chatml)), chat("a", "b"))


def test_a_tool_result_that_repeats_the_name_of_the_call_is_no_part_of_the_reply() -> None:
    """As gpt-oss writes it: the result of a call is a message from the tool, under the tool's name."""
    jinja = (
        "{% set ns = namespace(name='') %}{% for m in messages %}{% if m.tool_calls %}{% set ns.name = m.tool_calls[0].function.name %}"
        "{{ '<|start|>assistant to=' + ns.name + '<|message|>' + (m.tool_calls[0].function.arguments | tojson) + '<|call|>' }}"
        "{% elif m.role == 'tool' %}{{ '<|start|>' + ns.name + '<|message|>' + m.content + '<|end|>' }}"
        "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
    )
    template = Template(jinja, channels, ("<|start|>", "<|message|>", "<|end|>", "<|call|>"), "<|end|>")
    messages = [*chat("weather?"), {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "sunny"},
                {"role": "assistant", "content": "Sunny."}]  # fmt: skip
    _, found, _ = pieces_of(encoder(template), messages)
    arguments = '{"city": "Rome", "days": 2}'
    assert found == f" to=weather<|message|>{arguments}<|call|><|message|>Sunny.<|end|>"
