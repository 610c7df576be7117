"""What an error about data recommends is typed in as it stands, and the run trains."""

import re
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from tests import harness

VOCAB = 128
FLAGS = (
    "--transformer-impl local --distributed-backend gloo --num-layers 2 --hidden-size 32 "
    "--num-attention-heads 2 --seq-length 32 --max-position-embeddings 32 --ffn-hidden-size 64 "
    "--swiglu --disable-bias-linear --position-embedding-type rope --num-experts 4 "
    "--moe-layer-freq [0,1]*1 --moe-shared-expert-intermediate-size 32 "
    "--moe-token-dispatcher-type alltoall --untie-embeddings-and-output-weights "
    f"--tokenizer-type NullTokenizer --vocab-size {VOCAB} --num-workers 0 "
    "--micro-batch-size 2 --lr 1e-3 --log-interval 1 --train-iters 3 "
    "--eval-iters 1 --eval-interval 2"
).split()


@pytest.mark.parametrize("documents", [40, 1])
def test_of_a_split(documents, tmp_path):
    flags = [*FLAGS, "--data-path", str(write_dataset(tmp_path / "text", documents))]
    refused = harness.run_pretrain(flags)
    assert refused.status == 2
    advice = re.search(r"accepted: more documents, or (--split .*)", refused.error)[1].split()
    assert ("--eval-iters" in advice) == (documents == 1)

    run = harness.run_pretrain([*flags, *advice])
    assert run.status == 0, run.output
    assert sorted(run.losses) == [1, 2, 3]
    assert ("validation loss at iteration 2" in run.output) == (documents == 40)


def write_dataset(prefix: Path, documents: int) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in np.random.default_rng(1).integers(0, VOCAB, (documents, 50)):
        builder.add_document(document, [document.size])
    builder.finalize(f"{prefix}.idx")
    return prefix
