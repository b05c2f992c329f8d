"""SURM on the quickstart's data: circulant against LoRA of equal size, its adapter against bottlenecks 12 times as large.

    python -m benchmarks.surm_quickstart benchmarks/surm_quickstart.yaml

Goes on where it was stopped. Results: the output_dir of the YAML file.
"""

import argparse

import benchmarks.bottleneck  # noqa: F401  # registers BOTTLENECK, in the processes of the runs as well
from hyperadapt_peft.cli.compare import compare, load, table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", help="a YAML file of `hyperadapt compare`")
    print(table(compare(load(parser.parse_args().config))))
