"""The networks that trainers call: transformers models whose logits exist only at supervised positions."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import attrs
import torch
import transformers
from torch import Tensor, nn

from posttrain.batch import Batch, Layout, Term
from posttrain.blocks.images.arrange import BLOCKS, IMAGES
from posttrain.blocks.losses.cross_entropy import nll_sum, token_log_probs, top_log_probs, top_of
from posttrain.blocks.losses.entropy import log_probs_and_entropy, of_logits
from posttrain.blocks.models.activations import Offload
from posttrain.blocks.models.adapters import QUANTIZED
from posttrain.blocks.models.documents.attention import CACHE, NAME, known_on_host, no_mask
from posttrain.blocks.models.documents.ways import (
    Bounds,
    ByDocument,
    Sight,
    Way,
    by_document,
    decoder_of,
    head_of,
    separate,
)
from posttrain.blocks.models.experts.load import Load
from posttrain.blocks.models.experts.router import balance, small
from posttrain.errors import RecipeError, TrainingError
from posttrain.registry import suggest

MAX_SHARD_SIZE = "5GB"
"""Of an exported file; writing one may take as much memory again."""


@contextmanager
def without_bars() -> Iterator[None]:
    """Let transformers write without its progress bars, which would tear the live line of the console."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


OUTPUTS = ("nll", "log_probs", "policy", "logits", "hidden")


