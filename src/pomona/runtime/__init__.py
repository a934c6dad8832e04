"""Networks with sparse weights, executed without torch."""
