"""Differentiable access to a decoder model: embeddings in, logits out, a gate on every head, and what layers
add.

Works on any object with the usual attributes of such models; nothing is imported to do so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature

import torch

from lab.errors import LabError
from lab.inspect.diagnostics.base import Session

_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "wo")
_MLPS = ("mlp", "feed_forward", "ffn")


class ModelProbe:
    """A model seen through its layers.

    Attributes:
        layers, heads: number of decoder layers and query heads.
        device: where inputs go.
        neutral_id: token that stands for "nothing here" when a token is masked out.

    Raises:
        LabError: when the model has no list of layers whose attention ends in an output projection.
    """

    def __init__(self, model, neutral_id: int = 0) -> None:
        self.model = model
        config = getattr(model.config, "text_config", model.config)
        self.heads = int(config.num_attention_heads)
        self.neutral_id = int(neutral_id)
        self._layers = _find_layers(model, int(config.num_hidden_layers))
        self._attention = [_child(layer, ("attn", "attention")) for layer in self._layers]
        self._outputs = [_child(a, _OUTPUTS) for a in self._attention]
        self._mlps = [_child(layer, _MLPS, needed=False) for layer in self._layers]
        self.layers = len(self._layers)
        self._few = "logits_to_keep" in signature(model.forward).parameters
        self.device = next(model.parameters()).device

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, T] ids to [B, T, D] embeddings."""
        return self.model.get_input_embeddings()(ids)

    def logits(
        self,
        embeddings: torch.Tensor,
        gates: torch.Tensor | None = None,
        last: bool = False,
        edit: tuple[int, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    ) -> torch.Tensor:
        """[B, T, V] logits; ``gates`` [L, Hq] multiplies each head's output before the output projection.

        ``last`` asks for the last position only, [B, 1, V], where the model can leave out the others. ``edit`` (layer,
        f) puts f(hidden [B, T, D]) in the place of what that layer leaves.
        """
        few = {"logits_to_keep": 1} if last and self._few else {}
        with ExitStack() as stack:
            stack.enter_context(self._plain())
            if gates is not None:
                for layer, projection in enumerate(self._outputs):
                    hook = projection.register_forward_pre_hook(_gate(gates[layer]))
                    stack.callback(hook.remove)
            if edit is not None:
                stack.callback(self._layers[edit[0]].register_forward_hook(_edited(edit[1])).remove)
            return self.model(inputs_embeds=embeddings, use_cache=False, **few).logits

    @torch.no_grad()
    def attention(self, ids: torch.Tensor, first: int = 0) -> torch.Tensor:
        """float32 [L, Hq, T - first, T] weights of one sequence [T] from row ``first`` on; for short runs only."""
        found: list[torch.Tensor | None] = [None] * self.layers
        with ExitStack() as stack:
            stack.enter_context(self._plain())
            for layer, module in enumerate(self._attention):
                stack.callback(module.register_forward_hook(_weights(found, layer, first)).remove)
            self.model(input_ids=ids[None], use_cache=False)
        if any(w is None for w in found):
            raise LabError(
                f"{type(self.model).__name__} does not hand out its attention weights",
                "Diagnostics of short texts need an ordinary decoder",
                "Use a diagnostic of captures instead",
            )
        return torch.stack(found)

    @torch.no_grad()
    def states(self, embeddings: torch.Tensor, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
        """L+1 hidden states [B, T, D] of embeddings; ``mask`` bool [B, T] hides tokens from all others where
        False."""
        with self._plain():
            out = self.model(
                inputs_embeds=embeddings, attention_mask=mask, use_cache=False, output_hidden_states=True
            )
        return list(out.hidden_states)

    @torch.no_grad()
    def session(self, ids: Sequence[int], **fields) -> Session:
        """A Session of one run filled with all this model can say about it; ``fields`` are passed on, such
        as captures."""
        batch = torch.as_tensor(list(ids), device=self.device)[None]
        attention, mlp = [None] * self.layers, [None] * self.layers
        with ExitStack() as stack:
            stack.enter_context(self._plain())
            for store, modules in ((attention, self._attention), (mlp, self._mlps)):
                for layer, module in enumerate(modules):
                    if module is not None:
                        stack.callback(module.register_forward_hook(_keep(store, layer)).remove)
            out = self.model(input_ids=batch, use_cache=True, output_hidden_states=True)
        scores = torch.log_softmax(out.logits[0, :-1].float(), -1).gather(1, batch[0, 1:, None])[:, 0]
        values = [layer.values[0] for layer in getattr(out.past_key_values, "layers", ())]
        return Session(
            token_ids=list(ids),
            probe=self,
            hidden=[h[0] for h in out.hidden_states],
            values=values or None,
            attention_out=attention,
            mlp_out=None if None in [type(m) and m for m in mlp] else mlp,
            embedding=self.model.get_input_embeddings().weight,
            logprobs=[float("nan"), *scores.tolist()],
            **fields,
        )

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """The model's own attention for the time of a call, whatever the lab attached; restored
        afterwards."""
        config = self.model.config
        before = getattr(config, "_attn_implementation", None)
        if before in (None, "eager") or not hasattr(self.model, "set_attn_implementation"):
            yield
            return
        self.model.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)


def _gate(gates: torch.Tensor):
    def hook(module, args):
        x = args[0]
        heads = gates.to(x.dtype).repeat_interleave(x.shape[-1] // gates.shape[0])
        return (x * heads, *args[1:])

    return hook


def _edited(change: Callable[[torch.Tensor], torch.Tensor]):
    def hook(module, args, out):
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    return hook


def _weights(store: list, layer: int, first: int):
    """Keeps a layer's weights of the first sequence and lets go of the rest, so that one layer's matrix lives at a time."""

    def hook(module, args, out):
        if isinstance(out, tuple) and len(out) > 1 and out[1] is not None:
            store[layer] = out[1][0, :, first:].float().detach().clone()

    return hook


def _keep(store: list, layer: int):
    def hook(module, args, out):
        store[layer] = (out[0] if isinstance(out, tuple) else out)[0].detach()

    return hook


def _find_layers(model, count: int) -> torch.nn.ModuleList:
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            if _child(module[0], ("attn", "attention"), needed=False) is not None:
                return module
    raise LabError(
        f"{type(model).__name__} has no list of {count} attention layers that can be probed",
        "Diagnostics that intervene need an ordinary decoder",
        "Use one of the diagnostics of captures instead",
    )


def _child(module, names: Sequence[str], needed: bool = True):
    for name, child in module.named_children():
        if any(n in name and "norm" not in name for n in names):
            return child
    if needed:
        raise LabError(
            f"{type(module).__name__} has no part called {' or '.join(names)}",
            "Diagnostics that intervene need an ordinary decoder",
            "Use a diagnostic of captures instead",
        )
    return None
