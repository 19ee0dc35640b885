"""How a model answers questions: prompts and pictures, batches, generation, traces."""
