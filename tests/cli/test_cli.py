"""The command line as a user meets it: exit codes, errors in two lines, JSON alone on standard output."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_models import reference
from tiny import TrainTiny

from resmol.__main__ import exit_code, run
from resmol.audit.reproduce import ReproduceSpec
from resmol.checks import Check
from resmol.config.run_config import RunConfig
from resmol.data.shards import Dataset
from resmol.data.tokenizer import Tokenizer
from resmol.errors import CheckFailed, DiskFull, Interrupted
from resmol.inference import generate
from resmol.run.directory import RunDir
from resmol.system.locks import exclusive_lock


@pytest.fixture(autouse=True)
def no_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a test the process must not be replaced."""


@pytest.fixture
def tiny_file(tiny_config: RunConfig, tmp_path: Path) -> str:
    path = tmp_path / "tiny.toml"
    path.write_text(tiny_config.to_toml(), encoding="utf-8")
    return str(path)


@pytest.fixture
def finished(tmp_path: Path, train_tiny: TrainTiny) -> str:
    train_tiny(tmp_path / "run", 10)
    return str(tmp_path / "run")


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run a command that must fail; return its exit code and what it printed on standard error."""
    code = run(list(arguments), debug=False)
    captured = capsys.readouterr()
    assert code != 0
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return code, captured.err


def test_help_and_version_without_torch() -> None:
    code = "import sys; from resmol.__main__ import run; run(sys.argv[1:], debug=False); print('torch' in sys.modules)"
    for arguments in (
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["train"],
        ["nonsense"],
        ["train", "x", "--preset", "nan0"],
    ):
        result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert result.stdout.splitlines()[-1].startswith("False"), arguments


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "RUN"], 2, "neither a preset nor a configuration"),
        (["train", "RUN", "--preset", "nan0"], 2, "did you mean nano?"),
        (["train", "RUN", "--preset", "nano", "--set", "optimizer.lrr=1"], 2, "did you mean optimizer.lr?"),
        (["train", "RUN", "--preset", "nano", "--set", "lr"], 2, "not section.key=value"),
        (["train", "RUN", "--preset", "nano", "--config", "x.toml"], 2, "both given"),
        (["train", "RUN", "--config", "missing.toml"], 3, "cannot read missing.toml"),
        (["evaluate", "RUN"], 3, "RUN"),
        (["generate", "RUN", "--prompt", "x"], 3, "RUN"),
        (["generate", "RUN", "--prompt", "x", "--temperature", "-1"], 2, "temperature is -1"),
        (["generate", "RUN"], 2, "exactly one source of prompts"),
        (["generate", "RUN", "--prompt", "x", "--interactive"], 2, "exactly one source of prompts"),
        (["generate", "RUN", "--interactive", "--json"], 2, "exclude each other"),
        (["generate", "RUN", "--prompt", "x", "--stop", ""], 2, "a stop string is empty"),
        (["generate", "RUN", "--prompt", "x", "--repetition-penalty", "0"], 2, "repetition_penalty is 0"),
        (["generate", "RUN", "--prompts", "missing.txt"], 3, "missing.txt does not exist"),
        (["evaluate", "RUN", "--windows", "-1"], 2, "Invalid value for '--windows'"),
        (["bench", "train", "--batch", "1x64", "--batch", "2x64", "--trace", "t.json"], 2, "and 2 are given"),
        (["audit", "RUN"], 3, "not a run directory"),
        (["report", "RUN"], 3, "not a run directory"),
        (["inspect", "missing/config.json"], 3, "missing/config.json"),
    ],
)
def test_bad_input(
    arguments: list[str],
    code: int,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found, text = failure(capsys, *arguments)
    assert found == code, text
    assert words in text
    assert text.count("\n  fix: ") == 1


@pytest.mark.parametrize("arguments", [["train"], ["nonsense"], ["generate", "x"], ["train", "x", "--steps", "many"]])
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert failure(capsys, *arguments)[0] == 2


def test_truncated_config_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 5')
    code, text = failure(capsys, "inspect", str(tmp_path / "config.json"))
    assert code == 2
    assert "may be truncated" in text


def test_no_data(tiny_file: str, tmp_path: Path, tiny_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = failure(
        capsys, "train", str(tmp_path / "run"), "--config", tiny_file, "--tokenizer", str(tiny_tokenizer.path)
    )
    assert code == 3
    assert "add --data input.txt" in text


def test_a_wrong_path_to_the_data(
    tiny_file: str, tmp_path: Path, tiny_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "train",
        str(tmp_path / "run"),
        "--config",
        tiny_file,
        "--tokenizer",
        str(tiny_tokenizer.path),
    ]
    code, text = failure(capsys, *arguments, "--data", "missing.txt")
    assert code == 3
    assert "missing.txt" in text
    assert not (tmp_path / "run" / "config.toml").exists()


def test_steps_below_the_checkpoint(finished: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = failure(capsys, "train", finished, "--steps", "5")
    assert code == 2
    assert "--steps 5 lies before it" in text


def test_a_run_in_use(finished: str, capsys: pytest.CaptureFixture[str]) -> None:
    with exclusive_lock(RunDir(Path(finished)).lock):
        code, text = failure(capsys, "train", finished, "--steps", "20")
    assert code == 75
    assert str(os.getpid()) in text


def test_a_configuration_changed_under_a_run(finished: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = failure(capsys, "train", finished, "--steps", "20", "--set", "optimizer.beta1=0.5")
    assert code == 2
    assert "optimizer.beta1 (class A)" in text


def test_one_text_file_is_the_whole_interface(
    tiny_file: str, tmp_path: Path, tiny_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "input.txt"
    text.write_text("kalomi ner ta shu. " * 400, encoding="utf-8")
    arguments = ["train", str(tmp_path / "run"), "--data", str(text), "--json"]
    first = ["--config", tiny_file, "--tokenizer", str(tiny_tokenizer.path), "--steps", "10"]
    assert run([*arguments, *first], debug=True) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["step"], result["run"]) == (10, str(tmp_path / "run"))
    assert run([*arguments, "--steps", "12"], debug=True) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 12
    text.write_text("something else " * 400, encoding="utf-8")
    code, error = failure(capsys, *arguments, "--steps", "14")
    assert code == 3
    assert "another text" in error


def test_a_model_without_a_tokenizer_names_an_option_that_the_command_has(
    tmp_path: Path, tiny_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str], own_cache: Path
) -> None:
    reference(vocab_size=512).save_pretrained(tmp_path / "hf")
    (tmp_path / "text.txt").write_text("ka lo")
    model = str(tmp_path / "hf")
    for command in (
        ["generate", model, "--prompt", "ka\\n"],
        ["evaluate", model, "--data", str(tmp_path / "text.txt")],
    ):
        code, text = failure(capsys, *command)
        assert code == 3
        assert "name it with --tokenizer PATH" in text
        assert run([*command, "--tokenizer", str(tiny_tokenizer.path), "--json"], debug=True) == 0
        captured = capsys.readouterr()
        assert json.loads(captured.out)["model"]["kind"] == "huggingface"
        assert ("--prompt holds a backslash" in captured.err) == (command[0] == "generate")
    command = ["export", model, str(tmp_path / "out")]
    assert failure(capsys, *command)[0] == 3
    assert run([*command, "--tokenizer", str(tiny_tokenizer.path.parent)], debug=True) == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tiny_tokenizer.data


def test_audit_evaluate_generate_as_json(
    finished: str, tiny_dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, keys in (
        (["audit", finished], {"passed", "checks"}),
        (["evaluate", finished], {"loss", "bits_per_byte", "perplexity", "tokens"}),
        (["generate", finished, "--prompt", "ka", "--max-new-tokens", "5"], {"text", "model"}),
    ):
        assert run([*arguments, "--json"], debug=True) == 0
        assert keys <= set(json.loads(capsys.readouterr().out))


def test_a_name_with_brackets_is_no_markup(
    tmp_path: Path, train_tiny: TrainTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    run_path = tmp_path / "[" / "x]"  # together a closing tag of Rich
    train_tiny(run_path, 10)
    assert run(["evaluate", str(run_path)], debug=True) == 0
    assert "[/x]" in "".join(capsys.readouterr().out.split())


class SetUp(BaseException):
    """The process was about to be set up for training."""


@pytest.mark.parametrize(
    "arguments",
    [["bench", "train", "--preset", "nano", "--data", "missing.txt", "--trace", "t.json"],
     ["reproduce", "RUN", "--preset", "nano", "--input", "missing.txt", "--set", "model.vocab_size=1"]],
    ids=["trace", "estimate"],
)  # fmt: skip
def test_a_command_that_trains_in_its_own_process_is_set_up_like_train(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def set_up(*_: object) -> None:
        raise SetUp

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("resmol.cli.bench.set_up_process", set_up)
    monkeypatch.setattr("resmol.cli.train.set_up_for", set_up)
    with pytest.raises(SetUp):
        run(arguments, debug=False)


def test_the_prompts_of_a_file_are_what_each_prompt_gives(
    finished: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--max-new-tokens", "9", "--stop", "a", "--repetition-penalty", "1.2", "--seed", "3"]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ka lo"}\n\n{"prompt": ""}\n{"prompt": "mi"}\n')
    several = ["generate", finished, "--prompts", str(tmp_path / "prompts.jsonl"), "--batch-size", "2", *options]
    assert run([*several, "--json"], debug=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sampling"]["repetition_penalty"] == 1.2
    assert (found["stop"], found["seed"]) == (["a"], 3)
    assert [row["place"] for row in found["completions"]] == ["line 1", "line 3", "line 4"]
    blocks = []
    for row in found["completions"]:
        assert run(["generate", finished, "--prompt", row["prompt"], *options, "--json"], debug=True) == 0
        alone = json.loads(capsys.readouterr().out)
        for key in ("text", "token_ids", "prompt_ids", "finish_reason"):
            assert alone[key] == row[key]
        assert len(alone["logprobs"]) == len(row["logprobs"]) == len(row["token_ids"]) > 0
        assert run(["generate", finished, "--prompt", row["prompt"], *options], debug=True) == 0
        assert capsys.readouterr().out == row["text"] + "\n"
        blocks.append(f"=== {row['place']}: {row['prompt']}\n{row['text']}\n")
    assert run(several, debug=True) == 0
    assert capsys.readouterr().out == "".join(blocks)


@pytest.mark.parametrize("several", [False, True])
def test_ctrl_c_with_json_prints_what_there_is(
    several: bool, finished: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("ka\nlo\nmi\n")
    given = ["--prompts", str(tmp_path / "prompts.txt"), "--batch-size", "2"] if several else ["--prompt", "ka"]
    passes = itertools.count(1)

    def until_the_tenth(function: Callable[..., object]) -> Callable[..., object]:
        def computed(*arguments: object) -> object:
            if next(passes) == 10:
                raise KeyboardInterrupt
            return function(*arguments)

        return computed

    for name in ("_logits", "_next_logits"):
        monkeypatch.setattr(generate, name, until_the_tenth(getattr(generate, name)))
    command = ["generate", finished, *given, "--json", "--max-new-tokens", "40", "--temperature", "0"]
    assert run(command, debug=False) == 130
    found = json.loads(capsys.readouterr().out)
    texts = found["completions"] if several else [found]
    assert [text["prompt"] for text in texts] == (["ka", "lo"] if several else ["ka"])
    for text in texts:
        assert text["finish_reason"] == "interrupted"
        assert len(text["token_ids"]) == len(text["logprobs"]) == (8 if several else 9)
        assert text["text"]
    assert {"timings", "model", "seed"} <= found.keys()


def test_a_failed_audit_exits_with_1_and_still_prints_its_json(
    finished: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(finished) / "checkpoints" / "step-00000010" / "model.safetensors").write_bytes(b"")
    assert run(["audit", finished, "--json"], debug=False) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["passed"] is False
    assert "step-00000010" in captured.err


def test_exit_codes() -> None:
    assert exit_code(CheckFailed("", fix="")) == 1
    assert exit_code(DiskFull("", fix="")) == 28
    assert exit_code(Interrupted("", fix="", signal_number=2)) == 130
    assert exit_code(Interrupted("", fix="", signal_number=15)) == 143


def test_an_internal_error_is_said_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr("resmol.cli.app", broken)
    code, text = failure(capsys, "audit", "x")
    assert code == 1
    assert "internal error: KeyError" in text
    with pytest.raises(KeyError):
        run(["audit", "x"], debug=True)


def test_the_commands_are_listed_in_the_order_of_work_in_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["--help"], debug=True) == 0
    lines = capsys.readouterr().out.partition("Commands:")[2].strip().splitlines()
    assert [line.split()[0] for line in lines][:6] == ["inspect", "config", "prepare", "train", "verify", "audit"]
    assert [line for line in lines if "..." in line or len(line) > 80] == []


def test_quickstart_is_reproduce_with_nano(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it makes the published run again."""
    begun, records = list[ReproduceSpec](), list[Path | None]()

    def begin(spec: ReproduceSpec, published: Path | None = None) -> list[Check]:
        begun.append(spec)
        records.append(published)
        return [Check("begun", True, "once", "once", "")]

    monkeypatch.setattr("resmol.audit.reproduce.reproduce", begin)
    assert run(["quickstart"], debug=True) == 0
    assert run(["reproduce", "runs/quickstart", "--preset", "nano"], debug=True) == 0
    assert begun[0] == begun[1]
    assert [record and record.name for record in records] == ["nano-100.json", None]
    makefile = (Path(__file__).resolve().parents[2] / "Makefile").read_text(encoding="utf-8")
    assert "\t$(BIN)/resmol quickstart\n" in makefile
