"""Writing the cache: packing to 8, 4 and 2 bits, moving entries between tiers, compaction and eviction in place."""

from kernels.encode.api import append, compact, demote, encode_sides, encode_tokens
from kernels.encode.coders import append_blocks, channels, from_table, table, tokens
from kernels.encode.evict import Front, evict

__all__ = [
    "Front", "append", "append_blocks", "channels", "compact", "demote", "encode_sides", "encode_tokens", "evict", "from_table",
    "table", "tokens",
]
