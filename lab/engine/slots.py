"""What a technique is: a frozen dataclass that names its paper and fills slots of the one pipeline.

The engine calls a slot's method only on techniques that list the slot in `slots`; an absent slot is the identity.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lab.errors import LabError

if TYPE_CHECKING:
    from lab.engine.context import LayerContext
    from lab.engine.reads import Paging, Pick, Place, Rows, Weighed
    from lab.engine.segments import Codec

PIPELINE = (
    "trim", "select", "edit", "weigh", "combine", "route",
    "observe", "score", "allocate", "reduce", "encode", "calibrate",
)
EXCLUSIVE = frozenset({"trim", "weigh", "combine", "score", "allocate", "reduce", "encode"})
SLOT_HELP = {
    "trim": "which prompt tokens go on to deeper layers",
    "select": "which stored entries a query may read",
    "edit": "how logits are changed before the softmax",
    "weigh": "how logits become weights",
    "combine": "how partial results become one output",
    "route": "which head takes part, and how much",
    "observe": "what is measured while attending",
    "score": "how important each stored entry is",
    "allocate": "how many entries or bits each layer and head may keep",
    "reduce": "what happens to an entry that must go",
    "encode": "how many bits hold a key or a value, and how",
    "calibrate": "what is learnt from sample text first",
}


@dataclass(frozen=True)
class Paper:
    """Where a technique comes from. arxiv is the identifier, or the venue where there is none."""

    title: str
    arxiv: str
    year: int

    @property
    def url(self) -> str | None:
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv[:4].isdigit() else None


@dataclass(frozen=True)
class Parameter:
    """One declared parameter of a technique, as every face of the lab shows it."""

    name: str
    type: str
    default: Any
    help: str
    min: float | None = None
    max: float | None = None
    choices: tuple[Any, ...] | None = None
    unit: str | None = None

    def check(self, owner: str, value: Any) -> Any:
        """The value in the parameter's type, or a LabError that says what was expected."""
        try:
            value = _convert(self.type, value)
        except (TypeError, ValueError):
            raise LabError(f"{owner}: {self.name}={value!r} is not {_article(self.type)}.", self.expected) from None
        if self.choices is not None and value not in self.choices:
            raise LabError(f"{owner}: {self.name}={value} is not offered.", self.expected)
        low, high = self.min, self.max
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if value != value or (low is not None and value < low) or (high is not None and value > high):
                raise LabError(f"{owner}: {self.name}={value} is out of range.", self.expected)
        return value

    @property
    def expected(self) -> str:
        if self.choices is not None:
            return f"{self.name} is one of {', '.join(map(str, self.choices))}"
        bounds = [f"{word} {x:,.0f}" if abs(x) >= 1000 else f"{word} {x:g}" for word, x in (("from", self.min), ("to", self.max))
                  if x is not None]
        span = " ".join(bounds)
        return f"{self.name} is {_article(self.type)}{' ' + span if span else ''}{' ' + self.unit if self.unit else ''}"


def param(
    default: Any, help: str, *, min: float | None = None, max: float | None = None,
    choices: tuple[Any, ...] | None = None, unit: str | None = None,
) -> Any:
    """Declare a technique's parameter: a dataclass field whose range, unit and help every face shows."""
    return field(default=default, metadata={"help": help, "min": min, "max": max, "choices": choices, "unit": unit})


BUDGET_HELP = (
    "How much of the prompt each layer may keep: a fraction below 1, or a number of entries above 1; 1 keeps everything. "
    "Entries that are always kept count against it."
)


@dataclass(frozen=True)
class Band:
    """Row i reads key j if j < sinks or i - j < window."""

    sinks: int
    window: int


@dataclass(frozen=True)
class ColumnBias:
    """Add bias[h] to the logit of the key at absolute position `position`, for each query head. bias [Hq] float32."""

    position: int
    bias: torch.Tensor


@dataclass(frozen=True)
class EntryBias:
    """Add bias float32 [B,Hk,N] to the logits of the stored entries, in storage order."""

    bias: torch.Tensor


@dataclass(frozen=True)
class Forward:
    """One forward of the model under a cache, once every layer has attended.

    ids int64 [B,T] or None; hidden [B,T,D] are the last hidden states; contexts, one per layer of the cache; complete,
    whether the prompt ended here (its entries are all still exact: compression follows).
    """

    model: Any
    ids: torch.Tensor | None
    hidden: torch.Tensor
    contexts: list["LayerContext"]
    complete: bool


@dataclass(frozen=True)
class Shift:
    """Read the stored keys before position `before` as if they stood `delta` (an int, or int64 [B,Hk]) positions later
    (re-rotation, rule R1)."""

    before: int
    delta: int | torch.Tensor


