"""Chat templates that ship with posttrain, for base models whose tokenizer has none."""

from posttrain.errors import DataError
from posttrain.registry import suggest
from posttrain.values import expanded

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "plain": (
        "{% for message in messages %}"
        "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    ),
}
"""Name -> Jinja. `plain` joins the contents and ends each reply with the eos token; `zephyr` needs no token but eos."""

NEEDED = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
"""Special tokens that the tokenizer must have for a template to make sense."""


def template_text(chosen: str) -> str:
    """Return the Jinja text that a recipe means: inline Jinja, a name of `TEMPLATES`, or a file.

    Raises:
        DataError: it is none of these, or the file cannot be read.
    """
    if "{{" in chosen or "{%" in chosen:
        return chosen
    if chosen in TEMPLATES:
        return TEMPLATES[chosen]
    try:
        return expanded(chosen).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"chat_template {chosen!r} is neither Jinja text, nor one that ships with posttrain "
            f"({', '.join(TEMPLATES)}){suggest(chosen, TEMPLATES)}, nor a file that can be read: {error}"
        ) from None
