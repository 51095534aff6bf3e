"""The demo mixture: questions written by a program, with a tokenizer of their own. Works without a
network."""
