"""From a model block to the network that a run trains, step by step: the order of the steps matters."""

from typing import TYPE_CHECKING, Any

import attrs

from posttrain.blocks.models.activations import Compiled, checkpoint_activations, layers_of, tile_mlps
from posttrain.blocks.models.documents.probe import confirm
from posttrain.blocks.models.experts.load import Load, mixtures
from posttrain.blocks.models.experts.precision import use_grouped_experts
from posttrain.blocks.models.experts.router import router_weight, z_weight
from posttrain.blocks.models.liger import use_liger
from posttrain.blocks.models.quantized.fp8 import FP8
from posttrain.blocks.models.quantized.quantize import prepare
from posttrain.blocks.models.vision.parts import freeze_parts, linears
from posttrain.errors import RecipeError

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from torch import nn

    from posttrain.blocks.models.model import HFModel


def assemble(block: "HFModel", empty: bool, fabric: "Fabric | None") -> "nn.Module":
    """Return the network of a block, with weights unless it is to be empty.

    Raises:
        RecipeError: the model cannot be loaded, or an option does not fit it.
    """
    hf = block.load(empty)
    use_grouped_experts(hf)
    found = mixtures(hf)  # before anything is frozen
    load = Load(found, block.router_bias_rate) if found or block.router_bias_rate else None
    way = block.way(hf)
    sight = block.sight(hf, way)
    freeze_parts(hf, block.train, sight if isinstance(sight, str) else None)
    hf = with_adapters(block, hf, fabric)
    block.freeze_parameters(hf)
    save_memory(block, hf)
    network: Any = block.wrap(hf)
    network.keep_apart(way)
    network.sight, network.blind = (None, sight) if isinstance(sight, str) else (sight, "")
    if not way.proven and not empty:
        confirm(network, block.name_or_path)
    network.offload = block.offload_activations
    network.router_weight = router_weight(hf, block.router_aux_loss)
    network.router_z_weight = z_weight(hf, block.router_z_loss)
    if (network.router_weight or network.router_z_weight) and way.unfolds:
        raise RecipeError("model: this model has no packed rows, and its routers are not read: no router loss")
    network.load = load
    if block.router_bias_rate and (not found or way.unfolds):
        raise RecipeError("model.router_bias_rate: the experts of this model, if it has any, cannot be watched")
    network.saved_as = block.saved_as()
    if block.quantize is not None:
        network.quantized = {"quantize": block.quantize, "double_quantization": block.doubly}
    elif block.qat is not None:
        network.quantized = {"qat": attrs.asdict(block.qat)}
    return network  # type: ignore[no-any-return]


def with_adapters(block: "HFModel", hf: Any, fabric: "Fabric | None") -> Any:
    """Return the model with other layers in place of its own: kernels, bytes, rounded numbers, and adapters last.

    Raises:
        RecipeError: the model has been quantized before, or much of its layers cannot be.
    """
    if block.liger:
        use_liger(hf)
    if block.quantize is not None:
        if getattr(hf.config, "quantization_config", None):
            raise RecipeError(f"model.quantize: {block.name_or_path} is quantized already; name what it was made of")
        remade = not block.activation_checkpointing
        prepare(hf, block.quantize, block.doubly, dtype=block.dtype, fabric=fabric, remade=remade)
    if block.qat is not None:
        block.qat.prepare(hf)
    if isinstance(block.fp8, FP8):
        block.fp8.prepare(hf)
    return hf if block.lora is None else block.lora.apply(hf, block.task, linears(hf, block.train))


def save_memory(block: "HFModel", hf: Any) -> None:
    """Let layers compute in tiles, compiled, and again in the backward pass, as the block says."""
    if block.tiled_mlp:
        tile_mlps(hf, block.tiled_mlp)
    if block.compile:  # before checkpointing, inside of which torch compiles nothing by itself
        for layer in layers_of(hf):
            layer.forward = Compiled(layer.forward, "inductor" if block.compile is True else block.compile)
    if block.activation_checkpointing:
        checkpoint_activations(hf, selective=block.activation_checkpointing == "selective")
