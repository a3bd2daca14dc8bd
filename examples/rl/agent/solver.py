"""An agent that finds products with a calculator. It asks a model as it would ask any, by OpenAI's client, and knows
nothing of training: the same function runs against a served model, too.

    python examples/rl/agent/solver.py http://localhost:8000/v1 41 81
"""

import asyncio
import json
import sys
from pathlib import Path

import openai

from posttrain import agent

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
from calculator import SHOWN, calculator, conversation


@agent("product-solver")
async def solve(row: dict, base_url: str, *, turns: int = 3) -> bool:
    """Return whether the policy comes to the product, in so many turns."""
    return await solution(row["messages"], base_url, turns) == row["answer"]


async def solution(messages: list[dict], base_url: str, turns: int = 3) -> str | None:
    """Let a model use the calculator until it answers without."""
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none") as client:
        for _ in range(turns):
            completion = await client.chat.completions.create(model="policy", messages=messages)
            message = completion.choices[0].message
            if not message.tool_calls:
                return (message.content or "").strip().rstrip(".")
            told = [{"role": "tool", "tool_call_id": call.id, "content": used(call)} for call in message.tool_calls]
            messages = [*messages, message.model_dump(exclude_none=True), *told]
    return None


def used(call: openai.types.chat.ChatCompletionMessageToolCall) -> str:
    """Return what the calculator says, or what is wrong with the call."""
    try:
        return calculator(**json.loads(call.function.arguments))
    except Exception as error:  # the model is told
        return f"Error: {error}"


if __name__ == "__main__":
    url, a, b = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    print(asyncio.run(solution(conversation(a, b, [(12, 34), (56, 78)][:SHOWN]), url)))
