"""Do sinks keep tokens apart? How far a change of one early token spreads, with and without token 0 in sight."""

from __future__ import annotations

import numpy as np
import torch

from lab.errors import LabError
from lab.inspect.diagnostics.base import Arrays, Figure, Input, Number, Paper, Session, diagnostic
from lab.inspect.diagnostics.probe import ModelProbe
from lab.inspect.scores import Progress

TOKENS = 256


@torch.no_grad()
def spread(probe: ModelProbe, ids: torch.Tensor, token: int, see_first: bool = True) -> np.ndarray:
    """float32 [L + 1, T] ||change|| / ||state|| of each hidden state when ``token`` becomes the neutral
    token.

    ``see_first`` False hides token 0 from all others in both runs.
    """
    x = probe.embed(ids[None])
    changed = x.clone()
    changed[0, token] = probe.embed(torch.tensor([[probe.neutral_id]], device=ids.device))[0, 0]
    mask = torch.ones(1, len(ids), dtype=torch.bool, device=ids.device)
    mask[0, 0] = see_first
    plain, other = probe.states(x, mask), probe.states(changed, mask)
    out = [
        ((b - a).float().norm(dim=-1) / a.float().norm(dim=-1).clamp(min=1e-30))[0]
        for a, b in zip(plain, other)
    ]
    return torch.stack(out).cpu().numpy()


@diagnostic(
    name="mixing",
    title="Sinks against over-mixing",
    paper=Paper("Why do LLMs attend to the first token?", "2504.02732", 2025),
    needs=("probe", "token_ids"),
    help="Every layer of attention averages tokens, and deep models could average them into one. A "
    "sink is a way to do nothing: weight parked on token 0 mixes nothing in. Change one "
    "early token and see how far the change travels with token 0 visible and hidden.",
    explanation="If the line without token 0 lies higher, the sink was holding the change back. Hiding "
    "token 0 also takes the model off the data it was trained on, so part of the difference "
    "is plain damage.",
    figures=(
        Figure(
            "lines",
            "lines",
            ("token 0", "state"),
            "Mean relative change of later tokens",
            "size of the change over the state's",
            {"token 0": ("token 0 visible", "token 0 hidden")},
        ),
        Figure("visible", "matrix", ("state", "token"), "Relative change with token 0 visible", "change over the state's size"),
        Figure("hidden", "matrix", ("state", "token"), "Relative change with token 0 hidden", "change over the state's size"),
    ),
    numbers=(Number("token", "token {} was changed"),),
    before=f"Feeds the first {TOKENS} tokens four times; where nothing changed the maps are blank.",
    inputs=(Input("token", "number", "token that is changed", "One of the first 256; empty: token 8.", low=1, high=254),),
)
def compute(session: Session, progress: Progress) -> Arrays:
    """``options["token"]`` is the changed token, on the first ``TOKENS`` tokens.

    The default is token 8: the second token would become the sink itself once the first is hidden.
    """
    ids = torch.as_tensor(list(session.token_ids)[:TOKENS], device=session.probe.device)
    token = int(session.options.get("token", min(8, len(ids) - 2)))
    if not 1 <= token < len(ids) - 1:
        raise LabError(f"Token {token} cannot be changed", f"Choose one from 1 to {len(ids) - 2}")
    visible = spread(session.probe, ids, token)
    progress(0.5)
    hidden = spread(session.probe, ids, token, see_first=False)
    progress(1.0)
    later = [m[:, token + 1 :].mean(1) for m in (visible, hidden)]
    return {"lines": np.stack(later), "visible": visible, "hidden": hidden, "token": np.array(token)}
