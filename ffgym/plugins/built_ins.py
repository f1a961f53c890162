"""What ships with ffgym, by kind and name, as strings: listing names must not import torch."""

from __future__ import annotations

from typing import NamedTuple

from ffgym.plugins.kinds import PluginKind


class BuiltIn(NamedTuple):
    """Where a built-in lives (``"module:Class"``), and the line that ``ffgym ls`` prints."""

    target: str
    description: str


def _family(cls: str, description: str) -> BuiltIn:
    return BuiltIn(f"ffgym.models.built_in_families:{cls}", description)


BUILTINS: dict[PluginKind, dict[str, BuiltIn]] = {
    "agent": {
        "reinforce": BuiltIn("ffgym.agents.reinforce:Reinforce", "policy gradient over a Gaussian of importances"),
        "pathwise": BuiltIn("ffgym.agents.pathwise:Pathwise", "follows the slope of the loss, from backward passes"),
        "ppo": BuiltIn("ffgym.agents.ppo:PPO", "Stable-Baselines3's PPO"),
        "evolution": BuiltIn("ffgym.agents.evolution:Evolution", "mutation, crossover and survival in a population"),
        "cma-es": BuiltIn("ffgym.agents.cma_es:CMAES", "covariance matrix adaptation, by the cmaes package"),
        "evopress": BuiltIn("ffgym.agents.evopress:EvoPress", "level switches with several rounds of selection"),
        "random": BuiltIn("ffgym.agents.random_search:RandomSearch", "independent random importances"),
        "one-shot": BuiltIn("ffgym.agents.one_shot:OneShot", "the prior's heuristic, measured as it is; no search"),
    },
    "calibration": {
        "ridge": BuiltIn(
            "ffgym.prepare.calibrations:Ridge", "least output error at every level, from one factorisation"
        ),
        "affine": BuiltIn("ffgym.prepare.calibrations:Affine", "ridge, with a bias for every consumer"),
        "none": BuiltIn("ffgym.prepare.calibrations:NoCalibration", "plain removal; the final refits are ridge"),
    },
    "corpus": {
        "demo": BuiltIn("ffgym.data.corpora:Demo", "fetched once: demo:c4, demo:wiki, demo:code, demo:technical"),
        "wikitext": BuiltIn("ffgym.data.corpora:Wikitext", "Salesforce/wikitext on the hub, wikitext-2-raw-v1"),
        "c4": BuiltIn("ffgym.data.corpora:C4", "allenai/c4 on the hub, its first English shards"),
    },
    "criterion": {
        "wanda": BuiltIn("ffgym.criteria.wanda:Wanda", "|W| times the norm of the inputs"),
        "magnitude": BuiltIn("ffgym.criteria.magnitude:Magnitude", "|W|: the smallest weights are removed first"),
        "flap": BuiltIn("ffgym.criteria.flap:Flap", "variance of a channel times its column's squared norm"),
        "obs": BuiltIn("ffgym.criteria.obs:Obs", "unit after unit, the one that the rest makes up for best"),
        "taylor": BuiltIn("ffgym.criteria.taylor:Taylor", "|W * dL/dW|: the loss change to first order"),
        "random": BuiltIn("ffgym.criteria.random:Random", "a seeded random order, the floor for every criterion"),
    },
    "export": {
        "gguf": BuiltIn("ffgym.export.gguf.gguf:Gguf", "one file with weights, sizes and tokenizer, for llama.cpp"),
        "nemotron-nas": BuiltIn("ffgym.export.nemotron_nas:NemotronNas", "a folder that MLX reads; llama and mistral"),
    },
    "family": {
        "llama": _family("Llama", "multi-head or grouped-query attention, gated MLP"),
        "mistral": _family("Mistral", "as llama"),
        "mixtral": _family("Mixtral", "as mistral, with experts in place of MLPs"),
        "qwen2": _family("Qwen2", "as llama, with biases of query, key and value"),
        "qwen3": _family("Qwen3", "as llama, with norms of queries and keys"),
        "qwen3_moe": _family("Qwen3MoE", "as qwen3, with experts in place of most MLPs"),
        "gemma": _family("Gemma", "as llama, with another activation; only Gemma 1"),
        "gemma2": _family("Gemma2", "as gemma, with norms behind each half, soft caps, sliding windows"),
        "gemma3_text": _family("Gemma3", "as gemma2, with norms of queries and keys; the text model"),
        "smollm3": _family("SmolLM3", "as llama, some layers without rotary positions"),
        "olmo": _family("OLMo", "as llama, with norms that have no weights"),
        "olmo2": _family("OLMo2", "norms of all heads together: attention whole or not"),
        "olmo3": _family("OLMo3", "as olmo2, with sliding windows"),
        "olmoe": _family("OLMoE", "experts in place of MLPs, attention whole or not"),
        "gpt_oss": _family("GptOss", "experts with biases, attention with sinks, whole or not"),
        "granite": _family("Granite", "as llama, with scaled embeddings and logits"),
        "phi3": _family("Phi3", "as llama, with fused query/key/value and gate/up"),
        "cohere2": _family("Cohere2", "both halves read one input, sliding windows, scaled logits"),
        "exaone4": _family("Exaone4", "as qwen3, with norms behind each half instead"),
        "ernie4_5": _family("Ernie45", "as llama"),
        "seed_oss": _family("SeedOss", "as qwen2"),
        "glm": _family("GLM", "as llama, with fused gate/up"),
        "glm4": _family("GLM4", "as glm, with norms behind each half, too"),
        "nemotron": _family("Nemotron", "as llama, with an MLP of two linears"),
        "phi": _family("Phi", "both halves read one input, MLP of two linears, biases"),
        "gpt_neox": _family("GPTNeoX", "multi-head attention, both halves read one input, biases"),
        "ministral": _family("Ministral", "as mistral, with sliding windows"),
        "ministral3": _family("Ministral3", "as mistral, far queries are scaled"),
        "opt": _family("OPT", "multi-head attention, two linears in the MLP, biases everywhere"),
    },
    "heuristic": {
        "uniform": BuiltIn("ffgym.heuristics.uniform:Uniform", "every sublayer keeps the same share"),
        "fisher": BuiltIn(
            "ffgym.heuristics.fisher:Fisher", "smallest loss by second-order estimates after calibration"
        ),
        "mlp-first": BuiltIn(
            "ffgym.heuristics.mlp_first:MlpFirst", "cuts MLPs first; spares those at both ends, at most half of all"
        ),
        "skip-ends": BuiltIn("ffgym.heuristics.skip_ends:SkipEnds", "keeps both ends whole, cuts the rest equally"),
        "flap": BuiltIn("ffgym.heuristics.flap:Flap", "one global threshold on standardised fluctuation scores"),
        "owl": BuiltIn("ffgym.heuristics.owl:Owl", "cuts less where |W| times the inputs' norm has more outliers"),
        "gate-scaling": BuiltIn(
            "ffgym.heuristics.gate_scaling:GateScaling", "cuts less where the loss depends more on the output"
        ),
    },
    "metric": {
        "loss": BuiltIn("ffgym.measure.metrics:Loss", "nats per token on the demo's Wikipedia text"),
    },
    "resource": {
        "params": BuiltIn("ffgym.costs.params:Params", "parameters"),
        "macs": BuiltIn("ffgym.costs.macs:Macs", "multiply-accumulates of one token at a context length"),
        "kv": BuiltIn("ffgym.costs.kv:KV", "bytes that one token adds to the KV cache"),
        "latency": BuiltIn("ffgym.costs.latency:Latency", "time on one machine, of a forward pass or in an engine"),
    },
    "reward": {
        "perplexity": BuiltIn("ffgym.rewards.perplexity:Perplexity", "dense perplexity over pruned perplexity"),
        "kl": BuiltIn("ffgym.rewards.kl:KL", "exp(-KL) of the next-token distribution from the dense one"),
        "multi-objective": BuiltIn(
            "ffgym.rewards.multi_objective:MultiObjective", "weighted perplexity ratio, task accuracy and saved cost"
        ),
    },
    "recovery": {
        "lora": BuiltIn("ffgym.recover.lora:Lora", "low-rank adapters on all linears, merged into the weights"),
        "distil-mlp": BuiltIn("ffgym.recover.distill:DistilMLP", "trains each MLP towards the output of the dense one"),
    },
}
