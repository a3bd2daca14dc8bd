"""On-policy distillation: the student says the replies, and the teacher tells it at every token what it would say."""

from collections.abc import Iterator
from typing import Any, Literal

import attrs
from attrs.validators import and_, ge, gt, le, lt, optional

from posttrain.batch import Batch, Term
from posttrain.blocks.data.kinds.preference import PreferenceData
from posttrain.blocks.models.model import HFModel
from posttrain.blocks.rollouts.prompts import PromptData
from posttrain.blocks.rollouts.sampler import TransformersSampler
from posttrain.errors import RecipeError
from posttrain.interfaces import DataBlock, ModelBlock, Sampler, SamplerBlock, SeeingSampler
from posttrain.registry import block, default, key
from posttrain.run import Run
from posttrain.trainer import Trainer


@block("trainer", "on-policy-distill", also=("gkd",))
class OnPolicyDistillTrainer(Trainer):
    """Generalized knowledge distillation (Agarwal et al., arXiv:2306.13649): what the student itself says to a prompt
    is compared with the teacher at every token, so that it learns to go on from its own mistakes.

    Prompts are those of `type: prompts`, or the beginnings of conversations (`type: sft`) up to their first trained
    reply; such replies can be mixed in.
    """

    model: ModelBlock = default(HFModel, required=True)
    data: DataBlock = default(PromptData, required=True)
    teacher: ModelBlock = default(HFModel, required=True)
    """Has the student's tokens; its vocabulary may be padded to another size."""
    sampler: SamplerBlock = default(TransformersSampler)
    """What says the student's replies."""
    on_policy: float = key(1.0, check=and_(ge(0), le(1)), also=("lmbda",))
    """Share of the documents whose reply the student says; the others are trained with the reply that the data has."""
    divergence: Literal["reverse", "forward", "js", "sampled"] = "reverse"
    """KL(student || teacher), KL(teacher || student), the generalized Jensen-Shannon divergence between them, or the
    first estimated from the sampled tokens alone: a policy gradient whose reward is the teacher's log-probability less
    the student's (Lu et al., https://thinkingmachines.ai/blog/on-policy-distillation)."""
    beta: float = key(0.5, check=and_(gt(0), lt(1)))
    """Of js: near 0 it is like the forward divergence, near 1 like the reverse one."""
    top_k: int | None = key(None, check=optional(gt(0)))
    """Compare only the teacher's likeliest tokens, and all others together as one; null for the whole vocabulary."""
    speaker: Sampler = attrs.field(init=False, repr=False)

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts the data."""
        yield from super().check()
        if isinstance(self.data, PreferenceData):
            yield "data", "this trainer needs prompts (type: prompts) or conversations (type: sft), not pairs"
        if isinstance(self.data, PromptData) and self.on_policy < 1:
            yield "on_policy", "below 1 needs data with replies of its own (type: sft); prompts have none"
        if self.divergence == "sampled" and self.on_policy < 1:
            yield "on_policy", "must be 1 for `divergence: sampled`, which is an estimate only of what the student says"
        if self.divergence == "sampled" and self.top_k is not None:
            yield "top_k", "has no use with `divergence: sampled`, which looks at one token"
        if self.sequence:
            yield "sequence", "ranks cannot share rows whose replies are still to be said"

    def setup(self) -> Run:
        """Build what speaks, too."""
        from posttrain.blocks.rollouts.continued import WITH_REPLIES
        from posttrain.blocks.rollouts.groups import TEXT_ALONE, holds_images

        run = super().setup()
        self.speaker = self.sampler.build(run)
        if holds_images(run) and not isinstance(self.data, PromptData):
            raise RecipeError(WITH_REPLIES)
        if holds_images(run) and not isinstance(self.speaker, SeeingSampler):
            raise RecipeError(TEXT_ALONE)
        return run

    def made(self, batches: list[Batch]) -> list[Batch]:
        """Return the documents of the data with what the student says in them."""
        from posttrain.blocks.rollouts.continued import continued

        run = self.run
        found = continued(run, self.speaker, batches, self.on_policy, self.seed)
        return [run.to_device(batch) for batch in found]

    def loss(self, batch: Batch) -> dict[str, Term]:
        """Return the mean divergence of the tokens of replies, in nats."""
        return {"divergence": Term(self.distances(batch).sum(), "supervised_tokens")}

    def distances(self, batch: Batch) -> Any:
        """Return the divergence at each supervised position, [n]."""
        from posttrain.blocks.data.recorded import top_answers
        from posttrain.blocks.losses.divergence import divergence, jensen_shannon, with_rest

        run, temperature = self.run, self.sampler.temperature
        if self.divergence == "sampled":
            teacher = run.frozen["teacher"](batch, "log_probs", temperature=temperature)
            student = run.model(batch, "log_probs", temperature=temperature)
            gain = (teacher - student).detach()
            return -gain + (-gain * (student - student.detach()))  # the value, and the gradient of the policy
        vocabulary = int(run.model.module.vocabulary)  # type: ignore[arg-type]
        k = min(self.top_k or vocabulary, vocabulary)
        answers = top_answers(run.frozen["teacher"], batch, k, temperature, vocabulary)
        teacher, tokens = answers["teacher_log_probs"].float(), answers["teacher_tokens"].long()
        student = run.model(batch, "log_probs", tokens, temperature)
        whole = tokens.shape[-1] == vocabulary
        if self.divergence == "js":
            p, q = (x if whole else with_rest(x) for x in (teacher, student))
            return jensen_shannon(p, q, self.beta)
        return divergence(teacher, student, self.divergence, whole)

    def measured(self, batch: Batch) -> "dict[str, Any]":
        """Return the mean divergence: of what the student says to prompts, or of the replies that the data has."""
        if not isinstance(self.data, PromptData):
            return dict(self.terms(batch))
        (said,) = self.made([batch])
        each = self.distances(said)
        lengths = said["lengths"]
        sums = each.new_zeros(len(lengths)).index_add(0, said["document"], each)
        return {"divergence": Term((sums / lengths.clamp(min=1)).sum(), "weight")}
