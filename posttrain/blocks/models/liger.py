"""Liger's Triton kernels in a transformers model."""

from typing import Any

from posttrain.errors import RecipeError


def use_liger(hf: Any) -> None:
    """Patch a transformers model to use Liger's kernels, but for the loss, which is ours.

    Raises:
        RecipeError: they are not installed, do not run here, or do not know the model.
    """
    import torch

    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise RecipeError(f"model.liger needs Triton and Liger: pip install 'posttrain[liger]' ({error})") from None
    if not torch.cuda.is_available():
        raise RecipeError("model.liger: these kernels run on GPUs, and there is none")
    kind = hf.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = ", ".join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))
        raise RecipeError(f"model.liger: Liger does not know models of type {kind!r} (known: {known})")
    MODEL_TYPE_TO_APPLY_LIGER_FN[kind](model=hf, cross_entropy=False, fused_linear_cross_entropy=False)
