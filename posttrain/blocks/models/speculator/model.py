"""The MLP-speculator block (Wertheimer et al., arXiv:2404.19124): small heads that draft what a model will say next."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attrs.converters import optional as or_none
from attrs.validators import gt

from posttrain.blocks.models.model import HFModel
from posttrain.blocks.models.speculator.files import ARCHITECTURES, misfit
from posttrain.errors import RecipeError
from posttrain.registry import block, key

if TYPE_CHECKING:
    from torch import nn


@block("model", "mlp-speculator")
class SpeculatorModel(HFModel):
    """A frozen base model and the speculator that is trained for it. Only the speculator is exported."""

    n_predict: int = key(3, also=("n_speculator_heads",), check=gt(0))
    """Heads: how many tokens are drafted."""
    inner_dim: int = key(4096, also=("speculator_width",), check=gt(0))
    """Width of the speculator's states."""
    tie_weights: bool = key(False, also=("speculator_tie_weights",))
    """Let the heads share embeddings, projections but the first, norms and output layers."""
    scale_input: bool = key(False, also=("speculator_scale_input",))
    """Normalize the base model's hidden state first; it helps where its scale is not near 1."""
    speculator_path: Path | None = key(None, convert=or_none(Path))
    """A speculator exported before, to go on from; its shape is taken from there."""
    export: Literal["ibm", "arctic"] = "ibm"
    """The format of the export: IBM's, or the same with the names that arctic-inference looks for."""
    top_k_tokens_per_head: list[int] | None = None
    """How many candidates each head may propose, for servers that draft trees; by default one less each head."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts itself."""
        yield from super().check()
        if self.lora is not None:
            yield "lora", "has no place here: the speculator is trained, and nothing else"
        if self.quantize is not None:
            yield "quantize", "has no place here: a speculator learns what the model in full precision says"
        if self.qat is not None:
            yield "qat", "has no place here: the base is not trained"
        if self.fp8:
            yield "fp8", "has no place here: the base is not trained"
        if self.tie_weights and self.n_predict == 1:
            yield "tie_weights", "needs more than one head"
        given = self.top_k_tokens_per_head
        if given is not None and len(given) != self.n_predict:
            yield "top_k_tokens_per_head", f"has {len(given)} entries for n_predict={self.n_predict}"

    def freeze_parameters(self, hf: Any) -> None:
        """Freeze the base model."""
        hf.requires_grad_(False)

    def wrap(self, hf: Any) -> "nn.Module":
        """Return base model and speculator (see network.py).

        Raises:
            RecipeError: the speculator to go on from was made for another base model.
        """
        from posttrain.blocks.models.speculator.network import MLPSpeculator, Speculating, load_speculator

        config = self.configuration_for(hf.config.get_text_config())
        if self.speculator_path is None:
            return Speculating(hf, MLPSpeculator(config))
        speculator = load_speculator(self.speculator_path)
        if problem := misfit(speculator.config, hf.config.get_text_config()):
            raise RecipeError(f"model.speculator_path: {self.speculator_path} is for another base model: {problem}")
        return Speculating(hf, speculator)

    def configuration_for(self, base: Any) -> dict[str, Any]:
        """Return the configuration of a speculator for a base model, as it is exported."""
        defaults = [self.n_predict + 1 - i for i in range(self.n_predict)]
        said = {
            "architectures": [ARCHITECTURES[self.export]],
            "model_type": "mlp_speculator",
            "base_model_name_or_path": self.name_or_path,
            "emb_dim": base.hidden_size,
            "inner_dim": self.inner_dim,
            "vocab_size": base.vocab_size,
            "n_predict": self.n_predict,
            "n_candidates": 5,
            "top_k_tokens_per_head": self.top_k_tokens_per_head or defaults,
            "tie_weights": self.tie_weights,
            "scale_input": self.scale_input,
        }
        return said | ({"base_model_archs": base.architectures or []} if self.export == "arctic" else {})
