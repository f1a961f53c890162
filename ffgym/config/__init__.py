"""What a run may be told: the tables, how TOML becomes them, and how a wrong key is refused."""
