"""Text that a checkpoint's model writes behind prompts.

    scmoe generate --load checkpoints/ --prompts "Once upon a time"
    scmoe generate --load checkpoints/ --prompt-file prompts.jsonl --temperature 0.8 \
        --output-path texts.jsonl
    torchrun --standalone --nproc-per-node 2 -m megatron_scmoe.cli generate --load checkpoints/ \
        --prompts "Once" --expert-model-parallel-size 2

takes a Megatron checkpoint (torch_dist) of a ScMoE or a stock GPT, saved at any layout and loaded at
any. One prompt is shown with its text while it is written. Several, or log-probabilities, give one
JSON line for each prompt, in their order. Without a flag of sampling the likeliest token is taken.
"""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_scmoe.cli import program
from megatron_scmoe.cli.expert_flags import (
    add_expert_flags,
    check_expert_flags,
    expert_offload,
)
from megatron_scmoe.cli.model_flags import (
    add_text_flags,
    check_layout,
    chunk_of_prompts,
    layout,
)
from megatron_scmoe.cli.process import initialise_ranks, quiet_imports
from megatron_scmoe.errors import NOT_JSON
from megatron_scmoe.platform.command_line import (
    OneLineParser,
    UsageError,
    check_input,
    check_output,
    is_first_rank,
    refuse_overwrite,
    refuse_same,
    staged_outputs,
)

NO_TERMINATION = -1
"""--termination-id of a text that no token ends."""


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description="Text that a checkpoint's model writes behind prompts.")
    add_text_flags(parser)
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--prompts", nargs="+", metavar="TEXT", help="what the texts begin with")
    texts.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="JSON lines, each with a key text"
    )
    parser.add_argument(
        "--output-path", type=Path, metavar="FILE", help="write JSON lines to this .jsonl file"
    )
    parser.add_argument("--force", action="store_true", help="overwrite --output-path")
    parser.add_argument(
        "--num-tokens-to-generate", type=int, default=30, metavar="N",
        help="the most tokens behind a prompt",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=float, metavar="T",
        help="divides the logits before sampling (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--top_k", "--top-k", type=int, metavar="K",
        help="sample among the K likeliest tokens; 1 takes the likeliest, 0 is all (default: 1, and "
        "0 if --temperature or --top_p is given)",
    )  # fmt: skip
    parser.add_argument(
        "--top_p", "--top-p", type=float, metavar="P",
        help="sample among the likeliest tokens that have the probability P together; 0 and 1 are all "
        "(default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, metavar="N",
        help="of sampling; each prompt draws its own (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--stop-words", nargs="+", default=[], metavar="TEXT", help="a text ends before them"
    )
    parser.add_argument(
        "--termination-id", type=int, metavar="ID",
        help=f"a text ends at this token, {NO_TERMINATION} is none (default: the tokenizer's end of "
        "a document)",
    )  # fmt: skip
    parser.add_argument(
        "--return-log-probs", action="store_true",
        help="log-probabilities of the tokens, those of the prompt included",
    )  # fmt: skip
    parser.add_argument(
        "--top-n-logprobs", type=int, default=0, metavar="N",
        help="the N likeliest tokens in each place, with their log-probabilities",
    )  # fmt: skip
    parser.add_argument("--micro-batch", type=int, default=8, metavar="N", help="prompts at once")
    add_expert_flags(parser)
    args = parser.parse_args(argv)
    check_flags(args)
    prompts = read_prompts(args)
    chunk_of_prompts(args, min(args.micro_batch, len(prompts)), "--micro-batch")

    quiet_imports()
    generate(args, prompts)


def check_flags(args: Namespace) -> None:
    """Refuse what cannot work before seconds go into imports; settle how tokens are sampled."""
    check_layout(args)
    for name in ("num_tokens_to_generate", "micro_batch"):
        if getattr(args, name) < 1:
            raise UsageError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: accepted is 1 or more"
            )
    if args.top_n_logprobs < 0:
        raise UsageError(f"--top-n-logprobs {args.top_n_logprobs}: accepted is 0 or more")
    settle_sampling(args)
    if args.termination_id is not None and args.termination_id < NO_TERMINATION:
        raise UsageError(f"--termination-id {args.termination_id}: accepted is an id, or -1")
    check_expert_flags(args)
    if "" in args.stop_words:
        raise UsageError("--stop-words '': accepted are words of one character or more")
    if args.output_path is not None:
        check_output("--output-path", args.output_path, [".jsonl"])
        refuse_overwrite("--output-path", [args.output_path], args.force)
        refuse_same("--output-path", args.output_path, args.prompt_file)


