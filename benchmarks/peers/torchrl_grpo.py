"""TorchRL's GRPO on the task of single_turn.py, synchronous or asynchronous, without CUDA.

    PYTHON benchmarks/peers/torchrl_grpo.py sync|async --tasks FILE [--steps N] ...

The layout is that of TorchRL's own GRPO examples with its Transformers wrapper in vLLM's place: a
chat environment with a reward transform, an LLM collector, a replay buffer whose transform computes
the advantages of groups, and its GRPO loss.

* ``sync``: collector and buffer in this process. Collect 16 x 16 trajectories, train on them once.
* ``async``: the collector and the buffer are Ray actors. The collector never waits for the trainer;
  the trainer takes each collection once, as soon as it is there, and sends weights after each step.

What was tuned: tokens instead of chat histories as the mode of all parts, padded outputs, dense
records of the fields that the loss reads (the default, lazily stacked records of text, takes
several times as long), numbers as group names, one optimizer step per collection, no logging, no
policy versions. Entropy bonus as on our side; clipping at 0.2. The sampler returns no logprobs that
its own loss can read (``log_probs.full`` is missing, and the first reply token's is 0), so the
policy scores what it sampled with a second forward pass, with the weights that sampled it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from buffers_load import start_ray
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
from tensordict import TensorDict, TensorDictBase, set_list_to_stack
from tensordict.nn import TensorDictModuleBase
from torch.utils.data import DataLoader
from torchrl.collectors.llm import LLMCollector, RayLLMCollector
from torchrl.data import (
    Composite,
    LazyTensorStorage,
    RayReplayBuffer,
    ReplayBuffer,
    SamplerWithoutReplacement,
    Unbounded,
)
from torchrl.envs import Transform
from torchrl.envs.llm import ChatEnv
from torchrl.modules.llm import TransformersWrapper
from torchrl.objectives.llm import GRPOLoss, MCAdvantage

BATCH = PROMPTS * GROUP_SIZE
PACKAGES = ("torchrl", "tensordict", "transformers", "torch")


class LargestNamed(Transform):
    """Ends every episode after one reply, with its reward."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        replies = self._tokenizer.batch_decode(tensordict["tokens"].response)
        answers = [int(answer) for answer in next_tensordict["answer"]]
        count = len(answers)
        reward = torch.tensor(rewards(replies, answers)).view(count, 1, 1)
        ended = torch.ones(count, 1, dtype=torch.bool)
        return next_tensordict.update({"reward": reward, "terminated": ended, "done": ended})

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        """Add the reward to the specification."""
        reward_spec["reward"] = Unbounded((*reward_spec.shape, 1, 1))
        return reward_spec


class ScoredPolicy(TensorDictModuleBase):
    """Samples replies, and scores them with the same weights."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        shared = {"tokenizer": tokenizer, "input_mode": "tokens", "pad_output": True}
        self.sampler = TransformersWrapper(
            model,
            generate=True,
            return_log_probs=False,
            generate_kwargs={
                "max_new_tokens": MAX_TOKENS,
                "do_sample": True,
                "temperature": 1.0,
                "top_k": model.config.vocab_size,
                "top_p": 1.0,
            },
            **shared,
        )
        # Not a submodule, so that its weights, which are the sampler's, are sent once.
        scorer = TransformersWrapper(model, generate=False, return_log_probs=True, **shared)
        object.__setattr__(self, "scorer", scorer)
        self.in_keys = self.sampler.in_keys
        self.out_keys = [*self.sampler.out_keys, "log_probs"]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Add replies, their masks and their logprobs."""
        tensordict = self.sampler(tensordict)
        with torch.no_grad():
            scored = self.scorer(tensordict.select("tokens", "masks"))
        return tensordict.set("log_probs", scored["log_probs"])


class DenseRecords:
    """Turns a collection into one plain TensorDict; the repeats of a prompt follow each other."""

    def __init__(self) -> None:
        self._groups = 0

    def __call__(self, collected: TensorDictBase) -> TensorDict:
        """Return the fields that the loss and the advantages read."""
        groups = self._groups + torch.arange(PROMPTS).repeat_interleave(GROUP_SIZE)
        self._groups += PROMPTS
        return TensorDict(
            {
                "tokens": {name: collected["tokens", name] for name in ("prompt", "full")},
                "masks": {"all_attention_mask": collected["masks", "all_attention_mask"]},
                "log_probs": {"full": collected["log_probs", "full"]},
                "group": groups,
                "next": {name: collected["next", name] for name in ("reward", "done")},
            },
            batch_size=[len(groups)],
        )


