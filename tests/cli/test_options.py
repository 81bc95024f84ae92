"""Options that cannot work: one line on stderr, the right exit code, nothing on stdout."""

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from crossdock.cli.request import parse_ids
from tests.cli.conftest import Run, start


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--prompt-ids", "5,x"], 2, "must be integers separated by commas, found '5,x'"),
        (["--prompt-ids", "5,"], 2, "must be integers separated by commas, found '5,'"),
        (["--prompt-ids", "5_0"], 2, "must be integers separated by commas, found '5_0'"),
        (["--prompt-ids", "5", "--max-new-tokens", "-3"], 2, "'--max-new-tokens'"),
        (["--prompt-ids", "5", "--ranks", "0"], 2, "'--ranks'"),
        (["--prompt-ids", "5", "--dtype", "int8"], 2, "'int8' is not one of 'float32', 'bfloat16'"),
        (["--prompt-ids", "5", "--temperature", "-1"], 2, "'--temperature'"),
        (["--prompt-ids", "5", "--frobnicate"], 2, "--frobnicate"),
        ([], 2, "give --prompt TEXT or --prompt-ids IDS"),
        (["--prompt-ids", ""], 1, "prompt 0 is empty"),
        (["--prompt-ids", "5,100"], 1, "token id 100 is outside the vocabulary, expected in 0..99"),
        (["--prompt-ids", "1", "--prompt-ids=-1"], 1, "prompt 1: token id -1 is outside the vocabulary"),
        (["--prompt-ids", "1,2,3", "--max-new-tokens", "31"], 1, "prompt 0 has 3 tokens and 31 new ones"),
        (["--prompt-ids", ",".join(["1"] * 33)], 1, "prompt 0 has 33 tokens, which leaves no room"),
        (["--prompt", "hello"], 1, "tokenizer.json, which is missing"),
        (
            ["--prompt-ids", "5", "--draft-tokens", "1"],
            1,
            "--draft-tokens 1 needs a model with an MTP layer",
        ),
        (["--prompt-ids", "5", "--top-p", "2"], 1, "top_p must be in (0, 1], found 2.0"),
        (["--prompt-ids", "5", "--transport", "pigeon"], 1, "'pigeon'"),
        (["--prompt-ids", "5", "--device", "tpu"], 1, "'tpu'"),
        (["--prompt-ids", "5", "--device", "mps"], 1, "--device must be cpu or cuda, found 'mps'"),
        (["--prompt-ids", "5", "--timeout", "0"], 1, "timeout_s must be above 0"),
        (["--prompt-ids", "5", "--timeout", "nan"], 2, "'--timeout'"),
    ],
)
def test_bad_option(run: Run, checkpoint: Path, options: list[str], code: int, message: str) -> None:
    got, out, err = run("generate", str(checkpoint), "--json", *options)
    assert (got, out, len(err.splitlines())) == (code, "", 1), err
    assert err.startswith("error: ") and message in err


def test_bad_checkpoint(run: Run, checkpoint: Path) -> None:
    def error_of(path: Path) -> str:
        code, out, err = run("generate", str(path), "--prompt-ids", "5")
        assert (code, out, len(err.splitlines())) == (1, "", 1), err
        return err

    config = checkpoint / "config.json"
    assert "must be a directory with a config.json, found nothing" in error_of(checkpoint / "absent")
    assert "found a file" in error_of(config)
    (checkpoint / "tokenizer.json").write_text("{}")
    assert "is no tokenizer that can be read" in error_of(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    config.write_text('{"model_type": "gpt2", "vocab_size": 100}')
    assert "model_type" in error_of(checkpoint) and "'gpt2'" in error_of(checkpoint)
    config.write_text("[1]")
    assert "must hold a JSON object, found list" in error_of(checkpoint)
    config.write_text("{")
    assert "is not valid JSON" in error_of(checkpoint)
    config.unlink()
    assert "has no config.json" in error_of(checkpoint)


def test_ranks_under_torchrun(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = run("generate", str(checkpoint), "--prompt-ids", "5", "--ranks", "2")
    assert (code, out) == (1, "")
    assert err.startswith("error: rank 1: --ranks starts the ranks itself") and len(err.splitlines()) == 1


def test_a_launcher_that_counts_its_local_ranks_in_words(
    run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "two")
    code, out, err = run("generate", str(checkpoint), "--prompt-ids", "5")
    assert (code, out) == (1, "")
    assert err == "error: environment variable LOCAL_WORLD_SIZE must be an integer of at least 1, found 'two'\n"


def test_a_prompt_of_bytes_that_are_no_text(run: Run, checkpoint: Path) -> None:
    Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(checkpoint / "tokenizer.json"))
    code, out, err = run("generate", str(checkpoint), "--prompt", "a", "--prompt", "a\udc80")
    assert (code, out) == (1, "") and "prompt 1 is not valid UTF-8 at character 1" in err and "internal" not in err


def test_ranks_that_cannot_meet_say_so_in_one_line(checkpoint: Path) -> None:
    """And torch's C++ log stays silent."""
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "no.such.host", "MASTER_PORT": "29500"}
    process = start("generate", str(checkpoint), "--prompt-ids", "5", "--timeout", "1", env=os.environ | place)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, len(err.splitlines())) == (1, "", 1), err
    assert err.startswith("error: rank 1: ") and "no.such.host:29500" in err


def test_ids() -> None:
    assert parse_ids("5,17, 9,+1,-2") == [5, 17, 9, 1, -2]
    assert parse_ids(" ") == []


def test_a_defect_is_one_line_and_debug_shows_where(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KeyError("lost")

    monkeypatch.setattr("crossdock.cli.doctor.examine", fail)
    code, out, err = run("doctor")
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert "internal error: KeyError: 'lost'" in err
    assert "Traceback" in run("--debug", "doctor")[2]


def test_help_and_version(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0 and all(name in out for name in ("generate", "doctor", "audit", "bench"))
    code, out, _ = run("--version")
    assert code == 0 and out.startswith("crossdock")
    code, out, err = run()
    assert code == 2 and "Usage" in out + err and "error" not in err
    assert run("frob")[0] == 2


def test_doctor_json(run: Run) -> None:
    code, out, err = run("doctor", "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report["versions"]["torch"] and report["devices"][0]["device"] == "cpu"
    assert report["transports"]["local"]["available"] is True
    assert all(set(found) == {"available", "why"} for found in report["transports"].values())
    assert report["backend"] in ("torch", "triton")


def test_doctor_text(run: Run) -> None:
    code, out, _ = run("doctor")
    assert code == 0 and "transport local" in out


def test_bench_asks_before_it_measures(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    code, out, err = run("bench", "layer", "--plot", str(tmp_path / "absent" / "x.png"))
    assert (code, out) == (1, "") and "there is no folder" in err
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    code, out, err = run("bench", "layer", "--plot", str(tmp_path / "x.png"))
    assert (code, out) == (1, "") and "crossdock[plot]" in err
