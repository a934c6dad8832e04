"""Pictures, HTML pages and text tables."""