def make_environment(tasks: Path) -> Any:
    """Return the chat environment over the tasks, 16 x 16 episodes at once."""
    _, tokenizer = model_and_tokenizer(0)

    def columns(rows: list[Mapping[str, Any]]) -> dict[str, list[str]]:
        return {
            "query": [row["prompt"] for row in rows],
            "answer": [str(row["answer"]) for row in rows],
        }

    loader = DataLoader(json.loads(tasks.read_text()), batch_size=PROMPTS, collate_fn=columns)
    environment = ChatEnv.from_dataloader(
        loader,
        repeats=GROUP_SIZE,
        batch_size=(BATCH,),
        tokenizer=tokenizer,
        input_mode="tokens",
        template_kwargs={"chat_template": tokenizer.chat_template},
    )
    return environment.append_transform(LargestNamed(tokenizer))


def make_policy(seed: int, threads: int) -> ScoredPolicy:
    """Return the initial policy; also sets up the process that it is for."""
    set_list_to_stack(True).set()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    return ScoredPolicy(*model_and_tokenizer(seed))


class Trainer:
    """One optimizer step per batch with TorchRL's GRPO loss."""

    def __init__(self, policy: ScoredPolicy, learning_rate: float) -> None:
        self._weights = list(policy.parameters())
        self._loss = GRPOLoss(policy.scorer, clip_epsilon=0.2, entropy_coeff=0.02)
        self._optimizer = torch.optim.AdamW(
            self._weights, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )

    def step(self, batch: TensorDictBase) -> float:
        """Train; return the mean reward of the batch."""
        self._loss(batch).mean(reduce=True).backward()
        torch.nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(batch["next", "reward"].mean())


def buffer_options() -> dict[str, Any]:
    return {
        "storage": partial(LazyTensorStorage, BATCH),
        "sampler": SamplerWithoutReplacement,
        "batch_size": BATCH,
    }


def make_advantage() -> MCAdvantage:
    """Return the transform that computes the advantages of groups."""
    return MCAdvantage(grpo_size=GROUP_SIZE, prompt_key="group")


def train_sync(args: Any, clock: StepClock) -> list[int]:
    """Collect and train in turns; return the first prompt."""
    policy = make_policy(args.seed, args.threads)
    trainer = Trainer(policy, args.learning_rate)
    options = buffer_options()
    buffer = ReplayBuffer(
        storage=options["storage"](),
        sampler=options["sampler"](),
        batch_size=BATCH,
        transform=make_advantage(),
    )
    collector = LLMCollector(
        make_environment(args.tasks),
        policy=policy,
        dialog_turns_per_batch=BATCH,
        total_dialog_turns=BATCH * args.steps,
        replay_buffer=buffer,
        postproc=DenseRecords(),
    )
    first: list[int] = []
    clock.start()
    for _ in collector:
        batch = buffer.sample()
        first = first or buffer[0]["tokens", "prompt"].tolist()
        clock.step(trainer.step(batch))
        buffer.empty(empty_write_count=False)
        if clock.over:
            break
    return first


def train_async(args: Any, clock: StepClock) -> list[int]:
    """Train while the collector goes on; return the first prompt."""
    import ray

    os.environ["OMP_NUM_THREADS"] = "1"
    start_ray()
    policy = make_policy(args.seed, 1)
    trainer = Trainer(policy, args.learning_rate)
    buffer = RayReplayBuffer(
        **buffer_options(),
        transform_factory=make_advantage,
        remote_config={"num_cpus": 1},
        ray_init_config={},
    )
    collector = RayLLMCollector(
        partial(make_environment, args.tasks),
        policy_factory=partial(make_policy, args.seed, 1),
        dialog_turns_per_batch=BATCH,
        replay_buffer=buffer.client(),
        postproc=DenseRecords(),
        remote_config={"num_cpus": 1, "num_gpus": 0, "max_concurrency": 4},
    )
    ray.get(collector._collector.is_initialized.remote())
    first: list[int] = []
    taken = 0
    clock.start()
    collector.start()
    while len(clock.steps) < args.steps and not clock.over:
        taken = wait_for_more(lambda: buffer.write_count, taken, clock)
        batch = buffer.sample()
        first = first or buffer[0]["tokens", "prompt"].tolist()
        reward = trainer.step(batch)
        collector.update_policy_weights_(TensorDict.from_module(policy).data)
        clock.step(reward)
    collector.async_shutdown(timeout=30)
    ray.shutdown()
    return first


def wait_for_more(written: Callable[[], int], taken: int, clock: StepClock) -> int:
    """Return how much was ever written once that is more than ``taken``."""
    while (count := written()) <= taken:
        if clock.over:
            raise TimeoutError(f"no collection within {clock.seconds:.0f} s")
        time.sleep(0.001)
    return count


def main() -> None:
    parser = argument_parser((__doc__ or "").splitlines()[0])
    parser.add_argument("mode", choices=("sync", "async"))
    args = parser.parse_args()
    clock = StepClock(max_seconds=args.max_seconds)
    first = {"sync": train_sync, "async": train_async}[args.mode](args, clock)
    print_result(clock, args, packages=PACKAGES, first_prompt=first)


if __name__ == "__main__":
    main()
