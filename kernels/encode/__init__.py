"""Writing the cache: packing to 8, 4 and 2 bits, moving entries between tiers, compaction in place."""

from kernels.encode.api import append, compact, demote, encode_tokens

__all__ = ["append", "compact", "demote", "encode_tokens"]
