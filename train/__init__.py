"""sft-train: a shard set -> a trained Hugging Face model. Never imports prep, never calls a
tokenizer before export."""
