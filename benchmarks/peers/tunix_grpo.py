"""Tunix's GRPO (JAX) on the task of single_turn.py, on the CPU.

    PYTHON benchmarks/peers/tunix_grpo.py --tasks FILE [--steps N] ...

The layout is that of Tunix's own GRPO examples: actor and rollout share one mesh and one set of
weights, its vanilla sampler generates, and each batch of 16 x 16 is one optimizer step. The initial
weights are those of both sides, loaded from a safetensors file.

What was tuned: prompts padded to 8 tokens and a cache of 16, so that nothing is computed on padding
but what a batch needs; no reference model (beta 0); no checkpoints, evaluation or metrics files; a
new sampling seed per step, because its sampler has the same one for all calls otherwise.

What differs from our side, because Tunix has no setting for it: RoPE's base is 1,000,000 in its
Qwen3 whatever the configuration says, there is no entropy bonus, and the end token is not trained.
The first two steps compile; `compile_seconds` is what they take more than the median step, and is
part of all times.
"""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import json
import tempfile
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import jax
import numpy as np
import optax
from peer_task import (
    GROUP_SIZE,
    MAX_TOKENS,
    PROMPTS,
    StepClock,
    argument_parser,
    model_and_tokenizer,
    print_result,
    rewards,
)
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params as qwen3_params
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig

PROMPT_TOKENS = 8
PACKAGES = ("google-tunix", "jax", "flax", "transformers")


def load_actor(model: Any, mesh: jax.sharding.Mesh) -> Any:
    """Return Tunix's Qwen3 with the weights of a Transformers one."""
    config = model.config
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return qwen3_params.create_model_from_safe_tensors(
            folder,
            qwen3.ModelConfig(
                num_layers=config.num_hidden_layers,
                vocab_size=config.vocab_size,
                embed_dim=config.hidden_size,
                hidden_dim=config.intermediate_size,
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                rope_theta=config.rope_parameters["rope_theta"],
                norm_eps=config.rms_norm_eps,
                use_tied_embedding=False,
            ),
            mesh,
        )


def make_cluster(args: Any, actor: Any, tokenizer: Any, mesh: jax.sharding.Mesh) -> RLCluster:
    """Return a cluster whose actor and rollout are the same process and weights."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(args.learning_rate, b1=0.9, b2=0.95, weight_decay=0.0),
    )
    return RLCluster(
        actor=actor,
        tokenizer=tokenizer,
        cluster_config=ClusterConfig(
            role_to_mesh=dict.fromkeys((Role.ACTOR, Role.REFERENCE, Role.ROLLOUT), mesh),
            rollout_engine="vanilla",
            training_config=RLTrainingConfig(
                actor_optimizer=optimizer,
                eval_every_n_steps=args.steps + 1,
                max_steps=args.steps + 1,  # so that the end of the batches ends training
                mini_batch_size=PROMPTS,
                train_micro_batch_size=PROMPTS,
                rollout_micro_batch_size=PROMPTS,
                compute_logps_micro_batch_size=PROMPTS,
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=MAX_TOKENS,
                max_prompt_length=PROMPT_TOKENS,
                kv_cache_size=2 * PROMPT_TOKENS,
                temperature=1.0,
                top_p=1.0,
            ),
        ),
    )


class Batches:
    """The batches of a run and the rewards of its replies; a step ends when the next is asked for.

    Attributes:
        clock: takes every step.
        first_prompt: token IDs.
    """

    def __init__(self, args: Any, tokenizer: Any, clock: StepClock) -> None:
        self.clock = clock
        self._args = args
        self._rewards: list[float] = []
        self._rows = json.loads(args.tasks.read_text())
        self._prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": row["prompt"]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for row in self._rows
        ]
        self.first_prompt: list[int] = tokenizer.encode(self._prompts[0])

    def feed(self, rollout: RolloutConfig) -> Iterator[dict[str, np.ndarray]]:
        """Yield batches, and set the seed of the next rollout."""
        for step in range(self._args.steps):
            if step:
                self._end_step()
            if self.clock.over:
                return
            rollout.seed = self._args.seed * 1_000_003 + step
            rows = slice(PROMPTS * step, PROMPTS * (step + 1))
            answers = [row["answer"] for row in self._rows[rows]]
            yield {"prompts": np.array(self._prompts[rows]), "answer": np.array(answers)}
        self._end_step()

    def grade(
        self, prompts: Sequence[str], completions: Sequence[str], answer: Sequence[int], **_: Any
    ) -> list[float]:
        """Return the rewards of a batch."""
        self._rewards = rewards(completions, answer)
        return self._rewards

    def _end_step(self) -> None:
        self.clock.step(float(np.mean(self._rewards)))


def compile_seconds(steps: Sequence[dict[str, float]]) -> float:
    """Return how much longer the first two steps take than the median step."""
    ends = [0.0, *(step["time_s"] for step in steps)]
    durations = np.diff(ends).tolist()
    return sum(durations[:2]) - 2 * median(durations)


def main() -> None:
    args = argument_parser((__doc__ or "").splitlines()[0]).parse_args()
    model, tokenizer = model_and_tokenizer(args.seed)
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    clock = StepClock(max_seconds=args.max_seconds)
    batches = Batches(args, tokenizer, clock)
    cluster = make_cluster(args, load_actor(model, mesh), tokenizer, mesh)
    learner = GRPOLearner(
        rl_cluster=cluster,
        reward_fns=batches.grade,
        algo_config=GRPOConfig(num_generations=GROUP_SIZE, beta=0.0, epsilon=0.2),
    )
    clock.start()
    learner.train(batches.feed(cluster.cluster_config.rollout_config))
    print_result(
        clock,
        args,
        packages=PACKAGES,
        first_prompt=batches.first_prompt,
        compile_seconds=compile_seconds(clock.steps),
    )


if __name__ == "__main__":
    main()
