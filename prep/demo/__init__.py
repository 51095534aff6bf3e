"""The demo mixture: questions written by a program, and their tokenizer. Needs no network."""
