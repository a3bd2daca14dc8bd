"""A reward model in this process: conversations in, one number for each out."""

from typing import Any

import torch

from posttrain.blocks.rollouts.replies import Failure, Sample
from posttrain.errors import TrainingError


class Judge:
    """Reads conversations with a model for sequence classification."""

    def __init__(self, name_or_path: str, batch_size: int, device: torch.device) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self.model: Any = AutoModelForSequenceClassification.from_pretrained(name_or_path).eval().to(device)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name_or_path)
        except (OSError, ValueError) as error:
            raise TrainingError(f"the reward model {name_or_path} cannot be loaded: {error}") from error
        if self.model.config.num_labels != 1:
            raise TrainingError(f"{name_or_path} has {self.model.config.num_labels} labels; a reward model has one")
        if self.tokenizer.pad_token_id is None:
            raise TrainingError(f"the tokenizer of the reward model {name_or_path} has no padding token")
        self.batch_size, self.device = batch_size, device

    @torch.no_grad()
    def __call__(self, samples: list[Sample]) -> list[float | Failure]:
        """Return the logit of each conversation."""
        texts, found = [self.text(sample) for sample in samples], list[float | Failure]()
        for i in range(0, len(texts), self.batch_size):
            asked = self.tokenizer(
                texts[i : i + self.batch_size], padding=True, padding_side="right", add_special_tokens=False,
                return_tensors="pt", return_token_type_ids=False,
            ).to(self.device)  # fmt: skip
            found += self.model(**asked).logits[:, 0].float().tolist()
        return found

    def text(self, sample: Sample) -> str:
        """Return what the model reads."""
        if not sample.messages:
            return sample.prompt + sample.text
        whole = [*sample.messages, *(sample.reply.messages or [{"role": "assistant", "content": sample.text}])]
        return str(self.tokenizer.apply_chat_template(whole, tokenize=False))
