"""Packaging: a light core and extras; exact versions are in constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="skyrl_async",
    version="0.1.0",
    description="Fully asynchronous, off-policy reinforcement learning for language-model agents",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["skyrl_async", "skyrl_async.*"]),
    package_data={
        "skyrl_async": ["algorithms/presets/*.yaml", "report/assets/*", "timeline/assets/*"],
    },
    install_requires=[
        "torch>=2.8,<3",
        "ray>=2.49",
        "aiohttp>=3.11",
        "gymnasium>=1.0,<2",
        "tensorboard>=2.18",
        "pydantic>=2.8,<3",
        "pyyaml>=6",
        "numpy>=1.26",
        "rich>=13",
        "safetensors>=0.5",
        "transformers>=5,<6",
        "accelerate>=1",
    ],
    extras_require={
        "flash-attn": ["flash-attn"],
        "lora": ["peft>=0.18"],
        "data": ["pyarrow>=19"],
        "envs": ["reasoning-gym>=0.1.24", "math-verify>=0.8"],
        "lab": ["matplotlib>=3.9", "scipy>=1.13"],
        "obs": ["prometheus-client>=0.21"],
        "wandb": ["wandb>=0.31"],
        "mlflow": ["mlflow-skinny>=3", "sqlalchemy>=2", "alembic>=1"],
        "trackio": ["trackio>=0.43,<1"],
        "peers": ["trl>=1.16,<2", "rlax>=0.1.8"],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "selenium>=4.20",
            "ruff",
            "mypy",
            "types-PyYAML",
            "peft>=0.18",
            "prometheus-client>=0.21",
            "matplotlib>=3.9",
            "scipy>=1.13",
        ],
    },
)
