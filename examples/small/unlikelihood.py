"""A trainer of your own: unlikelihood, which pushes the likeliest mistake down (Welleck et al., arXiv:1908.04319)."""

import posttrain


@posttrain.block("trainer", "unlikelihood")
class Unlikelihood(posttrain.SFTTrainer):
    """SFT that also pushes the likeliest wrong token down."""

    alpha: float = 0.5
    """How much that counts."""

    def loss(self, batch: posttrain.Batch):
        """Return the mean over the supervised tokens."""
        log_probs = self.run.model(batch, "logits").log_softmax(-1)
        right = log_probs.gather(-1, batch["targets"][:, None])[:, 0]
        wrong = log_probs.scatter(-1, batch["targets"][:, None], float("-inf")).max(-1).values
        self.run.log(wrong=wrong.exp().mean())
        pushed = (-(1 - wrong.exp()).clamp(min=1e-6).log()).sum()
        return (-right.sum() + self.alpha * pushed) / batch["weight"]
