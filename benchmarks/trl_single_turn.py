"""The baseline of single_turn.py: the same task, model, batch and sampling with TRL's GRPOTrainer.

It runs under an interpreter that has `torch`, `transformers` and `trl`, and needs nothing else of
what this repository requires:

    python -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.16.0 transformers==5.23.0
    python benchmarks/single_turn.py --trl-python trl/bin/python

Equal to our side are the tokenizer with its chat template (so the prompt tokens), the initial
weights, the tasks and their order, 16 prompts x 16 samples a step, temperature 1 over the whole
vocabulary, replies of at most 2 tokens, AdamW with its betas and clipping, float32. TRL generates
with `transformers`, which is what it has on a CPU, and takes one optimizer step per batch. The
clock starts when training begins, after all loading. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
import trl
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from skyrl_async.learner.tiny_policy import build_tiny_model, build_tiny_tokenizer

_INTEGER = re.compile(r"-?[0-9]+")


class StepClock(TrainerCallback):
    """Keeps the seconds and the reward of every step."""

    def __init__(self, *, max_seconds: float) -> None:
        self.steps: list[dict[str, float]] = []
        self._max_seconds = max_seconds
        self._started_s = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._started_s = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the mean reward over the step's trajectories; stop at the time limit."""
        logs = kwargs.get("logs") or {}
        time_s = time.perf_counter() - self._started_s
        if "reward" in logs:
            self.steps.append({"time_s": time_s, "reward": float(logs["reward"])})
        control.should_training_stop |= time_s > self._max_seconds


def largest_named(completions: list[Any], answer: list[int], **kwargs: Any) -> list[float]:
    """Return 1 for every reply whose first integer is the answer, else 0."""
    found = [_INTEGER.search(messages[0]["content"]) for messages in completions]
    return [
        float(match is not None and int(match.group()) == right)
        for match, right in zip(found, answer, strict=True)
    ]


def trainer_config(folder: str, args: argparse.Namespace) -> GRPOConfig:
    return GRPOConfig(
        output_dir=folder,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        per_device_train_batch_size=256,
        gradient_accumulation_steps=1,
        num_generations=16,
        max_completion_length=2,
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tasks", type=Path, required=True, help='JSON list of {"prompt","answer"}'
    )
    parser.add_argument(
        "--steps", type=int, default=120, help="optimizer steps of 256 trajectories"
    )
    parser.add_argument("--max-seconds", type=float, default=300, help="of training")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--seed", type=int, default=0, help="of weights and sampling")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    tasks = json.loads(args.tasks.read_text())
    dataset = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": t["prompt"]}], "answer": t["answer"]}
            for t in tasks
        ]
    )
    clock = StepClock(max_seconds=args.max_seconds)
    tokenizer = build_tiny_tokenizer()
    tokenizer.padding_side = "left"
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=build_tiny_model(hidden_size=128, max_position_embeddings=128, seed=args.seed),
            reward_funcs=largest_named,
            args=trainer_config(folder, args),
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    prompt = tokenizer.apply_chat_template(
        dataset[0]["prompt"], add_generation_prompt=True, return_dict=False
    )
    result = {
        "versions": f"trl {trl.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}",
        "threads": torch.get_num_threads(),
        "first_prompt_token_ids": list(prompt),
        "steps": clock.steps,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
