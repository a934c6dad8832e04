"""Read what other pruning tools left: SparseML recipes, models pruned by torch.nn.utils.prune."""
