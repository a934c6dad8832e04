"""What reads networks into graphs."""
