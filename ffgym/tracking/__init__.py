"""The only rooms that know MLflow: a run of ffgym is one MLflow run."""
