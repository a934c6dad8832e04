"""What takes several runs: comparisons, sweeps, tickets, progressive pruning, valleys."""
