"""Agreement with published implementations, number by number."""
