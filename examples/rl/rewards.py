"""What a reply is worth. The demo's recipe names it, and `code:` has it imported."""

from posttrain import reward


@reward("right-sum")
def right_sum(prompt: str, reply: str, row: dict) -> bool:
    """Whether the reply is the sum, and nothing else."""
    return reply.strip() == row["answer"]