def settle_sampling(args: Namespace) -> None:
    """Give the flags of sampling that were not given their values, as SamplingParams has them.

    Raises UsageError for values that cannot be.
    """
    temperature, top_k, top_p, seed = args.temperature, args.top_k, args.top_p, args.seed
    if temperature is not None and not 0 < temperature < float("inf"):
        raise UsageError(
            f"--temperature {temperature}: accepted is more than 0; --top_k 1 takes the likeliest token"
        )
    if top_p is not None and not 0 <= top_p <= 1:
        raise UsageError(f"--top_p {top_p}: accepted is 0 to 1")
    for flag, value in (("--top_k", top_k), ("--seed", seed)):
        if value is not None and value < 0:
            raise UsageError(f"{flag} {value}: accepted is 0 or more")
    samples = (temperature, top_k, top_p) != (None, None, None)
    if seed is not None and (not samples or top_k == 1):
        given = f"--seed {seed}" + " with --top_k 1" * samples
        raise UsageError(
            f"{given}: the likeliest token is taken, and none is drawn; accepted with "
            "--temperature, --top_p, or --top_k other than 1"
        )
    args.temperature = 1.0 if temperature is None else temperature
    args.top_p = top_p if top_p and top_p < 1 else 0.0  # of all tokens
    args.seed = seed or 0
    if top_k is None:
        args.top_k = 0 if samples else 1
    if args.top_k and args.top_p:
        raise UsageError(
            f"--top_k {top_k} with --top_p {top_p}: accepted is one of them; leave the other out"
        )


def read_prompts(args: Namespace) -> list[str]:
    """The texts of --prompts or --prompt-file.

    Raises UsageError for one that is not to be had.
    """
    if args.prompts is not None:
        for number, text in enumerate(args.prompts, start=1):
            if not _is_text(text):
                raise UsageError(f"--prompts: prompt {number} is not UTF-8; accepted is UTF-8 text")
        return args.prompts
    file = args.prompt_file
    check_input("--prompt-file", file)
    prompts = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (*NOT_JSON, KeyError, TypeError):
            text = None
        if not _is_text(text):
            raise UsageError(
                f'--prompt-file {file}:{number}: accepted is a line as {{"text": "Once upon"}}, in '
                "UTF-8"
            )
        prompts.append(text)
    if not prompts:
        raise UsageError(f"--prompt-file {file}: there is no prompt in it")
    return prompts


def generate(args: Namespace, prompts: list[str]) -> None:
    """Generate on every rank; the first one writes."""
    import torch

    from megatron_scmoe.inference.exported import as_megatron

    offload = expert_offload(args)
    is_mine = initialise_ranks()
    with as_megatron(args.load, args.ckpt_step) as load:
        write_texts(args, prompts, load, offload)
    if is_mine:
        torch.distributed.destroy_process_group()


def write_texts(args: Namespace, prompts: list[str], load: str, offload) -> None:
    """Load the checkpoint ``load``, and write behind the prompts; ``offload`` may have its experts."""
    from megatron.core.inference.sampling_params import SamplingParams

    from megatron_scmoe.checkpoints.model_arguments import DTYPES
    from megatron_scmoe.checkpoints.vocabulary import count_tokens
    from megatron_scmoe.inference import generation
    from megatron_scmoe.inference.decode_schedule import Decode
    from megatron_scmoe.inference.text import Continuation
    from megatron_scmoe.training import load_model

    checkpoint = load_model.Checkpoint(load, args.ckpt_step, given=args.load)
    kind = checkpoint.args.tokenizer_type
    if kind == load_model.NULL_TOKENIZER and args.tokenizer_model is None:
        raise UsageError(
            f"{prompt_flag(args)}: the checkpoint's tokenizer is {kind}, which reads ids only; "
            "accepted: --tokenizer-model MODEL"
        )
    tokenizer = load_model.tokenizer_of(checkpoint, args.tokenizer_model)
    vocab_size = count_tokens(
        checkpoint.args.padded_vocab_size, checkpoint.args.vocab_size, tokenizer.vocab_size
    )
    ids = [tokenizer.tokenize(prompt) for prompt in prompts]
    check_prompts(args, ids, vocab_size, checkpoint.args)
    termination = tokenizer.eod if args.termination_id is None else args.termination_id
    sampling = SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        num_tokens_to_generate=args.num_tokens_to_generate,
        termination_id=None if termination == NO_TERMINATION else termination,
        return_log_probs=args.return_log_probs,
        top_n_logprobs=args.top_n_logprobs,
    )
    dtype = DTYPES[args.dtype] if args.dtype else None
    at_once = min(args.micro_batch, len(prompts))
    chunk = chunk_of_prompts(args, at_once, "--micro-batch")
    model = load_model.build_model(
        checkpoint,
        layout(args),
        dtype,
        local_attention=chunk is not None,
        elsewhere=offload,
    )
    if offload is not None:
        offload.attach(model, checkpoint.path, at_once)
    decode = Decode(model, args.decode_schedule, args.decode_padding, args.decode_cuda_graphs)
    texts = [Continuation(tokenizer, prompt, args.stop_words) for prompt in ids]
    streams = len(prompts) == 1 and not (
        args.output_path or args.return_log_probs or args.top_n_logprobs
    )

    def show(text: str) -> None:
        if streams and is_first_rank():
            print(text, end="", flush=True)

    with _output(args) as output:
        show(prompts[0])
        completions = generation.generate(
            model,
            ids,
            sampling,
            vocab_size,
            seed=args.seed,
            micro_batch=args.micro_batch,
            is_stop=lambda prompt, tokens: texts[prompt].stops(tokens),
            on_token=lambda prompt, tokens: show(texts[prompt].new_text(tokens)),
            shows_progress=not streams and is_first_rank(),
            decode=decode,
            chunk=chunk,
        )
        show(texts[0].new_text(completions[0].tokens, is_last=True) + "\n")
        if not streams and is_first_rank():
            is_ascii = (output.encoding or "utf-8").lower() not in ("utf-8", "utf8")
            for prompt, own_ids, text, completion in zip(prompts, ids, texts, completions):
                record = describe(prompt, own_ids, text, completion, args, tokenizer)
                print(json.dumps(record, ensure_ascii=is_ascii), file=output)
    if offload is not None:
        line = offload.report(sum(len(completion.tokens) for completion in completions))
        if is_first_rank():
            print(line, file=sys.stderr)
    if not streams and is_first_rank():
        for count, name in decode.kept().items():
            print(f"decode of {count} texts at once: {name} was faster", file=sys.stderr)


