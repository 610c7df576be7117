"""Serve a checkpoint's model over HTTP, as OpenAI's API.

    scmoe serve --load checkpoints/ --port 8000
    torchrun --standalone --nproc-per-node 2 -m megatron_scmoe.cli serve --load checkpoints/ \
        --expert-model-parallel-size 2

takes a Megatron checkpoint (torch_dist) of a ScMoE or a stock GPT, saved at any layout and loaded at
any. It answers /v1/completions, /v1/chat/completions, /v1/models, /health and /metrics, and asks no
client who it is. SIGTERM or Ctrl-C ends it: what is being written is written to its end.
"""

import errno
import signal
import socket
import sys
import threading
from argparse import Namespace
from pathlib import Path

from megatron_scmoe.cli import program
from megatron_scmoe.cli.expert_flags import (
    add_expert_flags,
    check_expert_flags,
    expert_offload,
)
from megatron_scmoe.cli.generate import check_model
from megatron_scmoe.cli.model_flags import (
    add_text_flags,
    check_layout,
    chunk_of_prompts,
    layout,
)
from megatron_scmoe.cli.process import initialise_ranks, quiet_imports
from megatron_scmoe.platform.command_line import (
    OneLineParser,
    UsageError,
    check_input,
    is_first_rank,
)

READERS_GRACE_S = 5
"""How long clients may take to read the last of their answers, when the server ends."""


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description="Serve a checkpoint's model over HTTP, as OpenAI's API.")
    add_text_flags(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS",
        help="address to listen at; 0.0.0.0 is all of this machine",
    )  # fmt: skip
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one")
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="by which clients ask for it (default: that of the "
        "folder)",
    )  # fmt: skip
    parser.add_argument(
        "--inference-max-requests", type=int, default=16, metavar="N", help="texts written at once"
    )
    parser.add_argument(
        "--inference-max-seq-length", type=int, metavar="N",
        help="the most tokens of a text, its prompt included (default: what the model can)",
    )  # fmt: skip
    parser.add_argument(
        "--max-queue", type=int, default=256, metavar="N",
        help="texts that may wait; a request with more is answered with status 429",
    )  # fmt: skip
    parser.add_argument(
        "--timeout-graceful-shutdown", type=float, default=20, metavar="SECONDS",
        help="how long texts may still be written when the server is to end",
    )  # fmt: skip
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE",
        help="Jinja template that makes a chat a text (default: the tokenizer's, if it has one)",
    )  # fmt: skip
    add_expert_flags(parser)
    args = parser.parse_args(argv)
    check_flags(args)
    if not is_first_rank():
        quiet_imports()
        serve(args, read_template(args.chat_template), None)
        return
    with bind(args.host, args.port) as listener:
        quiet_imports()
        serve(args, read_template(args.chat_template), listener)


def check_flags(args: Namespace) -> None:
    """Refuse what cannot work before seconds go into imports."""
    check_layout(args)
    for name, least in (
        ("inference_max_requests", 1),
        ("inference_max_seq_length", 2),
        ("max_queue", 0),
        ("timeout_graceful_shutdown", 0),
    ):
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise UsageError(f"--{name.replace('_', '-')} {value}: accepted is {least} or more")
    if args.chat_template is not None:
        check_input("--chat-template", args.chat_template)
    check_expert_flags(args)
    chunk_of_prompts(args, 1, "--inference-max-requests")
    if not 0 <= args.port < 1 << 16:
        raise UsageError(f"--port {args.port}: accepted is 0 to {(1 << 16) - 1}")


