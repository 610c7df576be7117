"""An all-to-all that leaves every multiprocessor to the compute beside it.

NCCL's all-to-all is a kernel: it holds multiprocessors while it waits and copies, and the GEMMs it is
hidden under have fewer and run longer. Between GPUs of one host the copies can be left to the GPU's
copy engines. Once it is enqueued, nothing of this runs on the host, and no copy between GPUs on a
multiprocessor:

    sender      wait until the slot is free | copy a block into it       | produced += 1
    receiver    wait until it is filled     | copy it to where it belongs | consumed += 1

Every ordered pair of ranks has a ring of such slots and two counters. The waits and the counters are
stream memory operations (CUDA driver API, 6.18), which the GPU's front end executes. Slots lie in
pinned host memory that the ranks share (``host``), or in the receiver's memory, to which the sender
copies over NVLink or PCIe (``peer``).

Both sides compute the same blocks from the split sizes, so no block needs a header. Sends and receives
are enqueued in turns, so that a full ring never waits for a receive that is enqueued behind it.
"""
