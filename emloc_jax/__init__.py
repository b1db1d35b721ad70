"""Fine-tune a model in the memory you already need to run it."""