class PackedModel(nn.Module):
    """A transformers model over batches of packed documents.

    What a subclass computes lies inside one `forward`, so that DDP, FSDP and ZeRO see every use of every
    parameter. `hf` is the transformers model, possibly wrapped by peft: what is exported.
    """

    def __init__(self, hf: Any) -> None:
        super().__init__()
        self.hf = hf
        self.offload = False
        """Whether what is kept for the backward pass waits in the memory of the host."""
        self.bounds, self.unfolds = Bounds(), False
        """Where documents begin, for modules that compute by document; and whether each has a row of its own."""
        self.router_weight = 0.0
        """Of the loss that balances experts (see router.py)."""
        self.router_z_weight = 0.0
        """Of the loss that keeps the routers' logits small."""
        self.load: Load | None = None
        """How many tokens the experts of a mixture get."""
        self.quiet = False
        """Whether it adds no terms, as a reference does not."""
        self.terms: dict[str, Term] = {}
        """What the passes since the last loss add to it, such as the loss of a router; the loop takes it from here."""
        self.saved_as: str | None = None
        """In which type to export what is trained in float32; None for as it is."""
        self.quantized: dict[str, Any] | None = None
        """How the base was quantized; exported beside adapters, which belong to it as it is then."""
        self.apart = ""
        """How the documents of rows are kept apart, in words."""
        self.sight: Sight | None = None
        """How images enter it; None if it sees none."""
        self.blind = "the model knows no images"
        """Why it sees none."""

    def add(self, name: str, term: Term) -> None:
        """Let a term take part in the loss of the micro-batch that is being computed; of several passes, the sum."""
        known = self.terms.get(name)
        self.terms[name] = term if known is None else attrs.evolve(term, sum=known.sum + term.sum)

    @contextmanager
    def running(self, layout: Layout) -> Iterator[None]:
        """For the passes through the decoder."""
        self.bounds.at = layout.bounds
        load = self.load if torch.is_grad_enabled() and not (self.quiet or self.unfolds) else None
        try:
            if load is not None:
                load.begin(layout)
            with Offload() if self.offload else nullcontext():
                yield
            if load is not None:
                load.end()
        finally:
            if not torch.is_grad_enabled():  # else activations may be computed again
                self.bounds.at = None

    def after_update(self, summed: Callable[[Tensor], Tensor], made: bool) -> dict[str, Tensor]:
        """Return what is to be logged of the experts of a mixture, after their biases have been moved.

        Args:
            summed: adds a tensor up over ranks.
            made: whether the update was made, and not left out.
        """
        return {} if self.load is None else self.load.taken(summed, made)

    def keep_apart(self, way: Way) -> None:
        """Keep the documents of rows apart in this way."""
        separate(self.base, dict(way.separated), self.bounds)
        self.unfolds = way.unfolds
        self.apart = str(way)

    @property
    def base(self) -> Any:
        """The transformers model itself, with peft's layers in it but without its wrapper."""
        return without_adapters_wrapper(self.hf)

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return int(self.base.get_input_embeddings().num_embeddings)

    def given(self, layout: Layout) -> dict[str, Any]:
        """Return the arguments of the transformers model for a layout; what it sees of images is computed apart.

        Raises:
            TrainingError: the layout has images, and the network cannot see them exactly.
        """
        given = inputs(layout, masks=self.attention != NAME)
        found = {name: value for name, value in given.items() if name not in (IMAGES, BLOCKS)}
        return found | self.images_of(layout)

    def images_of(self, layout: Layout) -> dict[str, Any]:
        """Return the arguments of the transformers model for the images of a layout, if it has any.

        Raises:
            TrainingError: the network cannot see them exactly.
        """
        images, blocks = (layout.arguments.get(name) for name in (IMAGES, BLOCKS))
        if images is None or blocks is None:
            return {}
        if self.sight is None:
            raise TrainingError(f"the data holds images, and {self.blind}")
        if layout.sequence_group is not None:
            raise TrainingError("the data holds images, which `sequence` cannot cut into columns; leave it out")
        tensors = images.values
        tensors = tensors(layout.input_ids.device) if callable(tensors) else tensors
        features = self.base.base_model.get_image_features(**tensors, return_dict=True)
        more = {BLOCKS: blocks.values} if self.sight.blocks else {}
        return {**more, "mm_encoder_outputs": {"image": features}}

    def joined(self, found: Tensor) -> Tensor:
        """Return what was found, in which all that is trained besides the language model takes part by a zero: without
        images, nothing else would reach it, and strategies wait for every gradient."""
        others = self.others()
        return found if not others else found + torch.stack([p.sum() for p in others]).sum() * 0.0

    @property
    def seldom(self) -> list[nn.Module]:
        """The modules that only images reach."""
        if self.sight is None:
            return []
        language = self.sight.language
        named = ((f"{name}.", part) for name, part in self.base.named_modules() if name)
        return [part for name, part in named if not name.startswith(language) and not any(
            prefix.startswith(name) for prefix in language)]  # fmt: skip

    def without_images(self) -> None:
        """Train nothing besides the language model: no image will be seen, and decay must not shrink the rest.

        Raises:
            RecipeError: then nothing would be trained.
        """
        for parameter in self.others():
            parameter.requires_grad_(False)
        if self.sight is not None:
            self.sight, self.blind = None, "no row of it was known to hold any"
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise RecipeError("model.train: the data holds no images, so that only the language model can be trained")

    def others(self) -> list[nn.Parameter]:
        """Return the parameters besides those of the language model that are trained."""
        if self.sight is None:
            return []
        return [
            p
            for name, p in self.base.named_parameters()
            if p.requires_grad and not name.startswith(self.sight.language)
        ]

    @property
    def attention(self) -> str:
        """The attention of the language model, as transformers calls it."""
        return str(self.base.config.get_text_config()._attn_implementation)

    def layout(self, batch: Batch) -> Layout:
        """Return where the network sees the tokens; what groups begin with is there once, if attention can branch.

        Raises:
            TrainingError: the batch holds a token that the model does not have.
        """
        if batch.max_token >= self.vocabulary:  # on a GPU it would be an assertion in a kernel
            raise TrainingError(
                f"the data holds token {batch.max_token}, but the model has a vocabulary of {self.vocabulary}: "
                "tokenizer and model do not belong together"
            )
        branches = self.attention == NAME and not self.separates and not self.routed  # a router counts every token
        return batch.branch if batch.branch is not None and branches else batch

    @property
    def separates(self) -> bool:
        """Whether some modules compute by document, so that documents cannot branch."""
        return any(isinstance(module, ByDocument) for module in self.base.modules())

    def hidden_states(self, layout: Layout) -> Tensor:
        """Return the last hidden states, [rows, width, size]."""
        decoder = self.base.base_model if IMAGES in layout.arguments else decoder_of(self.base)
        with self.running(layout):
            if self.unfolds:
                return self.unfolded(lambda ids: decoder(input_ids=ids, use_cache=False).last_hidden_state, layout)
            output = decoder(**self.given(layout), **self.routed)
        self.add_router(output, layout)
        return self.joined(output.last_hidden_state)

    @property
    def routed(self) -> dict[str, bool]:
        """What makes the network give the logits of its routers, if they are wanted."""
        wanted = (self.router_weight or self.router_z_weight) and not self.quiet
        return {"output_router_logits": True} if wanted else {}

    def add_router(self, output: Any, layout: Layout) -> None:
        """Add the losses of the routers to that of the micro-batch."""
        if not self.routed:
            return
        top_k = self.base.config.get_text_config().num_experts_per_tok
        logits = tuple(one for one in output.router_logits if one is not None)
        if self.router_weight:
            self.add("router", balance(logits, layout, top_k, self.router_weight))
        if self.router_z_weight:
            self.add("router_z", small(logits, layout, self.router_z_weight))

    def unfolded(self, compute: Any, layout: Layout) -> Tensor:
        """Compute something with each document in a row of its own, [rows, width, ...]."""
        self.bounds.at = None  # its modules see documents already
        found: Tensor = by_document(compute, Bounds(layout.bounds), False, (layout.input_ids,), {})
        return found

    def save_pretrained(self, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write what `from_pretrained` and vLLM load: safetensors and configuration, or peft's adapters.

        Args:
            folder: is made.
            state_dict: parameters to write instead of this module's, by this module's names.
        """
        if state_dict is not None:
            state_dict = {name.removeprefix("hf."): value for name, value in state_dict.items()}
        with without_bars(), warnings.catch_warnings():  # peft, of a base that is an adapter itself
            warnings.filterwarnings("ignore", message="Could not find a config file in")
            self.hf.save_pretrained(folder, state_dict=state_dict, max_shard_size=MAX_SHARD_SIZE)
        if self.quantized is not None:
            (folder / QUANTIZED).write_text(json.dumps(self.quantized) + "\n", encoding="utf-8")


class CausalLM(PackedModel):
    """A causal language model."""

    def __init__(self, hf: Any) -> None:
        super().__init__(hf)
        self.plain_head = False
        """Whether logits are known to be a linear layer of the last hidden states: then they need not all be there."""

    def keep_apart(self, way: Way) -> None:
        """Keep the documents of rows apart in this way."""
        super().keep_apart(way)
        self.plain_head = way.plain_head

    def forward(
        self,
        batch: Batch,
        output: Literal["nll", "log_probs", "policy", "logits", "hidden"] = "nll",
        tokens: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute something at the supervised positions of a batch (see layout.py).

        Args:
            batch: its layout, `max_token` and `targets` are used.
            output: what to return.
            tokens: int64 [n, k], for log_probs: the tokens that are asked about, instead of the targets.
            temperature: for log_probs and policy: what logits are divided by.

        Returns:
            nll: a scalar, the summed negative log-likelihood of the targets, in nats.
            log_probs: [n], each target's log-probability, or [n, k], those of `tokens`.
            policy: [n] and [n], each target's log-probability, and the entropy of what it is drawn from, in nats.
            logits: [n, vocabulary]; mind the memory.
            hidden: [rows, width, size], the last hidden states, of every position.

        Raises:
            TrainingError: the batch holds a token that the model does not have, or there is no such output.
        """
        if output not in OUTPUTS:
            hint = suggest(output, OUTPUTS)
            raise TrainingError(f"the network has no output {output!r}{hint} (outputs: {', '.join(OUTPUTS)})")
        layout = self.layout(batch)
        if output == "hidden":
            return self.hidden_states(batch)
        if output == "logits":
            return self.logits(layout)
        if output == "policy" and self.plain_head:
            return log_probs_and_entropy(*self.head_inputs(layout), batch.targets, temperature)
        if output == "policy":
            return of_logits(self.logits(layout), batch.targets, temperature)
        if output == "nll" and self.plain_head:
            return nll_sum(*self.head_inputs(layout), batch.targets)
        asked = batch.targets[:, None] if tokens is None else tokens
        if self.plain_head:
            log_probs = token_log_probs(*self.head_inputs(layout), asked, temperature)
        else:
            log_probs = (self.logits(layout).float() / temperature).log_softmax(-1).gather(1, asked)
        log_probs = log_probs[:, 0].clone() if tokens is None else log_probs  # FSDP2 warns of views
        return -log_probs.sum() if output == "nll" else log_probs

    def head_inputs(self, layout: Layout) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the hidden states at the supervised positions, [n, size], and the head's weight and bias."""
        head = head_of(self.base)
        return self.hidden_states(layout).flatten(0, 1).index_select(0, layout.supervised), head.weight, head.bias

    def logits(self, layout: Layout) -> Tensor:
        """Return the model's own logits at the supervised positions, [n, vocabulary]."""
        if self.unfolds:
            with self.running(layout):
                logits = self.unfolded(lambda ids: self.base(input_ids=ids).logits, layout)
            return logits.flatten(0, 1).index_select(0, layout.supervised)
        flat = self.given(layout)
        tokens = [name for name, extra in layout.arguments.items() if extra.per == "token" and name in flat]
        for name in ("input_ids", "position_ids", *tokens):  # one long row, since one index list serves all rows
            flat[name] = flat[name].flatten(-2).unsqueeze(-2)
        with self.running(layout):
            output = self.base(**flat, logits_to_keep=layout.supervised, **self.routed)
        self.add_router(output, layout)
        return self.joined(output.logits[0])

    @torch.no_grad()
    def top_log_probs(
        self, batch: Batch, k: int, temperature: float = 1.0, vocabulary: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the k highest log-probabilities at the supervised positions, and their tokens: [n, k] each.

        Args:
            batch: see `forward`.
            k: at most the vocabulary.
            temperature: what logits are divided by.
            vocabulary: only this many tokens, from the first one on, are thought of; all by default.
        """
        layout, known = self.layout(batch), slice(vocabulary)
        if self.plain_head:
            hidden, weight, bias = self.head_inputs(layout)
            return top_log_probs(hidden, weight[known], None if bias is None else bias[known], k, temperature)
        return top_of(self.logits(layout)[:, known], k, temperature)

    @torch.no_grad()
    def next_logits(
        self, ids: Tensor, mask: Tensor, cache: Any, shift: Tensor | None = None, images: Layout | None = None
    ) -> Tensor:
        """Return the logits of the token that follows each row, float32 [rows, vocabulary].

        Args:
            ids: int64 [rows, new], tokens that the cache does not hold yet.
            mask: int64 [rows, width], 0 for padding at the left; of all tokens so far, the new ones included.
            cache: a transformers `Cache` of what came before, which the new tokens are added to.
            shift: int64 [axes, rows, 1], by how much positions of several axes are ahead of the number of tokens.
            images: where the new tokens hold images, their layout, with positions.
        """
        self.bounds.at = None
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        positions = positions if shift is None else positions + shift
        given = {"attention_mask": mask, "position_ids": positions, "use_cache": True, CACHE: cache}
        if images is not None:
            given |= {"position_ids": images.position_ids, **self.images_of(images)}
        output = self.base(input_ids=ids, logits_to_keep=1, **given)
        return output.logits[:, -1].float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def generate(self, **kwargs: Any) -> Tensor:
        """Generate with transformers, in evaluation mode; arguments and result are transformers' own."""
        was_training, self.bounds.at = self.training, None
        self.eval()
        try:
            return self.hf.generate(use_cache=True, **kwargs)  # type: ignore[no-any-return]
        finally:
            self.train(was_training)


def inputs(layout: Layout, masks: bool = False) -> dict[str, Any]:
    """Return what every transformers model needs to keep packed documents apart, and its further arguments.

    Flash attention and ours go by the cumulative lengths. sdpa, eager and flex attention go by
    positions that restart, and only if there is no attention mask and no cache.

    Args:
        layout: of the documents.
        masks: whether transformers is to build masks, as those attentions need.
    """
    more = {"kv_index": layout.kv_index, "sequence_group": layout.sequence_group}
    branches = layout.cu_seqlens_k is not None
    known_on_host(layout.cu_seqlens, layout.bounds)
    known_on_host(layout.cu_seqlens_k, layout.bounds_k)
    return {
        "input_ids": layout.input_ids,
        "position_ids": layout.position_ids,
        "use_cache": False,
        "attention_mask": None if masks else no_mask(layout.input_ids.device),
        "cu_seq_lens_q": layout.cu_seqlens,
        "cu_seq_lens_k": layout.cu_seqlens_k if branches else layout.cu_seqlens,
        "max_length_q": layout.max_seqlen,
        "max_length_k": layout.max_seqlen_k if branches else layout.max_seqlen,
        **{name: value for name, value in more.items() if value is not None},
        **{name: extra.values for name, extra in layout.arguments.items()},
    }


def without_adapters_wrapper(hf: Any) -> Any:
    """Return the transformers model inside peft's wrapper, if there is one."""
    return hf.get_base_model() if hasattr(hf, "get_base_model") else hf
