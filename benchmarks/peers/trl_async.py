"""Try TRL's asynchronous GRPO on the task of single_turn.py, under an interpreter with ``trl``.

Its last line of stderr says what it is missing where it does not start: generation is a vLLM
server's, and the weights go there over NCCL.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets import Dataset
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
from trl_single_turn import largest_named

from skyrl_async.learner.tiny_policy import build_tiny_model, build_tiny_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", type=Path, required=True, help="as for trl_single_turn.py")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tasks = json.loads(args.tasks.read_text())
    rows = [
        {"prompt": [{"role": "user", "content": t["prompt"]}], "answer": t["answer"]} for t in tasks
    ]
    tokenizer = build_tiny_tokenizer()
    model = build_tiny_model(hidden_size=128, max_position_embeddings=128, seed=args.seed)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/model")
        tokenizer.save_pretrained(f"{folder}/model")
        trainer = AsyncGRPOTrainer(
            model=f"{folder}/model",
            reward_funcs=largest_named,
            args=AsyncGRPOConfig(
                output_dir=folder,
                max_steps=args.steps,
                max_completion_length=2,
                num_generations=16,
                use_cpu=True,
                bf16=False,
                report_to=[],
                seed=args.seed,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
    print(json.dumps({"steps": args.steps}))


if __name__ == "__main__":
    main()