def bind(host: str, port: int) -> socket.socket:
    """A socket that has that address to itself; clients can connect after :func:`listen`.

    Raises:
        UsageError: if there is no such address, or it is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            # Connections of a server that has ended may be all that is left there. Two that both
            # ask so would both have the address, until one listens; so it is not asked at first.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        raise _no_address(host, port, error) from error
    return listener


def listen(listener: socket.socket) -> None:
    """Let clients connect.

    Raises:
        UsageError: if another server took the address at the same time.
    """
    host, port = listener.getsockname()[:2]
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # for the next server
        listener.listen()
    except OSError as error:
        raise _no_address(host, port, error) from error


def _no_address(host: str, port: int, error: OSError) -> UsageError:
    return UsageError(
        f"--host {host} --port {port}: {error.strerror}; accepted: an address of this machine, "
        "and a port that is free (0 takes one)"
    )


def serve(args: Namespace, template: str | None, listener: socket.socket | None) -> None:
    """Load the model on every rank and serve until a signal comes; the first rank has a listener.

    Args:
        template: of --chat-template.
    """
    import torch

    from megatron_scmoe.inference.exported import as_megatron

    offload = expert_offload(args)
    is_mine = initialise_ranks()
    with as_megatron(args.load, args.ckpt_step) as load:
        slots, served = load_slots(args, load, template, offload)
    try:
        if listener is None:
            from megatron_scmoe.inference import engine

            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)  # the first rank says when it ends
            engine.follow(slots, offload)
        else:
            run_first_rank(args, slots, served, listener, offload)
    finally:
        slots.close()
    if is_mine:
        torch.distributed.destroy_process_group()


def load_slots(args: Namespace, load: str, template: str | None, offload):
    """The batch of the checkpoint ``load``, and what is served of it; ``offload`` has its experts."""
    import torch

    from megatron_scmoe.checkpoints.model_arguments import DTYPES
    from megatron_scmoe.checkpoints.vocabulary import count_tokens
    from megatron_scmoe.errors import lacks_memory
    from megatron_scmoe.inference.slots import Slots
    from megatron_scmoe.serving.app import ServedModel
    from megatron_scmoe.training import load_model

    checkpoint = load_model.Checkpoint(load, args.ckpt_step, given=args.load)
    length = check_checkpoint(args, checkpoint)
    tokenizer = load_model.tokenizer_of(checkpoint, args.tokenizer_model, template)
    if template is None:
        check_template_of(tokenizer, args.tokenizer_model or checkpoint.args.tokenizer_model)
    vocab_size = count_tokens(
        checkpoint.args.padded_vocab_size, checkpoint.args.vocab_size, tokenizer.vocab_size
    )
    dtype = DTYPES[args.dtype] if args.dtype else None
    size = args.inference_max_requests
    ranks = torch.distributed.get_world_size()
    dense = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    texts = -(-size // max(1, ranks // dense))  # of each data-parallel rank
    chunk = chunk_of_prompts(args, texts, "--inference-max-requests")
    model = load_model.build_model(
        checkpoint, layout(args), dtype, local_attention=True, elsewhere=offload
    )
    if offload is not None:
        offload.attach(model, checkpoint.path, texts, "--inference-max-requests")
    try:
        slots = Slots(
            model,
            vocab_size,
            size,
            length,
            args.decode_schedule,
            args.decode_padding,
            chunk,
            args.decode_cuda_graphs,
        )
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        raise UsageError(
            f"--inference-max-requests {size}: the cache of {size} texts of up to {length} tokens does "
            "not fit the memory; accepted: fewer, or a smaller --inference-max-seq-length"
        ) from error
    name = args.served_model_name or checkpoint.name
    return slots, ServedModel(name, tokenizer, vocab_size, length)


def read_template(file: Path | None) -> str | None:
    """The chat template in a file.

    Raises:
        UsageError: if it is no template, of which a client would be told otherwise.
    """
    if file is None:
        return None
    accepted = "accepted is a text file with a Jinja template"
    try:
        template = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"--chat-template {file}: it is not UTF-8; {accepted}") from error
    if flaw := find_flaw(template):
        raise UsageError(f"--chat-template {file}: {flaw}; {accepted}")
    return template


def check_template_of(tokenizer, model: str) -> None:
    """Refuse a tokenizer whose own chat template is none; it may have several, by name."""
    templates = tokenizer.chat_template or {}
    if isinstance(templates, str):
        templates = {"": templates}
    for template in templates.values():
        if flaw := find_flaw(template):
            raise UsageError(
                f"--tokenizer-model {model}: its chat template: {flaw}; accepted is --chat-template "
                "with a Jinja template"
            )


def find_flaw(template: str) -> str | None:
    """Why it is no Jinja template, as transformers reads them and so Megatron's tokenizers."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(template)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    except RecursionError:
        return "nested too deeply to be read"
    return None


def check_checkpoint(args: Namespace, checkpoint) -> int:
    """Refuse models that cannot be served; the most tokens of a text."""
    from megatron_scmoe.training.load_model import NULL_TOKENIZER

    saved = checkpoint.args
    if saved.tokenizer_type == NULL_TOKENIZER and args.tokenizer_model is None:
        raise UsageError(
            f"--load {args.load}: the checkpoint's tokenizer is {NULL_TOKENIZER}, which reads ids "
            "only; accepted: --tokenizer-model MODEL"
        )
    check_model(args.load, saved)
    if saved.window_size is not None:
        raise UsageError(
            f"--load {args.load}: it was trained with --window-size {saved.window_size}, and texts "
            "that join a batch need a mask of their own; accepted is a checkpoint trained without"
        )
    longest = saved.max_position_embeddings
    length = args.inference_max_seq_length or longest
    if length > longest:
        raise UsageError(
            f"--inference-max-seq-length {length}: the model's --max-position-embeddings is "
            f"{longest}; accepted is 2 to {longest}"
        )
    return length


def run_first_rank(args: Namespace, slots, model, listener: socket.socket, offload) -> None:
    """Run the engine on this thread and HTTP on another, until a signal or an error ends both."""
    import uvicorn

    from megatron_scmoe.inference.engine import Engine
    from megatron_scmoe.serving.app import Service

    engine = Engine(slots, offload)
    server = uvicorn.Server(
        uvicorn.Config(
            Service(engine, model, args.max_queue).app(),
            http="h11",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=READERS_GRACE_S,
        )
    )

    failures = []

    def serve_http() -> None:
        try:
            server.run(sockets=[listener])
        except Exception as error:
            failures.append(error)
        finally:
            engine.close(0)

    def end(number: int, _) -> None:
        engine.close(0 if engine.is_closing else args.timeout_graceful_shutdown)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    http = threading.Thread(target=serve_http, name="http")
    listen(listener)
    host, port = listener.getsockname()[:2]
    experts = ""
    if offload is not None and offload.cache is not None:
        experts = f", that of experts {offload.cache.nbytes / 2**20:.1f} MiB"
    print(
        f"serving {model.name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1: "
        f"{slots.size} texts at once of up to {model.length} tokens, {args.max_queue} may wait; "
        f"their cache takes {slots.cache_bytes / 2**20:.1f} MiB{experts}",
        flush=True,
    )
    http.start()
    try:
        engine.run()
    finally:
        server.should_exit = True
        http.join()
    for error in failures:
        raise error


if __name__ == "__main__":
    program.main(["serve", *sys.argv[1:]])
