"""What joins the ranks of a benchmark; asked for before anything of Megatron is imported."""

import os


def link_name(on_cpu: bool) -> str:
    """How the ranks are joined, by the environment."""
    if on_cpu:
        return os.environ.get("SCMOE_LINK", "gloo on one host")
    ranks, of_host = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if ranks != of_host:
        return f"{int(ranks) // int(of_host)} hosts"
    if os.environ.get("NCCL_P2P_DISABLE") == "1":
        return "socket" if os.environ.get("NCCL_SHM_DISABLE") == "1" else "host-staged"
    return "native"
