"""Heuristics, one file each: importances without any episode. `ffgym.plugins.manager.BUILTINS` lists them."""
