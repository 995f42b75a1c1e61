"""Scorer of AutoSelect, trained by noising tokens with low scores (arXiv 2603.07135, text form).

A per-token denoiser helps while training and is dropped afterwards; the model's own weights stay as they are."""

from __future__ import annotations

import torch

from lab.engine.depth import decoder_layers
from lab.engine.cache import LabCache
from lab.measure.fitting.common import frozen
from lab.measure.fitting.prompts import passkey
from lab.techniques.autoselect import noised, retain, scorer

GRADIENTS = True


def fit(
    technique, model, tokenizer, progress, *, steps: int = 60, length: int = 128, width: int = 64, rate: float = 2e-3
) -> dict[str, torch.Tensor]:
    """{"in_weight": [64, D], "in_bias": [64], "out_weight": [1, 64], "out_bias": [1], "loss": [steps]}."""
    config = model.config.get_text_config(decoder=True)
    D, layer = config.hidden_size, technique.depth(config.num_hidden_layers)
    generator = torch.Generator().manual_seed(0)
    w = {"in_weight": torch.randn(width, D, generator=generator) * D**-0.5, "in_bias": torch.zeros(width),
         "out_weight": torch.randn(1, width, generator=generator) * width**-0.5, "out_bias": torch.zeros(1)}
    down, up = (torch.randn(a, b, generator=generator) * b**-0.5 for a, b in ((width, D), (D, width)))
    g = torch.zeros(D)
    device = model.get_input_embeddings().weight.device
    w = {n: t.to(device) for n, t in w.items()}
    learnt = [*w.values(), *(helpers := [t.to(device) for t in (down, up, g)])]
    losses = torch.zeros(steps)
    with frozen(model):
        for t in learnt:
            t.requires_grad_()
        adam = torch.optim.AdamW(learnt, lr=rate)
        for step in range(steps):
            task = passkey(model, tokenizer, length, seed=2000 + step)
            temperature = 1.0 - 0.9 * step / max(1, steps - 1)

            def enter(module, args, kwargs):
                x = args[0] if args else kwargs["hidden_states"]
                total = technique.rate * x.shape[1]
                r = retain(scorer(x.float(), w), total, temperature).clamp(1e-4, 1 - 1e-4)  # square roots need a slope
                noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(step)).to(x)
                bad = noised(x, r.to(x), noise)
                bad = bad + helpers[2] * (torch.nn.functional.silu(bad @ helpers[0].mT) @ helpers[1].mT)
                return ((bad, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": bad})

            hook = decoder_layers(model)[layer].register_forward_pre_hook(enter, with_kwargs=True)
            try:
                adam.zero_grad()
                logits = model(input_ids=task.ids.view(1, -1), past_key_values=LabCache(model), use_cache=True).logits.float()
                lost = torch.nn.functional.cross_entropy(logits[0, task.answer - 1 : -1], task.ids[task.answer :])
                lost.backward()
                adam.step()
            finally:
                hook.remove()
            losses[step] = float(lost.detach())
            progress((step + 1) / steps, "Training the scorer with noise")
    return {**{n: t.detach().cpu() for n, t in w.items()}, "loss": losses}
