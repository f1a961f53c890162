"""What ships with ffgym, by kind and name, as strings: listing names must not import torch."""

from __future__ import annotations

from typing import NamedTuple

from ffgym.plugins.kinds import PluginKind


class BuiltIn(NamedTuple):
    """Where a built-in lives (``"module:Class"``), and the line that ``ffgym ls`` prints."""

    target: str
    description: str


BUILTINS: dict[PluginKind, dict[str, BuiltIn]] = {
    "agent": {
        "reinforce": BuiltIn("ffgym.agents.reinforce:Reinforce", "policy gradient over a Gaussian of importances"),
        "pathwise": BuiltIn("ffgym.agents.pathwise:Pathwise", "down the slope of the loss, from backward passes"),
        "ppo": BuiltIn("ffgym.agents.ppo:PPO", "Stable-Baselines3's PPO"),
        "evolution": BuiltIn("ffgym.agents.evolution:Evolution", "mutation, crossover and survival in a population"),
        "cma-es": BuiltIn("ffgym.agents.cma_es:CMAES", "covariance matrix adaptation, by the cmaes package"),
        "bayesian": BuiltIn("ffgym.agents.bayesian:Bayesian", "Gaussian-process surrogate with expected improvement"),
        "evopress": BuiltIn("ffgym.agents.evopress:EvoPress", "level switches with several rounds of selection"),
        "sensitivity": BuiltIn("ffgym.agents.sensitivity:Sensitivity", "each sublayer alone, then the best choice"),
        "random": BuiltIn("ffgym.agents.random_search:RandomSearch", "independent random importances"),
        "one-shot": BuiltIn("ffgym.agents.one_shot:OneShot", "the prior's heuristic, measured as it is; no search"),
    },
    "criterion": {
        "wanda": BuiltIn("ffgym.criteria.wanda:Wanda", "|W| times the norm of the inputs"),
        "magnitude": BuiltIn("ffgym.criteria.magnitude:Magnitude", "|W|: the smallest weights go first"),
        "flap": BuiltIn("ffgym.criteria.flap:Flap", "variance of a channel times its column's squared norm"),
        "obs": BuiltIn("ffgym.criteria.obs:Obs", "error that removing a channel leaves after the best refit"),
        "taylor": BuiltIn("ffgym.criteria.taylor:Taylor", "|W * dL/dW|: the loss change to first order"),
        "random": BuiltIn("ffgym.criteria.random:Random", "a seeded random order, the floor for every criterion"),
    },
    "export": {
        "gguf": BuiltIn("ffgym.export.gguf.gguf:Gguf", "one file with weights, sizes and tokenizer, for llama.cpp"),
    },
    "family": {
        "llama": BuiltIn("ffgym.models.families:Llama", "multi-head or grouped-query attention, gated MLP"),
        "mistral": BuiltIn("ffgym.models.families:Mistral", "as llama"),
        "qwen2": BuiltIn("ffgym.models.families:Qwen2", "as llama, with biases of query, key and value"),
        "qwen3": BuiltIn("ffgym.models.families:Qwen3", "as llama, with norms of queries and keys"),
        "gemma": BuiltIn("ffgym.models.families:Gemma", "as llama, with another activation; Gemma 1 alone"),
        "opt": BuiltIn("ffgym.models.families:OPT", "multi-head attention, an MLP of two linears, biases everywhere"),
    },
    "heuristic": {
        "uniform": BuiltIn("ffgym.heuristics.uniform:Uniform", "every sublayer keeps the same share"),
        "fisher": BuiltIn("ffgym.heuristics.fisher:Fisher", "least loss by second-order estimates after calibration"),
        "mlp-first": BuiltIn(
            "ffgym.heuristics.mlp_first:MlpFirst", "MLPs go first; those at both ends are spared, at most half of all"
        ),
        "skip-ends": BuiltIn("ffgym.heuristics.skip_ends:SkipEnds", "both ends stay whole, the rest is cut alike"),
        "flap": BuiltIn("ffgym.heuristics.flap:Flap", "one global cut through standardised fluctuation scores"),
        "owl": BuiltIn("ffgym.heuristics.owl:Owl", "more outliers among |W| times the inputs' norm, less cut"),
        "alpha": BuiltIn("ffgym.heuristics.alpha:Alpha", "heavier-tailed spectrum of the weight, less cut"),
        "gate-scaling": BuiltIn("ffgym.heuristics.gate_scaling:GateScaling", "loss leans more on the output, less cut"),
    },
    "resource": {
        "params": BuiltIn("ffgym.costs.params:Params", "parameters"),
        "macs": BuiltIn("ffgym.costs.macs:Macs", "multiply-accumulates of one token at a context length"),
        "kv": BuiltIn("ffgym.costs.kv:KV", "bytes that one token adds to the KV cache"),
        "latency": BuiltIn("ffgym.costs.latency:Latency", "time of a forward pass, measured on one machine"),
    },
    "reward": {
        "perplexity": BuiltIn("ffgym.rewards.perplexity:Perplexity", "dense perplexity over pruned perplexity"),
        "kl": BuiltIn("ffgym.rewards.kl:KL", "exp(-KL): how far the next-token distribution moves from the dense one"),
        "multi-objective": BuiltIn(
            "ffgym.rewards.multi_objective:MultiObjective", "weighted perplexity ratio, task accuracy and saved cost"
        ),
    },
    "recovery": {
        "lora": BuiltIn("ffgym.recover.lora:Lora", "low-rank adapters on all linears, merged into the weights"),
        "distil-mlp": BuiltIn("ffgym.recover.distill:DistilMLP", "each MLP learns what the dense one puts out"),
    },
}
