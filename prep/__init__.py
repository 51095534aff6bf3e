"""sft-prep: raw conversations -> a verified, packed, memory-mapped shard set. Never imports torch
or train."""
