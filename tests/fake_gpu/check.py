"""
The trainer's CUDA path on a machine without a GPU: see README.md.

    python tests/fake_gpu/check.py DIR                        # every case; the first time it sets up DIR, 5 GB
    python tests/fake_gpu/check.py DIR --torch 2.11.0 "8 GB"  # with another torch, in another DIR; one case
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
LIBRARIES = ["libc10_cuda", "libtorch_cuda", "libtorch_python", "libcaffe2_nvrtc", "libtorch_cuda_linalg"]
REPLACED = re.compile("(cuda|__cuda|cublas|cudnn|cusparse|cusolver|cufft|nccl|cu)[A-Z]")
BY_NAME = {"cuCtxGetLimit", "cuCtxSetLimit", "cuTensorMapEncodeIm2col"}  # Triton looks for them
TARGET = """#define NV_PROVIDES_SM_53
#define NV_IS_DEVICE 0
#define NV_IS_HOST 1
#define NV_IF_TARGET(...)
#define NV_IF_ELSE_TARGET(...)
"""  # of CUDA's header nv/target, which no wheel has, what its other headers ask for

# both with everything that a run does besides training
SMALL = "--n_layer 2 --n_embd 128 --n_head 2 --sequence_length 128 --micro_batch_size 4 --total_batch_size 1024"
SMALL += " --max_steps 6 --warmup_steps 2 --val_every 2 --hellaswag_every 2 --sample_every 2 --checkpoint_every 3"
LARGE = "--total_batch_size 16384 --max_steps 3 --warmup_steps 1 --val_every 2 --val_tokens 16384 --hellaswag_every 2"
LARGE += " --sample_every 2 --checkpoint_every 0"


def symbols(path, kind):
    """The names that nm gives of a library's defined or undefined symbols."""
    listed = subprocess.run(["nm", *kind, str(path)], check=True, capture_output=True, text=True).stdout
    return {line.split()[-1].split("@")[0] for line in listed.splitlines() if line.strip()}


def set_up(folder, torch_version):
    """A virtual environment with the CUDA build of torch, and the library that is loaded before CUDA's own."""
    folder.mkdir(parents=True, exist_ok=True)
    # '===' is that very version: '==' would also take a CPU build (2.13.0+cpu)
    wanted = (ROOT / "requirements.txt").read_text()
    wanted = re.sub(r"^torch==([\d.]+)", lambda found: f"torch==={torch_version or found[1]}", wanted, flags=re.M)
    (folder / "requirements.txt").write_text(wanted)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    pip = [folder / "venv" / "bin" / "pip", "install", "-q"]
    subprocess.run([*pip, "-r", folder / "requirements.txt", "psutil", "pytest"], check=True)
    subprocess.run([*pip, "cuda-toolkit[crt]"], check=True)  # headers, of the CUDA version that torch chose


def build(folder):
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    (folder / "include" / "nv").mkdir(parents=True, exist_ok=True)
    (folder / "include" / "nv" / "target").write_text(TARGET)
    compiler = ["gcc", "-O1", "-fPIC", "-w"]
    headers = [f"-I{path}" for path in [folder / "include", *site.glob("nvidia/*/include")]]
    written = [*compiler, "-D__CUDA_NO_HALF_OPERATORS__", *headers, "-c", HERE / "fake_gpu.c", "-o", "fake_gpu.o"]
    subprocess.run(written, cwd=folder, check=True)
    asked = {name for lib in LIBRARIES for name in symbols(site / "torch" / "lib" / f"{lib}.so", ["-D", "-u"])}
    others = {name for name in asked if REPLACED.match(name) and not name.startswith(("cudnnGetVersion", "cuFile"))}
    missing = sorted((others | BY_NAME) - symbols(folder / "fake_gpu.o", ["--defined-only"]))
    (folder / "others.c").write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in missing))
    others = [*compiler, "-fno-builtin", "-c", "others.c", "-o", "others.o"]
    library = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1", "fake_gpu.o", "others.o"]
    for command in (others, [*library, "-lpthread", "-lrt"], ["ln", "-sf", "libcuda.so.1", "libnvidia-ml.so.1"]):
        subprocess.run(command, cwd=folder, check=True)


