"""The contract between sft-prep and sft-train: on-disk format, config loading, hashing, atomic
files, errors, and the client of the hub."""
