"""What all networks have in common: a transformers model over batches of packed documents, images and experts included.

`causal`, `reward` and `speculator` say what is computed of its hidden states.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import attrs
import torch
import transformers
from torch import Tensor, nn

from posttrain.batch import Batch, Layout, Term
from posttrain.blocks.images.arrange import BLOCKS, IMAGES
from posttrain.blocks.models.activations import Offload
from posttrain.blocks.models.adapters import QUANTIZED
from posttrain.blocks.models.documents.attention import NAME, known_on_host, no_mask
from posttrain.blocks.models.documents.ways import Bounds, ByDocument, Way, by_document, decoder_of, separate
from posttrain.blocks.models.experts.load import Load
from posttrain.blocks.models.experts.router import balance, small
from posttrain.blocks.models.vision.parts import Sight
from posttrain.errors import RecipeError, TrainingError

MAX_SHARD_SIZE = "5GB"
"""Of an exported file; writing one may take as much memory again."""


class PackedModel(nn.Module):
    """A transformers model over batches of packed documents.

    A subclass computes all that it computes inside one `forward`, so that DDP, FSDP and ZeRO see every use of every
    parameter. `hf` is the transformers model, possibly wrapped by peft: what is exported.
    """

    def __init__(self, hf: Any) -> None:
        super().__init__()
        self.hf = hf
        self.offload = False
        """Whether activations wait for the backward pass in the memory of the host."""
        self.bounds, self.unfolds = Bounds(), False
        """Where documents begin, for modules that compute by document; and whether each has a row of its own."""
        self.apart = ""
        """How the documents of rows are kept apart, in words."""
        self.router_weight = 0.0
        """Of the loss that balances experts (see router.py)."""
        self.router_z_weight = 0.0
        """Of the loss that keeps the routers' logits small."""
        self.load: Load | None = None
        """Counts how many tokens each expert of a mixture gets."""
        self.quiet = False
        """Whether it adds no terms to the loss, as a reference does not."""
        self.terms: dict[str, Term] = {}
        """What the network itself adds to the loss of this micro-batch, such as the loss of a router; the training loop
        takes it from here."""
        self.sight: Sight | None = None
        """How images enter it; None if it sees none."""
        self.blind = "the model knows no images"
        """Why it sees none."""
        self.saved_as: str | None = None
        """The type in which to export weights that are trained in float32; None for as they are."""
        self.quantized: dict[str, Any] | None = None
        """How the base was quantized. Adapters fit only a base that is quantized so; it is exported beside them."""

    @property
    def base(self) -> Any:
        """The transformers model itself, with peft's layers in it but without its wrapper."""
        return self.hf.get_base_model() if hasattr(self.hf, "get_base_model") else self.hf

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return int(self.base.get_input_embeddings().num_embeddings)

    @property
    def attention(self) -> str:
        """The attention of the language model, as transformers calls it."""
        return str(self.base.config.get_text_config()._attn_implementation)

    # -- documents ------------------------------------------------------------------

    def keep_apart(self, way: Way) -> None:
        """Keep the documents of rows apart in this way."""
        separate(self.base, dict(way.separated), self.bounds)
        self.unfolds = way.unfolds
        self.apart = str(way)

    @property
    def separates(self) -> bool:
        """Whether some modules compute by document, so that documents cannot branch."""
        return any(isinstance(module, ByDocument) for module in self.base.modules())

    def layout(self, batch: Batch) -> Layout:
        """Return where the network sees the tokens. If attention can branch, a beginning that documents share is there
        once.

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

    def given(self, layout: Layout) -> dict[str, Any]:
        """Return the arguments of the transformers model for a layout; the features of its images are computed first.

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

    @contextmanager
    def running(self, layout: Layout) -> Iterator[None]:
        """Tell modules where documents begin, and count what experts get, while the decoder computes."""
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

    def hidden_states(self, layout: Layout) -> Tensor:
        """Return the last hidden states, [rows, width, size]."""
        decoder = self.base.base_model if IMAGES in layout.arguments else decoder_of(self.base)
        with self.running(layout):
            if self.unfolds:
                return self.unfolded(lambda ids: decoder(input_ids=ids, use_cache=False).last_hidden_state, layout)
            output = decoder(**self.given(layout), **self.routed)
        self.add_router(output, layout)
        return self.joined(output.last_hidden_state)

    def unfolded(self, compute: Any, layout: Layout) -> Tensor:
        """Compute something with each document in a row of its own, [rows, width, ...]."""
        self.bounds.at = None  # its modules see documents already
        found: Tensor = by_document(compute, Bounds(layout.bounds), False, (layout.input_ids,), {})
        return found

    # -- the loss of routers --------------------------------------------------------

    def add(self, name: str, term: Term) -> None:
        """Add a term to the loss of this micro-batch; if several forward passes add one, their sums are added up."""
        known = self.terms.get(name)
        self.terms[name] = term if known is None else attrs.evolve(term, sum=known.sum + term.sum)

    @property
    def routed(self) -> dict[str, bool]:
        """The arguments that make the network return the logits of its routers, if a loss needs them."""
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

    def after_update(self, summed: Callable[[Tensor], Tensor], made: bool) -> dict[str, Tensor]:
        """Return what is to be logged of the experts of a mixture, after their biases have been moved.

        Args:
            summed: adds a tensor up over ranks.
            made: whether the update was made, and not left out.
        """
        return {} if self.load is None else self.load.taken(summed, made)

    # -- parts that only images reach -----------------------------------------------

    def others(self) -> list[nn.Parameter]:
        """Return the trained parameters that do not belong to the language model."""
        if self.sight is None:
            return []
        named = self.base.named_parameters()
        return [p for name, p in named if p.requires_grad and not name.startswith(self.sight.language)]

    def joined(self, found: Tensor) -> Tensor:
        """Return `found` plus zero times those parameters: a batch without images would give them no gradient, and
        strategies wait for every gradient."""
        others = self.others()
        return found if not others else found + torch.stack([p.sum() for p in others]).sum() * 0.0

    @property
    def seldom(self) -> list[nn.Module]:
        """The modules that only images reach."""
        if self.sight is None:
            return []
        language = self.sight.language
        return [
            part
            for name, part in self.base.named_modules()
            if name and not f"{name}.".startswith(language) and not any(one.startswith(f"{name}.") for one in language)
        ]

    def without_images(self) -> None:
        """Train nothing but the language model: no image will be seen, and weight decay must not shrink the rest.

        Raises:
            RecipeError: then nothing would be trained.
        """
        for parameter in self.others():
            parameter.requires_grad_(False)
        if self.sight is not None:
            self.sight, self.blind = None, "no row of it was known to hold any"
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise RecipeError("model.train: the data holds no images, so that only the language model can be trained")

    # -- export ---------------------------------------------------------------------

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


def inputs(layout: Layout, masks: bool = False) -> dict[str, Any]:
    """Return the arguments by which every transformers model keeps packed documents apart, and the layout's others.

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