@dataclass(frozen=True)
class Trailing:
    """The stored keys before position `before` always read as if they stood right before the rest: a Shift whose delta grows
    by one with every entry that leaves between them."""

    before: int


@dataclass(frozen=True)
class Technique:
    """Base of every technique. Subclasses are frozen dataclasses; their fields are their parameters."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[Paper]
    slots: ClassVar[tuple[str, ...]]
    help: ClassVar[str]
    saves: ClassVar[str] = "memory"
    does_not_save: ClassVar[str] = ""
    # what the engine should observe: "mass" (a running sum), "now" and "last" (the newest row, per entry or per head), "queries"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for p in self.parameters():
            object.__setattr__(self, p.name, p.check(self.name, getattr(self, p.name)))
        self.validate()

    def validate(self) -> None:
        """Raise LabError where parameters contradict each other."""

    @classmethod
    def parameters(cls) -> list[Parameter]:
        """The declared parameters, in order."""
        return [
            Parameter(f.name, _type_name(f.type), f.default, **f.metadata)
            for f in dataclasses.fields(cls)
            if f.metadata
        ]

    @property
    def spec(self) -> str:
        """Canonical text, parameters that differ from their default only: "h2o(budget=0.25)"."""
        changed = [(p.name, getattr(self, p.name)) for p in self.parameters() if getattr(self, p.name) != p.default]
        inside = ",".join(f"{k}={_text(v)}" for k, v in changed)
        return f"{self.name}({inside})" if inside else self.name

    @property
    def label(self) -> str:
        """A short name for a pipeline strip or a column."""
        return self.title

    @property
    def observation_window(self) -> int:
        """Last prompt rows whose attention the technique looks at (win(w) of the sheets); 0 for none."""
        return 0

    # -- slots: what the engine may call ------------------------------------------------------------------------
    select_phases: ClassVar[tuple[str, ...]] = ("prefill",)  # when `select` is asked: "prefill", "decode"

    def select(self, ctx: "LayerContext") -> "Band | Pick | Rows | None":
        """Which stored entries this call's rows read: a Band, Rows for a prompt, a Pick for a decode row; None for all.
        Several techniques' answers intersect."""
        return None

    @property
    def pages_in_place(self) -> bool:
        """Whether decode rows choose what they read as `paging` says, and in no other way."""
        return False

    def paging(self, layer: int) -> "Paging | None":
        """`select`: what decode rows of layer `layer` choose among, for steps in place; None where they read everything."""
        return None

    def weighs(self, ctx: "LayerContext") -> bool:
        """Whether `weigh` replaces the softmax in this layer and phase."""
        return True

    def weigh(self, ctx: "LayerContext", s: torch.Tensor, place: "Place") -> "Weighed":
        """Turn logits s float32 [B, Hk, G, R, n] (-inf where hidden) into weights."""
        raise LabError(f"{self.name} does not weigh.")

    def edit(self, ctx: "LayerContext") -> list[ColumnBias | EntryBias | Shift]:
        """Changes to this step's logits."""
        return []

    def standing_edit(self, ctx: "LayerContext") -> list[ColumnBias | Trailing] | None:
        """What `edit` amounts to in every decode step from here on, for steps in place (lab.engine.steady); None where it
        depends on the step."""
        return None if "edit" in self.slots else []

    enters: ClassVar[bool] = False  # `enter` is called with the hidden states before each layer

    def enter(self, policy: Any, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [B,T,D] that layer `layer` reads instead."""
        return hidden

    def depth(self, layers: int) -> int:
        """`trim`: the first layer that sees only chosen prompt tokens."""
        return layers

    def trim(self, policy: Any, hidden: torch.Tensor) -> torch.Tensor | None:
        """Rows int64 [T'] of this prompt, ascending, that go on to layer `depth` and above; None for all. hidden [B,T,D]."""
        return None

    def planned_rows(self, prompt: int, layer: int, layers: int) -> int:
        """`trim`: prompt tokens that layer `layer` will see."""
        return prompt

    moves: ClassVar[bool] = False  # an `edit` technique that changes queries and keys before they are stored

    def move(
        self, ctx: "LayerContext", q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [B,Hq,T,d], keys and values [B,Hk,T,d] to use instead, called before they are stored. Fewer KV heads may
        come back than went in."""
        return q, k, v

    def settle(self, ctx: "LayerContext", out: torch.Tensor) -> torch.Tensor:
        """Undo what `move` did to the order of the query heads: outputs [B,Hq,T,d] of this step, before routing."""
        return out

    def planned_heads(self, kv_heads: int) -> int:
        """KV heads that will be stored."""
        return kv_heads

    combine_phases: ClassVar[tuple[str, ...]] = ("prefill",)  # when `combine` is asked, where something was left out

    def combine(self, ctx: "LayerContext", out: torch.Tensor, exact: Any) -> torch.Tensor:
        """Correct out [B,Hq,T,d] of a sparse read; exact(rows int64 [R]) gives dense outputs [B,Hq,R,d]."""
        return out

    def route(self, ctx: "LayerContext") -> torch.Tensor | None:
        """Gate on head outputs, broadcastable to [B,Hq,T,1]; None for all open."""
        return None

    def replace(self, ctx: "LayerContext") -> torch.Tensor | None:
        """An output [B,Hq,T,d] to use instead of attending, which then reads nothing; None to attend."""
        return None

    def remember(self, ctx: "LayerContext", out: torch.Tensor) -> None:
        """See this step's output [B,Hq,T,d] after routing."""

    def score(self, ctx: "LayerContext") -> torch.Tensor:
        """Importance of every stored entry, float32 [B,Hk,N]; higher stays longer."""
        raise LabError(f"{self.name} does not score entries.")

    def protected(self, entries: int, prompt: int) -> tuple[int, int]:
        """(first positions, last positions) that always stay, out of `entries` kept of a prompt of `prompt` tokens."""
        return 0, 0

    def budget_entries(self, prompt: int) -> int | None:
        """Entries per layer and KV head after a prompt of `prompt` tokens; None where the technique sets none."""
        budget = getattr(self, "budget", None)
        return None if budget is None else resolve_budget(self.name, budget, prompt)

    evicts_in_decode: ClassVar[bool] = False
    # for steps in place: `score` in decode reads nothing but running statistics, `ctx.now`, positions and `ctx.newest`, and sizes
    # nothing on the host; oldest_leaves says more: the lowest score is always the lowest unprotected position; lightest_leaves:
    # it is always the smallest running sum of attention
    scores_in_place: ClassVar[bool] = False
    oldest_leaves: ClassVar[bool] = False

    @property
    def lightest_leaves(self) -> bool:
        return False
    fixed_gate: ClassVar[bool] = False  # `route` gives the same gate at every step and keeps it in ctx.shared[(name, layer)]

    def allocate(self, ctx: "LayerContext", total: int, scores: torch.Tensor | None) -> int | torch.Tensor:
        """Entries of this layer: one number, or int64 [B,Hk] per head, out of a mean budget of `total`."""
        return total

    def default_scorer(self) -> "Technique":
        """The score an `allocate` technique ranks by when the stack names none."""
        raise LabError(f"{self.name} needs a technique that scores entries")

    whole_cache: ClassVar[bool] = False  # compression of the prompt waits until every layer has read it
    watches: ClassVar[bool] = False  # `watch` is called after each forward
    sets_tiers: ClassVar[bool] = False  # an `allocate` technique that gives bits to single entries, by `tiers`

    def watch(self, step: Forward) -> None:
        """Look at a finished forward. Keep what must survive in each layer's `state`, where forks and samples follow."""

    def forget(self, ctx: "LayerContext") -> None:
        """Drop from the layer's state what was only needed until its prompt was compressed."""

    @property
    def prompt_block(self) -> int:
        """Rows after which a long prompt is already compressed while it is read; 0 waits for its end."""
        return 0

    def default_allocator(self) -> "Technique | None":
        """The budget a `score` technique brings along when the stack names none."""
        return None

    def default_encoder(self) -> "Technique | None":
        """The code of the narrower tiers of a `sets_tiers` technique when the stack names none."""
        return None

    def leave(self, ctx: "LayerContext", entries: int, budget: int) -> int:
        """Entries to leave when a decode step finds `entries`, more than `budget`; fewer than `budget` evicts in bursts."""
        return budget

    def widths(self, encoder: "Technique") -> tuple[int, ...]:
        """Widths below 16 that `tiers` may ask `encoder` for."""
        return ()

    def tiers(
        self, ctx: "LayerContext", scores: torch.Tensor | None, keep: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Bits every entry should have, int [B,Hk,N]; entries never widen, so more than they have changes nothing.

        Called whenever entries were scored (keep bool [B,Hk,N] are those that stay) and after each other decode step
        (scores and keep None). None leaves everything as it is.
        """
        return None

    def planned_codes(self, entries: int, head_dim: int, element: int, encoder: "Technique") -> int:
        """Predicted bytes of `entries` keys and values of one KV head under `tiers`; as if all stayed exact by default."""
        return 2 * entries * head_dim * element

    def at(self, bits: int) -> "Technique":
        """This `encode` technique at another width, for policies that hold several.

        Raises LabError naming the widths it has.
        """
        known = next((p.choices for p in self.parameters() if p.name == "bits"), None)
        if known is None or bits not in known:
            offer = f"{self.title} has {', '.join(map(str, sorted(known)))} bits" if known else f"{self.title} has one width"
            raise LabError(f"{self.title} cannot hold entries at {bits} bits", offer, "Use integer codes or KIVI with it")
        return dataclasses.replace(self, bits=bits)

    version: ClassVar[int] = 1  # of what is learnt beforehand: files of another version are refused

    @property
    def learns(self) -> bool:
        """Needs a calibration file (lab.engine.learnt); its tensors are then `ctx.learnt(self)`."""
        return False

    calibration_sequences: ClassVar[int] = 0  # pieces of sample text whose keys and values `fit` wants to see

    def fit(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """`calibrate`: freeze parameters from sample text. keys (before rotation) and values float32 [Hk,M,d].

        The result is `ctx.calibrated` of that layer from then on.
        """
        return {}

    def planned_entries(self, total: int, prompt: int, layer: int, layers: int) -> int:
        """The number `allocate` will give before anything is measured, for the predicted size of the cache."""
        return total

    def planned_lanes(self, total: int, prompt: int, layer: int, layers: int, kv_heads: int) -> list[int]:
        """`planned_entries` per KV head, for techniques whose heads keep different numbers of entries."""
        return [self.planned_entries(total, prompt, layer, layers)] * kv_heads

    def planned_read(self, entries: Any, layer: int, layers: int) -> tuple[Any, Any]:
        """Predicted reads of one decode step per KV head with `entries` stored (a number or an array of numbers):
        (entries' worth of key bytes read in order to choose, entries read for attention)."""
        return 0 * entries, entries

    def table_bytes(self, entries: int, head_dim: int, element: int, layer: int, layers: int, groups: int) -> int:
        """Predicted bytes per KV head of what is stored beside `entries` entries in order to choose among them."""
        return 0

    def reduce(self, ctx: "LayerContext", keep: torch.Tensor, scores: torch.Tensor | None) -> None:
        """Fold entries that leave (keep [B,Hk,N] False) into those that stay, before they are dropped."""

    def codecs(self, ctx: "LayerContext") -> tuple["Codec", "Codec"]:
        """(key codec, value codec) of the `encode` slot."""
        raise LabError(f"{self.name} does not encode.")

    def due(self, side: str, exact: int) -> tuple[int, int]:
        """(first, count) of the exact rows, oldest first, of side "key" or "value" that must be coded now."""
        return 0, 0

    @property
    def codes_in_place(self) -> str:
        """How decode steps in place may code: "rows" (each step codes the row it attended), "blocks" (values one by one behind
        `residual` exact rows, keys `residual` at a time), or "" (only the ordinary path can)."""
        return ""

    @property
    def code_block(self) -> int:
        """Rows that share scales: samples of one prompt have whole blocks in common."""
        return 1

    @property
    def keeps_order(self) -> bool:
        """Coding always takes the oldest exact rows first, so storage order stays the order of positions."""
        return True

    def coded_bytes(self, side: str, entries: int, head_dim: int, element: int) -> int:
        """Predicted bytes of `entries` rows of one KV head on one side; `element` is the exact cache's item size."""
        return entries * head_dim * element


UNLIMITED = 2**31


def resolve_budget(owner: str, budget: float, prompt: int) -> int:
    """Entries from a budget given as a fraction below 1 of the prompt, or a count above 1; exactly 1 keeps everything."""
    if budget == 1:
        return UNLIMITED
    return max(1, round(budget * prompt)) if budget < 1 else int(budget)


def _convert(kind: str, value: Any) -> Any:
    if kind == "bool":
        if isinstance(value, str):
            lowered = value.strip().lower()
            if lowered not in {"true", "false", "1", "0", "yes", "no", "on", "off"}:
                raise ValueError(value)
            return lowered in {"true", "1", "yes", "on"}
        if isinstance(value, (bool, int)):
            return bool(value)
        raise ValueError(value)
    if kind == "int":
        number = float(value)
        if number != int(number):
            raise ValueError(value)
        return int(number)
    if kind == "float":
        if isinstance(value, bool):
            raise ValueError(value)
        return float(value)
    return str(value)


def _type_name(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    return {"int": "int", "float": "float", "bool": "bool"}.get(text.split(" ")[0], "str")


def _article(kind: str) -> str:
    return {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a word"}[kind]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value)
