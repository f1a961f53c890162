"""The configuration of a run: its tables, how they are read from TOML, and how wrong keys are refused."""
