"""Models in the formats of other programs: weights, settings, tokenizer and card in one folder, and its upload."""
