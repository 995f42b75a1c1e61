"""Writing the cache: packing to 8, 4 and 2 bits, moving entries between tiers, compaction and eviction in place."""

from kernels.encode.api import append, compact, demote, encode_tokens
from kernels.encode.coders import append_blocks, channels, table, tokens
from kernels.encode.evict import evict

__all__ = ["append", "append_blocks", "channels", "compact", "demote", "encode_tokens", "evict", "table", "tokens"]
