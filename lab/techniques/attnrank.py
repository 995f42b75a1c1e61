"""AttnRank: put the best document where the model looks most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lab.engine.slots import Paper, Technique, param
from lab.errors import LabError
from lab.techniques.zerotuning import span


@dataclass(frozen=True)
class AttnRank(Technique):
    """Reorder exchangeable documents of a prompt to fit the model's positional preference (arXiv 2508.05128)."""

    name: ClassVar[str] = "attnrank"
    title: ClassVar[str] = "AttnRank"
    paper: ClassVar[Paper] = Paper(
        "Attention Basin: Why Contextual Position Matters in Large Language Models", "2508.05128", 2025
    )
    slots: ClassVar[tuple[str, ...]] = ("trim", "calibrate")
    help: ClassVar[str] = (
        "Models look more at the first and last of several documents than at those between. A profile of this habit says "
        "which place gets the most attention; the document closest to the question goes there, the next one to the second "
        "best place, and so on. Only for documents whose order does not matter: never for code or dialogue."
    )
    saves: ClassVar[str] = "nothing"
    does_not_save: ClassVar[str] = (
        "It changes the order of the prompt and nothing else; token positions shown are those before "
        "reordering."
    )
    enters: ClassVar[bool] = True

    documents: str = param(
        "none", "Token positions of the documents, one after another, such as 10-59;60-99;100-180; the rest is the question."
    )
    profile: str = param(
        "learnt", "Attention by place: learnt from this model, or a basin (ends first) as an assumption.",
        choices=("learnt", "basin")
    )
    calibration: str = param("auto", "Calibration file; auto uses the one shipped for this model.")

    def validate(self) -> None:
        spans = self.spans()
        if any(b[0] != a[1] + 1 for a, b in zip(spans, spans[1:])):
            raise LabError(f'attnrank: documents="{self.documents}" leave gaps or overlap',
                           "Each starts right after the one before")

    @property
    def learns(self) -> bool:
        return self.profile == "learnt" and self.documents != "none"

    def spans(self) -> list[tuple[int, int]]:
        """(first, last) position of each document."""
        if self.documents == "none":
            return []
        return [span(self.name, "documents", part, "-") for part in self.documents.split(";") if part.strip()]

    def enter(self, policy: Any, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Reorder the embeddings of the prompt; positions then follow the new order."""
        spans = self.spans()
        if layer or len(spans) < 2 or hidden.shape[1] <= spans[-1][1] or policy.stores[0].seen:
            return hidden
        order = self.order(hidden[0].float(), spans, self._preference(policy, len(spans)))
        return hidden[:, torch.tensor(order, device=hidden.device)]

    def order(self, embedded: torch.Tensor, spans: list[tuple[int, int]], preference: torch.Tensor) -> list[int]:
        """A permutation of all rows of embedded [T, D]: documents placed by likeness to the rest of the prompt."""
        outside = torch.ones(len(embedded), dtype=torch.bool)
        for first, last in spans:
            outside[first : last + 1] = False
        centred = embedded - embedded.mean(0)
        question = centred[outside].mean(0) if bool(outside.any()) else centred[-1]
        likeness = [float(torch.cosine_similarity(centred[a : b + 1].mean(0), question, dim=0)) for a, b in spans]
        rows = list(range(spans[0][0]))
        for document in reorder(torch.tensor(likeness), preference):
            rows += range(spans[document][0], spans[document][1] + 1)
        return rows + list(range(spans[-1][1] + 1, len(embedded)))

    def _preference(self, policy: Any, count: int) -> torch.Tensor:
        if self.profile == "learnt":
            learnt = policy.shared[f"learnt/{self.name}"]
            if f"profile_{count}" in learnt:
                return learnt[f"profile_{count}"]
            near = min((n for n in learnt), key=lambda n: abs(int(n.split("_")[1]) - count))
            return torch.nn.functional.interpolate(
                learnt[near].view(1, 1, -1), size=count, mode="linear", align_corners=True
            ).flatten()
        places = torch.arange(count).float()
        return (places - (count - 1) / 2).abs() + 0.01 * places  # the end slightly before the start


def reorder(likeness: torch.Tensor, preference: torch.Tensor) -> list[int]:
    """Documents by place: the likeliest document stands in the place with the largest preference, and so on."""
    places = preference.argsort(descending=True, stable=True)
    documents = likeness.argsort(descending=True, stable=True)
    out = [0] * len(likeness)
    for place, document in zip(places.tolist(), documents.tolist()):
        out[place] = document
    return out
