"""The evaluation suite: perplexity, sums, maths, code and science questions on any text model."""
