"""Rewards, one file each: one number for an episode. `ffgym.plugins.manager.BUILTINS` lists them."""
