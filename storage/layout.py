"""Which part of a run record lives in which column of which table; `migrations` makes the tables."""

from __future__ import annotations

from dataclasses import dataclass, field

from .kinds import KINDS, Kind

__all__ = ["CHILD_TABLES", "Field", "LEVELS", "RUNS", "Table", "VARIANTS"]


@dataclass(frozen=True)
class Field:
    """The value at `path` of an object, in the column `column`."""

    path: tuple[str, ...]
    column: str
    kind: Kind


@dataclass(frozen=True)
class Table:
    """One level of the record: its fields, and the keys whose lists are the tables below it."""

    name: str
    keys: tuple[str, ...]
    fields: tuple[Field, ...]
    children: dict[str, Table] = field(default_factory=dict)


def _fields(spec: str) -> tuple[Field, ...]:
    """Fields from lines of `kind: path path=column …`; dots become underscores in a column's name."""
    found = []
    for line in spec.strip().splitlines():
        kind, _, names = line.partition(":")
        for name in names.split():
            path, _, column = name.partition("=")
            found.append(Field(tuple(path.split(".")), column or path.replace(".", "_"), KINDS[kind.strip()]))
    return tuple(found)


TOKENS = Table(
    "tokens",
    ("run_id", "variant", "place"),
    _fields("""
    int: id=token_id kv_bytes
    text: text
    float: logprob entropy step_ms kept
    choices: alternatives
"""),
)

FIDELITY = Table(
    "fidelity",
    ("run_id", "variant", "place"),
    _fields("""
    float: kl ref_prob var_prob
    bool: agree
    choices: top
"""),
)

LAYERS = Table(
    "layers",
    ("run_id", "variant", "place"),
    _fields("""
    int: layer kv_bytes
    tally: bits
"""),
)

VARIANTS = Table(
    "variants",
    ("run_id", "place"),
    _fields("""
    text: letter spec title text finish error
    json: techniques
    texts: samples saves
    ints: token_ids
    float: ttft_ms tpot_ms kept_fraction read_fraction kl_mean top1_agreement perplexity
    int: kv_bytes kv_bytes_dense slack_bytes first_divergence
    bool: simulated
"""),
    {"tokens": TOKENS, "fidelity": FIDELITY, "layers": LAYERS},
)

RUNS = Table(
    "runs",
    (),
    _fields("""
    text: run_id name created status device
    texts: tags
    int: schema=record_schema
    text: model.id model.source model.revision model.architecture model.dtype model.weights model.device
    int: model.parameters model.layers model.heads model.kv_heads model.head_dim model.context model.vocab
    int: model.sliding_window model.kv_bytes_per_token
    float: model.weights_kl
    texts: model.layer_types
    json: environment
    int: settings.max_new_tokens settings.top_k settings.seed settings.samples
    float: settings.temperature settings.top_p
    text: settings.timing prompt.text
    bool: settings.chat settings.fidelity
    ints: prompt.token_ids
    texts: prompt.tokens
"""),
    {"variants": VARIANTS},
)

CHILD_TABLES = (VARIANTS, TOKENS, FIDELITY, LAYERS)
LEVELS = (RUNS, *CHILD_TABLES)
