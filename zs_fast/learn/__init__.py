"""Getting better: packed batches, log-probabilities, advantages, losses and optimizer steps."""
