"""An agent that finds products with a calculator. It asks a model as it would ask any, by OpenAI's client, and knows
nothing of training."""

import json
import sys
from pathlib import Path

import openai

from posttrain import agent

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
from calculator import calculator


@agent("product-solver")
async def solve(row: dict, base_url: str, *, turns: int = 3) -> bool:
    """Let the policy use the calculator until it answers without, and say whether that is the product."""
    messages = row["messages"]
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none") as client:
        for _ in range(turns):
            completion = await client.chat.completions.create(model="policy", messages=messages)
            message = completion.choices[0].message
            if not message.tool_calls:
                return (message.content or "").strip().rstrip(".") == row["answer"]
            told = [{"role": "tool", "tool_call_id": call.id, "content": used(call)} for call in message.tool_calls]
            messages = [*messages, message.model_dump(exclude_none=True), *told]
    return False


def used(call: openai.types.chat.ChatCompletionMessageToolCall) -> str:
    """Return what the calculator says, or what is wrong with the call."""
    try:
        return calculator(**json.loads(call.function.arguments))
    except Exception as error:  # the model is told
        return f"Error: {error}"
