"""`pomona bench`: size, latency and memory of one network on every path."""
