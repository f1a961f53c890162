"""For plugin authors and for ffgym's own tests: conformance tests to subclass, toy problems, tiny models.

* `ffgym.testing.conformance`: pytest classes that hold a plugin to its contract (needs pytest).
* `ffgym.testing.toys`: vector environments whose optimum is known, and sublayers for heuristics.
* `ffgym.testing.models`: tiny language models.
"""
