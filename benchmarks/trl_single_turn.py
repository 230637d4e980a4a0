"""The baseline of single_turn.py: the same task, model, batch and sampling with TRL's GRPOTrainer.

It runs under an interpreter that has `torch`, `transformers` and `trl`, and needs nothing else of
what this repository requires:

    benchmarks/peers/install.sh trl DIR
    python benchmarks/single_turn.py --trl-python DIR/bin/python

Equal to our side are the tokenizer with its chat template (so the prompt tokens), the initial
weights, the tasks and their order, 16 prompts x 16 samples a step, temperature 1 over the whole
vocabulary, replies of at most 2 tokens, AdamW with its betas and clipping, float32. TRL generates
with `transformers`, which is what it has on a CPU, and takes one optimizer step per batch. The
clock starts when training begins, after all loading. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

import torch
from datasets import Dataset
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
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

PACKAGES = ("trl", "transformers", "torch")


class ClockCallback(TrainerCallback):
    """Gives the clock the reward of every step."""

    def __init__(self, clock: StepClock) -> None:
        self._clock = clock

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._clock.start()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the mean reward over the step's trajectories; stop at the time limit."""
        logs = kwargs.get("logs") or {}
        if "reward" in logs:
            self._clock.step(float(logs["reward"]))
        control.should_training_stop |= self._clock.over


def largest_named(completions: list[Any], answer: list[int], **kwargs: Any) -> list[float]:
    """Return 1 for every reply whose first integer is the answer, else 0."""
    return rewards([messages[0]["content"] for messages in completions], answer)


def trainer_config(folder: str, args: argparse.Namespace) -> GRPOConfig:
    return GRPOConfig(
        output_dir=folder,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        per_device_train_batch_size=PROMPTS * GROUP_SIZE,
        gradient_accumulation_steps=1,
        num_generations=GROUP_SIZE,
        max_completion_length=MAX_TOKENS,
        temperature=1.0,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=args.seed,
    )


def main() -> None:
    args = argument_parser((__doc__ or "").splitlines()[0]).parse_args()
    torch.set_num_threads(args.threads)
    rows = [
        {"prompt": [{"role": "user", "content": task["prompt"]}], "answer": task["answer"]}
        for task in json.loads(args.tasks.read_text())
    ]
    clock = StepClock(max_seconds=args.max_seconds)
    model, tokenizer = model_and_tokenizer(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=largest_named,
            args=trainer_config(folder, args),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[ClockCallback(clock)],
        )
        trainer.train()
    prompt = tokenizer.apply_chat_template(
        rows[0]["prompt"], add_generation_prompt=True, return_dict=False
    )
    print_result(clock, args, packages=PACKAGES, first_prompt=prompt)


if __name__ == "__main__":
    main()
