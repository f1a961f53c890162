"""Where evaluations and whole cells run: this process, or several."""
