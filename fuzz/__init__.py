"""Coverage-guided fuzzing of every reader: `make fuzz`. The corpus is replayed by tests/test_fuzz_corpus.py."""
