"""CoreMatching-Bench: one command composes an experiment, runs what is missing, and prints its table.

    python run.py                                        the quickstart: bundled model and data, CPU, no network
    python run.py +experiment=gqa_sweep                  methods x keep on GQA
    python run.py +experiment=table1 data=mini limit=50  ten benchmarks, the paper's table
    python run.py method=fastv keep=[64,32] benchmark=pope
    python run.py --help                                 parts and settings

How a run flows, and where to read on:

    conf/experiment/*.yaml      what is compared; Hydra composes it with model, data and tracking  (corematching/cli.py)
    evaluation/experiment.py    -> a list of cells: model x method x keep x benchmark, content-addressed
    evaluation/runner.py        -> one model load, one task build per benchmark; finished cells are skipped
    evaluation/lmms_model.py    -> lmms-eval asks, our model answers under a method, a trace records what really ran
    results/store.py            -> results/<experiment>/cells/<id>/, written atomically
    results/table.py            -> the table on the terminal and in results/<experiment>/table.{md,csv}
    results/columns.py          what every table calls its columns, in which unit

Exit status: 0 done, 1 some cells failed, 2 wrong input, 130 interrupted (run again to resume).
"""

import sys

from corematching.cli import main

if __name__ == "__main__":
    sys.exit(main())
