"""Examples as tokens, tokens as batches, batches as losses and scores."""