def check_prompts(args: Namespace, ids: list[list[int]], vocab_size: int, saved) -> None:
    """Refuse prompts and settings that the model cannot have."""
    flag = prompt_flag(args)
    longest = saved.max_position_embeddings
    check_model(args.load, saved)
    for number, prompt in enumerate(ids, start=1):
        if not prompt:
            raise UsageError(f"{flag}: prompt {number} is empty; accepted is a token or more")
        if max(prompt) >= vocab_size:
            raise UsageError(
                f"{flag}: the tokenizer makes id {max(prompt)} of prompt {number}, and the model has "
                f"{vocab_size} tokens; accepted is --tokenizer-model with the one it was trained with"
            )
        if len(prompt) + args.num_tokens_to_generate > longest:
            room = longest - len(prompt)
            raise UsageError(
                f"{flag}: prompt {number} has {len(prompt)} tokens, and with "
                f"--num-tokens-to-generate {args.num_tokens_to_generate} that is more than the "
                f"model's --max-position-embeddings {longest}; accepted: "
                + (
                    f"--num-tokens-to-generate {room} or less"
                    if room > 0
                    else f"prompts of {longest - 1} tokens or less"
                )
            )
    for name, value in (("--top_k", args.top_k), ("--top-n-logprobs", args.top_n_logprobs)):
        if value > vocab_size:
            raise UsageError(f"{name} {value}: the model has {vocab_size} tokens")
    if args.termination_id is not None and args.termination_id >= vocab_size:
        raise UsageError(
            f"--termination-id {args.termination_id}: accepted are ids from 0 to {vocab_size - 1}, "
            "or -1"
        )


def check_model(load: str, saved) -> None:
    """Refuse a model whose texts would depend on what else is in a batch."""
    if saved.moe_expert_capacity_factor is not None:
        raise UsageError(
            f"--load {load}: it was trained with --moe-expert-capacity-factor "
            f"{saved.moe_expert_capacity_factor}, which drops tokens by what else is in a batch; "
            "accepted is a checkpoint trained without"
        )


def prompt_flag(args: Namespace) -> str:
    return "--prompts" if args.prompts else f"--prompt-file {args.prompt_file}"


def describe(prompt: str, ids: list[int], text, completion, args: Namespace, tokenizer) -> dict:
    """What a JSON line holds, by the names of Megatron's ``InferenceRequest``."""
    record = dict(
        prompt=prompt,
        generated_text=text.text(completion.tokens),
        finish_reason=completion.finish_reason,
        prompt_tokens=ids,
        generated_tokens=completion.tokens,
    )
    if args.return_log_probs:
        record |= dict(
            prompt_log_probs=completion.prompt_log_probs, generated_log_probs=completion.log_probs
        )
    if args.top_n_logprobs:
        record["generated_top_n_logprobs"] = [
            [
                dict(id=token, text=tokenizer.detokenize([token]), log_prob=log_prob)
                for token, log_prob in best
            ]
            for best in completion.top_n
        ]
    return record


def _is_text(text) -> bool:
    """Whether it is a string that UTF-8 can hold: no halves of surrogate pairs."""
    return isinstance(text, str) and text == text.encode("utf-8", "replace").decode()


@contextmanager
def _output(args: Namespace) -> Iterator:
    """What lines are printed to; on the first rank the file of --output-path, whole or not at all."""
    if args.output_path is None:
        yield sys.stdout
    elif not is_first_rank():
        with open(os.devnull, "w") as stream:
            yield stream
    else:
        with (
            staged_outputs("--output-path", [args.output_path]) as (part,),
            open(part, "w", encoding="utf-8") as stream,
        ):
            yield stream


if __name__ == "__main__":
    program.main(["generate", *sys.argv[1:]])
