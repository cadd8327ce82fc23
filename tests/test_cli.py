"""The command line as a person uses it: what is printed where, when, and what happens when something is wrong."""

import errno
import gc
import io
import json
import mmap
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import alula
import pytest
import torch
from alula.cli import main
from alula.config import AutoConfig, GPTBigCodeConfig
from alula.generation import Generation
from alula.limits import large_page_ones, last_level_cache_bytes, read_bandwidth
from alula.models import AutoModelForCausalLM, GPTBigCodeForCausalLM
from alula.tokenization import AutoTokenizer

tokenizers = pytest.importorskip("tokenizers")

COMMAND = [sys.executable, "-m", "alula"]
SPEED_LINE = re.compile(
    r"alula: (\d+) prompt tokens \([\d.]+ ms\), (\d+) new tokens, [\d.]+ tokens/s, [\d.]+ GB/s of weights read, "
    r"\d+ % of the [\d.]+ GB/s this machine reads from memory( \(in cache: .*\))?(, seed \d+)?\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random model that never ends a text by itself, with a byte-level tokenizer."""
    from tokenizers import decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = GPTBigCodeConfig(
        n_embd=64,
        n_head=4,
        n_layer=2,
        n_positions=8192,
        vocab_size=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    GPTBigCodeForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def quick_bandwidth(monkeypatch):
    monkeypatch.setattr("alula.limits.read_bandwidth", lambda seconds=0.3: 30e9)


def generated(folder: Path, prompt: str, **options) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(prompt)
    out = AutoModelForCausalLM.from_pretrained(folder).generate([ids], **options)
    return tokenizer.decode(out[0, len(ids) :])


def give_stdin(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def run(args: list, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *map(str, args)], capture_output=True, timeout=60, check=False, **options)


# --- generate --------------------------------------------------------------------------------------------------------


def test_text_then_one_line_about_speed(folder, capsys):
    assert main(["generate", "def f(", "--model", str(folder), "--max-new-tokens", "12"]) == 0
    out, err = capsys.readouterr()
    text = "def f(" + generated(folder, "def f(", max_new_tokens=12)
    assert out == text if text.endswith("\n") else text + "\n"
    found = SPEED_LINE.fullmatch(err)
    assert found, err
    assert found.group(1, 2, 4) == ("6", "12", None)
    assert "in cache: " in err


def test_json_is_one_object_and_nothing_else(folder, capsys):
    args = ["generate", "naïve", "--model", str(folder), "--max-new-tokens", "9", "--temperature", "0.9", "--json"]
    assert main([*args, "--seed", "7"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    report = json.loads(out)
    assert report["prompt"] == "naïve"
    assert report["text"] == generated(folder, "naïve", max_new_tokens=9, do_sample=True, temperature=0.9, seed=7)
    assert (report["prompt_tokens"], report["new_tokens"], report["seed"]) == (6, 9, 7)
    assert (report["finish_reason"], report["stop"]) == ("length", None)
    assert report["tokens_per_second"] > 0
    assert report["weights_fit_in_cache"] is True
    assert main(args) == 0
    drawn = json.loads(capsys.readouterr().out)
    assert main([*args, "--seed", str(drawn["seed"])]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == drawn["text"]


def test_one_new_token(folder, capsys):
    assert main(["generate", "x", "--model", str(folder), "--max-new-tokens", "1"]) == 0
    assert re.fullmatch(r"alula: 1 prompt tokens \(.*\), 1 new tokens, [\d.]+ tokens/s\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "options, api",
    [
        (["--temperature", "0"], {}),
        (["--repetition-penalty", "1.3"], {"repetition_penalty": 1.3}),
        (["--top-k", "5", "--seed", "3"], {"do_sample": True, "top_k": 5, "seed": 3}),
        (["--top-p", "0.7", "--seed", "3"], {"do_sample": True, "top_p": 0.7, "seed": 3}),
        (["--min-p", "0.1", "--seed", "3"], {"do_sample": True, "min_p": 0.1, "seed": 3}),
        (["--dtype", "bf16"], {"dtype": "bfloat16"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_mean_what_they_mean_in_python(folder, capsys, options, api):
    assert main(["generate", "abc", "--model", str(folder), "--max-new-tokens", "16", "--json", *options]) == 0
    dtype = api.pop("dtype", None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    out = model.generate([tokenizer.encode("abc")], max_new_tokens=16, **api)
    assert json.loads(capsys.readouterr().out)["text"] == tokenizer.decode(out[0, 3:])


def test_stop_ends_before_the_text(folder, capsys):
    text = generated(folder, "abc", max_new_tokens=60, do_sample=True, temperature=2.0, seed=1)
    stop = next(text[i : i + 2] for i in range(10, 50) if text[i : i + 2].isascii() and len(text[i : i + 2]) == 2)
    args = ["generate", "abc", "--model", str(folder), "--max-new-tokens", "60", "--temperature", "2", "--seed", "1"]
    assert main([*args, "--json", "--stop", "never there", "--stop", stop]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["text"] == text[: text.index(stop)]
    assert (report["finish_reason"], report["stop"]) == ("stop", stop)


def test_prompt_from_standard_input(folder, capsys, monkeypatch):
    for extra in ([], ["-"]):
        give_stdin(monkeypatch, "été\n".encode())
        assert main(["generate", *extra, "--model", str(folder), "--max-new-tokens", "4", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["prompt"] == "été\n"


def test_batches_print_in_order(folder, capsys, tmp_path):
    prompts = ["def f(", "x", "import os, sys"]
    plain, lines = tmp_path / "plain.txt", tmp_path / "lines.jsonl"
    plain.write_text("\n".join([prompts[0], "", *prompts[1:]]) + "\n")
    lines.write_text("".join(json.dumps({"prompt": p, "id": 1}) + "\n" for p in prompts))
    alone = []
    args = ["--model", str(folder), "--max-new-tokens", "10", "--top-k", "50"]
    for i, prompt in enumerate(prompts):
        assert main(["generate", prompt, *args, "--seed", str(5 + i), "--json"]) == 0
        alone.append(json.loads(capsys.readouterr().out))
    for path in (plain, lines):
        assert main(["generate", "--batch-file", str(path), *args, "--seed", "5", "--json"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        reports = [json.loads(line) for line in out.splitlines()]
        keys = ("prompt", "text", "prompt_tokens", "new_tokens", "finish_reason", "seed")
        assert [[r[k] for k in keys] for r in reports] == [[r[k] for k in keys] for r in alone]
    assert main(["generate", "--batch-file", str(plain), *args, "--seed", "5"]) == 0
    out, err = capsys.readouterr()
    expected = [f"[{i}/3]\n" + r["prompt"] + r["text"] for i, r in enumerate(alone, 1)]
    assert out == "".join(text if text.endswith("\n") else text + "\n" for text in expected)
    assert SPEED_LINE.fullmatch(err)


@pytest.mark.parametrize("family", ["gpt2", "codegen"])
def test_other_families_stream_and_come_in_batches(folder, tmp_path, capsys, family):
    """A row of a padded batch is the row alone, and the text streamed is the text generated."""
    sizes = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 256, "initializer_range": 0.2}
    rotary = {"rotary_dim": 8} if family == "codegen" else {}
    config = AutoConfig.for_model(family, **sizes, **rotary, eos_token_id=None)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    shutil.copy(folder / "tokenizer.json", tmp_path)
    args = ["--model", str(tmp_path), "--max-new-tokens", "9"]
    prompts = ["def f(", "x", "import os"]
    texts = [generated(tmp_path, prompt, max_new_tokens=9) for prompt in prompts]
    assert main(["generate", prompts[0], *args]) == 0
    assert capsys.readouterr().out.rstrip("\n") == (prompts[0] + texts[0]).rstrip("\n")
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    assert main(["generate", "--batch-file", str(tmp_path / "prompts.txt"), *args, "--json"]) == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == texts


def test_rows_of_a_batch_wait_for_their_turn(capsys):
    from alula.commands.output import Printer

    printer = Printer(["a", "b", "c"], is_quiet=False)
    printer.begin()
    assert capsys.readouterr().out == "[1/3]\na"
    printer.add(["1", "2", "3"], [False, False, True])
    assert capsys.readouterr().out == "1"
    printer.add(["1\n", "2", ""], [True, False, True])
    assert capsys.readouterr().out == "1\n[2/3]\nb22"
    printer.add(["", "!", ""], [True, True, True])
    assert capsys.readouterr().out == "!\n[3/3]\nc3"
    printer.end()
    assert capsys.readouterr().out == "\n"


def test_the_model_inside_the_package(capsys):
    assets = Path(alula.__file__).parent / "assets" / "tiny-python"
    if not (assets / "model.safetensors").is_file():
        pytest.skip("this checkout holds no model")
    assert main(["generate", "def fibonacci(n):", "--max-new-tokens", "16", "--seed", "1"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("def fibonacci(n):")
    assert re.fullmatch(r"alula: \d+ prompt tokens \(.* ms\), \d+ new tokens, .*\n", err)


# --- what is wrong ---------------------------------------------------------------------------------------------------


def test_errors_are_one_line_that_says_what_to_do(folder, capsys, tmp_path, monkeypatch):
    model = ["--model", str(folder)]
    file = tmp_path / "file"
    file.write_text('{"prompt": "x"}\nnot json\n')
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "no_tokenizer").mkdir()
    (tmp_path / "no_tokenizer" / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "no_weights").mkdir()
    (tmp_path / "broken").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "no_weights" / name).write_bytes((folder / name).read_bytes())
        (tmp_path / "broken" / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "odd" / "config.json").write_text('{"model_type": {}}')
    (tmp_path / "broken" / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    cases = [
        (["generate", "", *model], "the prompt is empty"),
        (["generate", "x" * 8192, *model], "n_positions=8192"),
        (["generate", "xx", *model, "--max-new-tokens", "8191"], "ask for at most 8190 new tokens"),
        (["generate", "x", *model, "--max-new-tokens", "many"], "argument --max-new-tokens: invalid int value"),
        (["generate", "x", *model, "--temperature", "-1"], "temperature must be at least 0"),
        (["generate", "x", *model, "--top-p", "0"], "top_p must be above 0"),
        (["generate", "x", *model, "--top-k", "-2"], "top_k must be at least 0"),
        (["generate", "x", *model, "--seed", "-2"], "--seed must be at least 0"),
        (["generate", "x", *model, "--stop", ""], "stop_strings must be non-empty"),
        (["generate", "x", *model, "--dtype", "int3"], "argument --dtype: invalid choice: 'int3'"),
        (["generate", "x", *model, "--tempreture", "1"], "unrecognized arguments: --tempreture 1"),
        (["generate", "x", "--model", "bigcode/santacoder"], "hf download bigcode/santacoder"),
        (["generate", "x", "--model", str(file)], "give the folder"),
        (["generate", "x", "--model", str(tmp_path / "nothing")], "has no config.json"),
        (["generate", "x", "--model", str(tmp_path / "no_tokenizer")], "has no tokenizer.json"),
        (["generate", "x", "--model", str(tmp_path / "no_weights")], "model.safetensors"),
        (["generate", "x", "--model", str(tmp_path / "broken")], "model.safetensors"),
        (["generate", "x", "--model", str(tmp_path / "odd")], "accepted: gpt_bigcode"),
        (["generate", "x", *model, "--batch-file", str(file)], "not both"),
        (["generate", *model, "--batch-file", str(tmp_path / "missing")], "cannot be read"),
        (["generate", *model, "--batch-file", str(tmp_path / "empty.txt")], "holds no prompt"),
        (["generate", *model, "--batch-file", str(tmp_path / "latin.txt")], "is not UTF-8 text: byte 0xe9 at 3"),
        (["generate", *model, "--batch-file", str(file)], 'line 2: expected a JSON object with "prompt"'),
        (["generat"], "invalid choice: 'generat'"),
        (["--modle"], "the following arguments are required: COMMAND"),
    ]
    for args, message in cases:
        assert main(args) == 2, args
        out, err = capsys.readouterr()
        assert out == "", args
        assert err.startswith("alula: error: ")
        assert err.count("\n") == 1, err
        assert message in err, (args, err)
    give_stdin(monkeypatch, b"\xff\xfe")
    assert main(["generate", *model]) == 2
    assert "standard input is not UTF-8 text: byte 0xff at 0" in capsys.readouterr().err
    give_stdin(monkeypatch, b"")
    assert main(["generate", *model]) == 2
    assert "the prompt is empty" in capsys.readouterr().err
    environment = {**os.environ, "ALULA_FORCE_ISA": "AVX2"}
    done = subprocess.run([*COMMAND, "generate", "x", *model], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"alula: error: unknown instruction set 'AVX2'; this CPU has: generic")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert main(["generate", "x", *model]) == 2
    assert "pip install 'alula[text]'" in capsys.readouterr().err


def test_warnings_are_one_line(folder, capsys, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text('{"num_beams": 3}')
    assert main(["generate", "x", "--model", str(tmp_path), "--max-new-tokens", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["new_tokens"] == 2
    assert err.startswith("alula: warning: ")
    assert "num_beams" in err
    assert err.count("\n") == 1


def test_unexpected_errors_are_cut_and_shown_in_full_on_demand(folder, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("internal\n" * 1000)

    monkeypatch.setattr("alula.generation.Generation.__next__", fail)
    args = ["generate", "x", "--model", str(folder), "--json"]
    assert main(args) == 2
    assert re.fullmatch(
        r"alula: error: internal .{,600} ... \(ALULA_LOG=1 shows all of it\)\n", capsys.readouterr().err
    )
    monkeypatch.setenv("ALULA_LOG", "1")
    assert main(args) == 2
    assert "Traceback" in capsys.readouterr().err


def test_no_prompt_on_a_terminal_is_an_error():
    parent, child = pty.openpty()
    done = run(["generate"], stdin=child)
    os.close(parent), os.close(child)
    assert done.returncode == 2
    assert re.fullmatch(rb"alula: error: there is no prompt; give one, as in alula generate .*\n", done.stderr)


# --- processes: streaming, signals, pipes, terminals -----------------------------------------------------------------


def start(folder: Path, *extra: str) -> subprocess.Popen:
    args = ["generate", "def f(", "--model", str(folder), "--max-new-tokens", "8000", *extra]
    return subprocess.Popen(
        [*COMMAND, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=take_interrupts
    )


def take_interrupts() -> None:
    """Shells start jobs in the background with SIGINT ignored, and these hand that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_text_streams_and_ctrl_c_ends_it(folder):
    process = start(folder)
    out = os.read(process.stdout.fileno(), 20)
    while len(out) < 50:
        piece = os.read(process.stdout.fileno(), 20)
        assert piece, process.communicate()
        out += piece
    assert process.poll() is None, "the first text came before the last"
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert re.fullmatch(rb"alula: stopped by Ctrl-C after \d+ new tokens\n", err), err
    made = int(re.search(rb"(\d+) new", err).group(1))
    text = "def f(" + generated(folder, "def f(", max_new_tokens=made)
    assert (out + rest).decode().rstrip("\n") == text.rstrip("\n")


def test_ctrl_c_with_json_gives_what_there_is(folder, capsys, monkeypatch):
    step = Generation.__next__

    def interrupted_step(generation):
        if generation.num_new_tokens[0] == 5:
            raise KeyboardInterrupt
        return step(generation)

    monkeypatch.setattr(Generation, "__next__", interrupted_step)
    assert main(["generate", "def f(", "--model", str(folder), "--json"]) == 130
    out, err = capsys.readouterr()
    report = json.loads(out)
    monkeypatch.undo()
    assert report["text"] == generated(folder, "def f(", max_new_tokens=5)
    assert (report["new_tokens"], report["finish_reason"]) == (5, "interrupted")
    assert err == "alula: stopped by Ctrl-C after 5 new tokens\n"


def test_ctrl_c_while_the_model_is_read(folder, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    def disguised(*args, **options):
        try:
            interrupted()
        except KeyboardInterrupt as error:
            raise ImportError("something else") from error

    for loading in (interrupted, disguised):
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loading)
        assert main(["generate", "x", "--model", str(folder)]) == 130
        assert capsys.readouterr() == ("", "alula: stopped by Ctrl-C\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_outputs_are_no_error(closed):
    done = subprocess.run(["sh", "-c", f"exec '{sys.executable}' -m alula --version {closed}"], check=False)
    assert done.returncode == 0


def test_a_reader_that_leaves_ends_it_quietly(folder):
    process = start(folder)
    process.stdout.read(30)
    process.stdout.close()
    assert process.wait(timeout=30) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_a_full_disk_is_one_line(folder):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "wb") as full:
        args = [*COMMAND, "generate", "x", "--model", folder, "--max-new-tokens", "2"]
        done = subprocess.run(args, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    assert re.fullmatch(rb"alula: error: .*No space left on device\n", done.stderr)


def test_on_a_terminal(folder):
    """Text appears bit by bit; the terminal's Ctrl-C (a byte, not a signal of ours) stops it."""
    pid, terminal = pty.fork()
    if pid == 0:
        take_interrupts()
        os.execv(sys.executable, [*COMMAND, "generate", "x", "--model", str(folder), "--max-new-tokens", "8000"])
    seen, reads = b"", 0
    while len(seen) < 200:
        assert select.select([terminal], [], [], 30)[0]
        seen += os.read(terminal, 64)
        reads += 1
    os.write(terminal, b"\x03")
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:
            break
        if not piece:
            break
        seen += piece
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    os.close(terminal)
    assert reads > 3
    assert b"alula: stopped by Ctrl-C after" in seen
    assert b"Traceback" not in seen


# --- info, help, version ---------------------------------------------------------------------------------------------


def test_info(capsys, monkeypatch):
    monkeypatch.setenv("ALULA_LOG", "0")
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["alula"] == alula.__version__
    assert report["torch"] == torch.__version__
    assert report["isa"] in report["available_isas"]
    assert report["threads"] >= 1
    assert report["cuda"] or report["cuda_reason"]
    assert report["gpus"] or report["gpu_reason"]
    assert report["environment"]["ALULA_LOG"] == "0"
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in (
        "alula",
        "torch",
        "python",
        "ISA in use",
        "ISA available",
        "threads",
        "CUDA build",
        "GPUs",
        "ALULA_LOG=0",
    ):
        assert word in out


def test_help_and_version_do_not_wait_for_torch():
    script = (
        "import sys; from alula.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    for args, expected in (
        (["--version"], f"alula {alula.__version__}\n"),
        (["--help"], 'alula generate "def fibonacci(n):"'),
        ([], "commands:"),
        (["generate", "--help"], "--repetition-penalty R"),
    ):
        done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 120


@pytest.mark.parametrize("pages", ["large", "refused", "unknown"])
def test_a_buffer_in_large_pages_holds_ones(pages, monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *_):
            raise OSError(errno.EINVAL, "no large pages")

    if pages == "unknown":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    if pages == "refused":
        monkeypatch.setattr(mmap, "mmap", Refusing)
    ones = large_page_ones(1_000_003)
    gc.collect()
    assert (ones.dtype, ones.shape, ones.sum().item()) == (torch.float32, (1_000_003,), 1_000_003)
    assert pages == "unknown" or ones.data_ptr() % (2 << 20) == 0


def test_read_bandwidth_is_a_bandwidth():
    assert 1e8 < read_bandwidth(0.01) < 1e13
    assert last_level_cache_bytes() >= 1 << 17
