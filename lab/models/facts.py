"""What a model is, as plain values that a record can keep."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_NO_LIMIT = 1 << 20
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a loaded model.

    Attributes:
        id: hub id, or the folder's or file's name. source: what the user asked for. revision: which version of it.
        architecture: the transformers class. parameters: distinct weights, tied ones once.
        layers, heads, kv_heads, head_dim: decoder layers, query heads, KV heads, channels per head.
        context: most positions the model was made for. vocab: rows of the output.
        dtype: of activations and cache. weights: how linear weights are held. device: e.g. "cpu", "cuda:0".
        sliding_window: entries a windowed layer sees, None where no layer is windowed.
        layer_types: per layer, "full_attention", "sliding_attention" or another transformers name.
        kv_bytes_per_token: bytes that one more token adds to the cache of a dense run, in the cache's dtype, all
            attention layers counted as full ones.
        weights_kl: measured mean KL(float32 || these weights) in nats per token, None where it was not measured.
    """

    id: str
    source: str
    revision: str
    architecture: str
    parameters: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    vocab: int
    dtype: str
    weights: str
    device: str
    sliding_window: int | None
    layer_types: tuple[str, ...]
    kv_bytes_per_token: int
    weights_kl: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON-able values."""
        return {**asdict(self), "layer_types": list(self.layer_types)}


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of ``config`` that describes the text decoder."""
    return config.get_text_config(decoder=True)


def head_dim(config: PreTrainedConfig) -> int:
    """Channels per head of a text config, also where it is only implied."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def layer_types(config: PreTrainedConfig) -> tuple[str, ...]:
    """transformers' layer types of a text config; where it lists none, every layer is windowed or none is."""
    given = getattr(config, "layer_types", None)
    if given:
        return tuple(given)
    kind = "sliding_attention" if window(config) else "full_attention"
    return (kind,) * config.num_hidden_layers


def window(config: PreTrainedConfig) -> int | None:
    """Entries a sliding layer of a text config sees, or None where no layer slides."""
    size = getattr(config, "sliding_window", None)
    given = getattr(config, "layer_types", None)
    slides = "sliding_attention" in given if given else getattr(config, "use_sliding_window", True)
    return int(size) if size and slides else None


def kv_bytes_per_token(config: PreTrainedConfig, dtype: str) -> int:
    """Bytes one token adds to a dense cache: keys and values of every attention layer, in ``dtype``."""
    attending = sum(kind.endswith("attention") and kind != "linear_attention" for kind in layer_types(config))
    return 2 * attending * _kv_heads(config) * head_dim(config) * _BYTES[dtype]


def describe(
    model: PreTrainedModel, parameters: int, *, id: str, source: str, revision: str, dtype: str, weights: str,
    weights_kl: float | None,
) -> ModelFacts:
    """The facts of a loaded model; ``parameters`` is counted before packing changes what modules hold."""
    config = text_config(model.config)
    embedding = model.get_input_embeddings().weight
    return ModelFacts(
        id=id, source=source, revision=revision, architecture=type(model).__name__, parameters=parameters,
        layers=config.num_hidden_layers, heads=config.num_attention_heads, kv_heads=_kv_heads(config),
        head_dim=head_dim(config), context=int(getattr(config, "max_position_embeddings", None) or _NO_LIMIT),
        vocab=config.vocab_size, dtype=dtype, weights=weights, device=str(embedding.device),
        sliding_window=window(config), layer_types=layer_types(config),
        kv_bytes_per_token=kv_bytes_per_token(config, dtype), weights_kl=weights_kl,
    )


def _kv_heads(config: PreTrainedConfig) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
