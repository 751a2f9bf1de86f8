"""What can be measured on a model: sparsity, quality, the gain from speculation."""
