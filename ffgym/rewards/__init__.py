"""Rewards, one file each: one number for an episode. `ffgym.plugins.built_ins.BUILTINS` lists them."""
