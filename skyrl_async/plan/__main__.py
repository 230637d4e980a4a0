"""Says how fast a cluster of some shape would train: ``python -m skyrl_async.plan --help``."""

from skyrl_async.plan.command import main

if __name__ == "__main__":
    main()
