"""Text on disk: documents, the tokenizer of prepared data, triples."""
