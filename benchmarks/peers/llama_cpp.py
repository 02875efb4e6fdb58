"""llama.cpp on a GGUF file, driven over standard input as ``llama.py`` is.

Runs in an environment of its own (``pip install xllamacpp gguf``); it imports nothing of tokenlab.

python llama_cpp.py decode BATCH PROMPT NEW --model FILE.gguf [--float32]
"""

import argparse
import os
import pathlib
import random
import sys
import tempfile
import time

import gguf
import xllamacpp


def dequantised(path, folder):
    """The file with its weights in float32."""
    reader = gguf.GGUFReader(path)
    name = reader.get_field("general.architecture").contents()
    out = pathlib.Path(folder) / "float32.gguf"
    writer = gguf.GGUFWriter(out, name)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in (
            "general.architecture",
            "general.file_type",
        ):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def serving(path, batch, length, threads):
    """A server in this process with a slot for every row."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel = batch
    params.n_ctx = batch * length
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers = 0
    params.verbosity = -1
    return xllamacpp.Server(params)


def main():
    """Parses the command line and serves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=["decode"])
    parser.add_argument("sizes", nargs=3, type=int)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--float32", action="store_true")
    options = parser.parse_args()
    batch, prompt, new = options.sizes
    # Its log goes to standard output, which is the line to whoever drives this.
    ours = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as folder:
        path = dequantised(options.model, folder) if options.float32 else options.model
        server = serving(path, batch, prompt + new + 64, options.threads)
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 40_000) for _ in range(prompt)] for _ in range(batch)]
    request = {
        "prompt": prompts,
        "n_predict": new,
        "ignore_eos": True,
        "temperature": 0,
        "cache_prompt": False,
    }

    def work():
        answer = server.handle_completions(request)
        ends = [choice["finish_reason"] for choice in answer["choices"]]
        if ends != ["length"] * batch or answer["usage"]["completion_tokens"] != new:
            raise SystemExit(f"not {new} tokens for each of {batch} rows: {answer}")

    work()
    print("ready", 0, file=ours, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        work()
        print(time.perf_counter() - start, file=ours, flush=True)


if __name__ == "__main__":
    main()
