"""How ffgym is extended: the hooks, the manager that finds plugins, and the base classes they subclass."""
