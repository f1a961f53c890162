"""Where requests are measured and whole cells run: this process, or several."""
