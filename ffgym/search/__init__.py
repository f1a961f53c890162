"""One search: the loop, its log, its finals, its policy."""
