"""The output projection of a layer's attention, whatever the architecture calls it and however its weights are packed."""

from __future__ import annotations

import torch

from lab.errors import LabError

_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")


def output_weight(model: torch.nn.Module, layer: int) -> torch.Tensor:
    """float32 [Hq*d, D] such that a row of concatenated head outputs times it is the attention's output, bias apart.

    Raises LabError where no such projection is found.
    """
    for module in model.modules():
        if getattr(module, "layer_idx", None) != layer:
            continue
        for name in _NAMES:
            projection = getattr(module, name, None)
            if isinstance(projection, torch.nn.Module):
                return _matrix(model, projection)
    raise LabError(
        f"The output projection of layer {layer} of {type(model).__name__} was not found",
        f"Attention modules name it {', '.join(_NAMES)}", "Switch the option off that measures values after it",
    )


def _matrix(model: torch.nn.Module, projection: torch.nn.Module) -> torch.Tensor:
    weight = getattr(projection, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.is_floating_point():
        return weight.float() if type(projection).__name__ == "Conv1D" else weight.float().mT
    size = getattr(projection, "in_features")  # packed weights: ask the projection itself
    like = model.get_input_embeddings().weight
    eye = torch.eye(size, device=like.device, dtype=like.dtype)
    return (projection(eye) - projection(eye[:1] * 0)).float()
