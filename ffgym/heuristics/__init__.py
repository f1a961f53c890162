"""Heuristics, one file each: importances without any episode. `ffgym.plugins.built_ins.BUILTINS` lists them."""