class Lab:
    """folder: where the library and its Python are; work: shards, HellaSwag items and the logs of the runs."""

    def __init__(self, folder, work):
        from support import write_items, write_shards

        self.folder, self.work = folder, work
        write_shards(work / "data", [40_000, 400_000], vocab_size=50_000)
        write_items(work / "hellaswag_val.jsonl", 40)

    def run(self, flags, gpus=1, gib=140, ranks=0, log="log", **env):
        """Train with these flags; returns (exit code, output)."""
        folder, torchrun = self.folder, "-m torch.distributed.run --standalone --local-addr=127.0.0.1 --max-restarts=1"
        command = [folder / "venv" / "bin" / "python"]
        command += [*torchrun.split(), f"--nproc_per_node={ranks}"] if ranks else []
        folders = ["--data_dir", self.work / "data", "--log_dir", self.work / log, "--plot_every", "0"]
        result = subprocess.run(
            [*command, HERE / "probe.py", *folders, "--device", "cuda", *flags.split()], cwd=ROOT, text=True,
            env={**os.environ, "LD_PRELOAD": f"{folder}/libcuda.so.1", "LD_LIBRARY_PATH": str(folder),
                 "TRITON_LIBCUDA_PATH": str(folder), "TRITON_CACHE_DIR": f"{folder}/triton", "OMP_NUM_THREADS": "1",
                 "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TORCHINDUCTOR_COMPILE_THREADS": "1",
                 "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",  # cuDNN's attention is not replaced
                 "HELLASWAG_FOLDER": str(self.work), "PYTHONPATH": f"{ROOT}:{ROOT}/tests", "FAKE_COUNT": str(gpus),
                 "FAKE_MEM": str(int(gib * 2**30)), **env},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return result.returncode, result.stdout

    def new_log(self):
        shutil.rmtree(self.work / "log", ignore_errors=True)


def expect(condition, what, output):
    if not condition:
        raise AssertionError(f"{what}:\n{output[-6000:]}")


def steps_of(output):
    """What the probe counted in each step, as dicts."""
    found = re.findall(r"train_step \| (.*)", output)
    return [dict((name, int(count)) for count, name in re.findall(r"(\d+) (\w+)", line)) for line in found]


def trained_in_peace(lab, flags, **options):
    """A run to its end in which nothing breaks a graph or compiles after step 0, and each step waits twice."""
    code, output = lab.run(flags, TORCH_LOGS="recompiles,graph_breaks", **options)
    expect(code == 0 and "done:" in output, "it did not end well", output)
    expect(("compile on" in output) == ("--no-compile" not in flags), "it was not compiled as asked", output)
    before, after = re.split(r"step +\d+/\d+ ", output, maxsplit=1)
    expect("Graph break" not in output and "Recompiling" not in after, "a graph broke, or was compiled again", output)
    steps = steps_of(output)
    expect(all(step["syncs"] == 2 and step["launches"] == steps[-1]["launches"] for step in steps[1:]), steps, output)
    return output


def compiled(lab):
    output = trained_in_peace(lab, SMALL)
    expect(output.count("| HellaSwag") == 4 and output.count("| sample") == 9, "", output)


def eager(lab):
    trained_in_peace(lab, SMALL + " --no-compile")


def resumed(lab):
    for dtype in ("bfloat16", "float16"):
        lab.new_log()
        trained_in_peace(lab, f"{SMALL} --dtype {dtype} --max_steps 3")
        output = trained_in_peace(lab, f"{SMALL} --dtype {dtype} --init_from resume")
        expect("resuming at step 3" in output, "it did not resume", output)


def two_ranks(lab):
    """Over NCCL; rank 1 is killed once, and torchrun starts both again."""
    output = trained_in_peace(lab, SMALL, gpus=2, ranks=2)
    lab.new_log()
    code, output = lab.run(SMALL, gpus=2, ranks=2, DIES="1")
    expect(code == 0 and "resuming at step 3" in output and "done:" in output, "it did not restart", output)


def more_ranks_than_gpus(lab):
    code, output = lab.run(SMALL + " --total_batch_size 1536", gpus=2, ranks=3)
    expect(code and "3 ranks" in output and "sees 2 GPUs" in output and "invalid device" not in output, "", output)


def out_of_memory(lab):
    """What the rehearsal accepts runs to its end, and a card that has a little more than the peak is enough."""
    for flags in ("--n_layer 2 --micro_batch_size 8", "--n_layer 2 --micro_batch_size 4 --no-compile"):
        peak = 0.0
        for room in (None, 0.25, 0.12, 0.0, -0.5):  # GiB beyond the peak of an unlimited card
            lab.new_log()
            output = trained_in_peace(lab, f"{LARGE} {flags}", gib=140 if room is None else peak + room)
            peak = peak or max(map(float, re.findall(r"at most ([\d.]+) GiB", output)))
            fewer = "reduced from" in output
            expect(not fewer if room is None or room > 0.2 else fewer or room > -0.5, f"{room} GiB more", output)


def on_8_gb(lab):
    output = trained_in_peace(lab, f"{LARGE} --micro_batch_size 16", gib=8e9 / 2**30)
    expect("micro-batches of" in output, "", output)


def xl(lab):
    flags = f"--preset gpt2-xl {LARGE} --max_steps 1 --activation_checkpointing --no-compile --micro_batch_size 4"
    output = trained_in_peace(lab, flags, gib=80e9 / 2**30)
    expect("micro-batches of 4 x 1024" in output, "", output)


def pinned_memory(lab):
    """What the compiler's trials pinned on the host in the rehearsal is given back."""
    shutil.rmtree(lab.folder / "inductor", ignore_errors=True)
    output = trained_in_peace(lab, f"{LARGE} --n_layer 1 --micro_batch_size 8")
    pinned = float(re.search(r"([\d.]+) GiB pinned", output)[1])
    expect(pinned < 0.1, f"{pinned} GiB are pinned", output)


CASES = {
    "compiled": compiled, "eager": eager, "resumed": resumed, "two ranks": two_ranks, "pinned": pinned_memory,
    "more ranks than GPUs": more_ranks_than_gpus, "out of memory": out_of_memory, "8 GB": on_8_gb, "XL": xl,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="where the wheels and the library are, or will be")
    parser.add_argument("cases", nargs="*", help=f"some of {', '.join(CASES)} (default: all)")
    parser.add_argument("--torch", help="another version than that of requirements.txt")
    args, failed = parser.parse_intermixed_args(), []
    args.folder = args.folder.resolve()
    if not (args.folder / "venv").exists():
        set_up(args.folder, args.torch)
    build(args.folder)
    for name in args.cases or CASES:
        start = time.time()
        with tempfile.TemporaryDirectory() as work:
            try:
                CASES[name](Lab(args.folder, Path(work)))
            except Exception:
                failed.append(name)
                traceback.print_exc()
        print(f"{name}: {'FAILED' if name in failed else 'passed'}, {time.time() - start:.0f} s", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
